"""The CPU kernels under ThreadSanitizer: no race, the same bits on any number of threads; a planted race is found."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
GXX = shutil.which("g++")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GXX is None, reason="no g++ on PATH")]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The portable build: what differs between instruction sets is how one task computes, not what tasks touch."""
    target = tmp_path_factory.mktemp("threads") / "sweep"
    sources = [HERE / "sweep.cpp", CSRC / "cpu" / "sweep_portable.cpp", CSRC / "cpu" / "rows.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-Wno-psabi", "-fsanitize=thread", f"-I{CSRC}"]
    done = subprocess.run(
        [GXX, *flags, *map(str, sources), "-o", str(target), "-pthread"], capture_output=True, text=True
    )
    if "libtsan" in done.stderr and "cannot find" in done.stderr:
        pytest.skip("g++ has no libtsan")
    assert done.returncode == 0, done.stderr
    return target


def run(program, *arguments):
    command = [str(program), *arguments]
    if shutil.which("setarch"):  # ThreadSanitizer wants fixed addresses
        command = ["setarch", "-R", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_no_race_and_the_same_bits(program):
    code, output = run(program)
    assert code == 0, output
    assert "the same bits" in output
    assert "data race" not in output


def test_a_planted_race_is_found(program):
    code, output = run(program, "race")
    assert code != 0
    assert "data race" in output
