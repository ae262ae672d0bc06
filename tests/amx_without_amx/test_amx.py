"""The suite on the AMX build, where the CPU has no AMX; an error that only this build can have is found."""

import shutil
import signal
import subprocess
import sys

import pytest

from .. import mutants
from ..mutant_table import MUTANTS
from . import BUILD, HEADER, why_not

# Those whose numbers come from tiles.
SELECTION = [f"tests/test_{name}.py" for name in ("tiles", "kept", "parity", "chunks", "edges", "sweep_optim")]
REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def registers(tmp_path_factory):
    """A program on the emulated registers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    program = tmp_path_factory.mktemp("amx") / "registers"
    source = HEADER.parent / "registers.cpp"
    subprocess.run(["g++", "-std=c++17", "-O2", "-ffp-contract=off", source, "-o", program], check=True)
    return program


def test_registers_multiply_as_defined(registers):
    done = subprocess.run([registers], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_register_without_shape_is_refused(registers):
    done = subprocess.run([registers, "unconfigured"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "tile register 0 is used without its configuration" in done.stderr


@pytest.fixture(scope="module")
def tree():
    with mutants.copy_of_the_tree() as copy:
        assert mutants.build(copy, **BUILD) == ""
        yield copy


@pytest.mark.slow
def test_the_suite_passes(tree):
    path = mutants.run([sys.executable, "-c", "from fused_margin.backends import cpu; print(cpu.path())"], tree)
    assert path.stdout.startswith("amx, float32: products of three bfloat16 pieces"), path.stderr
    assert mutants.first_failure(tree, SELECTION) == ""


@pytest.mark.slow
def test_a_tile_that_is_overwritten_too_early_is_found(tree):
    """In this build alone a tile is loaded beside the products of the one before it."""
    error = next(m for m in MUTANTS if m.name == "kernel_next_tile_too_early")
    with mutants.planted(tree, error) as problem:
        assert problem == ""
        assert mutants.build(tree, **BUILD) == ""
        assert mutants.first_failure(tree, SELECTION[:1]).startswith("tests/test_tiles.py")
