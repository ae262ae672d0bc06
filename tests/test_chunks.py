"""Sizes around the kernel's tiles, blocks and vectors, on every instruction set that this CPU has.

csrc/cpu/problem.h cuts classes by 48, 64 and 96 (a tile), 192 (a task) and 6,144 (all tasks), rows by 32, 128 and 512;
csrc/cpu/product.h cuts what is summed by 256, and columns by 4 to 32 (a panel), csrc/cpu/tiles.h by 256 or 512, and
rows and columns by 32; vectors hold 2 to 16 numbers. One number beyond each of these and one before must be right.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm
from fused_margin.spec import Want

from . import cases
from .cases import MARGINS, MODES, problem
from .conftest import require
from .error_rule import ErrorRule
from .test_primitive import ARGS, SMOOTH_RULES, Inputs, check

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROOT = Path(__file__).parent.parent
PATHS = fm.backends.cpu.CAPABILITIES


def around(*sizes: int) -> list[int]:
    return sorted({n for size in sizes for n in (size - 1, size, size + 1)})


@pytest.fixture(params=PATHS)
def path(request):
    """Forces an instruction set of the CPU backend, if there are this backend and this CPU."""
    require("cpu")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(fm.backends.cpu.capability(request.param))
        except ValueError as error:
            pytest.skip(str(error))
        yield request.param


def check_shape(batch: int, classes: int, dim: int, mode: str, margin: str = "arcface_linear", draws: int = 3) -> None:
    rule = ErrorRule()
    for first, last in ((0, draws), (draws, 8 * draws), (8 * draws, 64)):
        for seed in range(first, last):
            p = problem(MARGINS[margin], MODES[mode], batch, classes, dim, seed, "class", bias=True)
            p.labels[-2:] = torch.tensor([0, classes - 1])[-min(batch, 2) :]
            rule.add_all(cases.run(p, "cpu"), cases.plain(p), cases.exact(p))
        if not rule.failures():
            return  # else plain PyTorch may have been lucky
    rule.check()


@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("classes", around(16, 32, 48, 64, 96, 128, 192, 256))
def test_classes(path, mode, classes):
    check_shape(19, classes, 24, mode)


@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("batch", around(16, 32, 128, 256, 512))
def test_rows(path, mode, batch):
    check_shape(batch, 150, 24, mode, draws=1)


@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("dim", [2, 3, *around(8, 16, 32, 64, 128), 256, 257, 513])
def test_dims(path, mode, dim):
    check_shape(18, 140, dim, mode)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", [6_143, 6_145, 8_193, 33_000])
def test_as_many_tiles_as_tasks(mode, classes):
    require("cpu")
    check_shape(34, classes, 20, mode, draws=1)


@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("rise", [6000.0, -6000.0, 300.0])
def test_logits_that_rise(path, mode, rise):
    """From class to class, so that sums of exponentials would overflow if the power taken out of them stayed."""
    rule = ErrorRule()
    for seed in range(8):
        p = problem(MARGINS["arcface_linear"], MODES[mode], 34, 700, 24, seed, bias=True)
        p.tensors["bias"] = torch.linspace(-rise / 2, rise / 2, 700).to(p.tensors["bias"])
        rule.add_all(cases.run(p, "cpu"), cases.plain(p), cases.exact(p))
    rule.check()


def test_more_rows_than_a_task_takes():
    require("cpu")
    check_shape(600, 5000, 9, "fp32", draws=1)
    check_shape(1100, 300, 9, "fp64", draws=1)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "fp64"])
@pytest.mark.parametrize("margin", ["sphereface_4", "sv_arcface"])
def test_dtypes(path, margin, mode):
    check_shape(64, 333, 50, mode, margin)


RULES_BY_DTYPE = [("float64", rule) for rule in ARGS] + [("float32", rule) for rule in SMOOTH_RULES]


@pytest.mark.parametrize("reduction", ["logsumexp", "softplus"])
@pytest.mark.parametrize(("dtype", "rule"), RULES_BY_DTYPE)
def test_rules(path, dtype, rule, reduction):
    check(Inputs(37, 300, 40, rule, dtype=getattr(torch, dtype)), "cpu", reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("centers", [2, 3, 7, 50, 130])
def test_sub_centers_across_tiles(path, centers, dtype):
    """A class never lies in two tiles, also where a tile is no multiple of its centres or is less than they are."""
    inputs = Inputs(21, 61 * centers, 10, bias=False, dtype=dtype)
    inputs.labels %= 61
    check(inputs, "cpu", {"sub_centers": centers}, sub_centers=centers)


def test_a_large_gradient(path):
    """From 64 MiB on it is written past the cache; rows with targets are read again and changed."""
    batch, classes, dim = 8, 140_000, 128
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(batch, dim, generator=g), torch.randn(classes, dim, generator=g).requires_grad_()
    labels = torch.tensor([0, 1, 1, 70_000, 70_000, 70_001, classes - 1, classes - 2])
    fm.functional.margin_cross_entropy(x, w, labels, fm.ArcFace(0.5), reduction="sum").backward()
    some = torch.cat([labels, torch.randint(classes, (2000,), generator=g)]).unique()
    rows = w.detach().double().requires_grad_()
    cos = F.linear(F.normalize(x.double()), F.normalize(rows))
    marked = torch.cos(torch.acos(cos[torch.arange(batch), labels]) + 0.5)
    logits = 64 * cos.index_put((torch.arange(batch), labels), marked)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(w.grad[some].double(), rows.grad[some], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("portable", "path: portable, float32: products in float32, bfloat16: computed in float32 why not: []"),
        ("sse9", "FUSED_MARGIN_CPU_CAPABILITY = 'sse9' is unknown, or this CPU lacks it; expected portable, avx2"),
    ],
    ids=["portable", "unknown"],
)
def test_environment_chooses_the_path(name, expected):
    require("cpu")
    code = "import fused_margin as fm; print('path:', fm.backends.cpu.path(), 'why not:', fm.why_not('cpu'))"
    env = os.environ | {"FUSED_MARGIN_CPU_CAPABILITY": name}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert expected in run.stdout


def test_environment_is_read_once(monkeypatch):
    """What a forward keeps lies as its build has it; and a thread that computes must not read what another one sets."""
    require("cpu")
    before = fm.backends.cpu.path()
    for name in ("portable", "sse9"):
        monkeypatch.setenv("FUSED_MARGIN_CPU_CAPABILITY", name)
        assert fm.backends.cpu.path() == before


def test_blocks_that_force_a_path_nest():
    require("cpu")
    cpu = fm.backends.cpu
    before = cpu.path()
    with cpu.capability("portable"):
        with contextlib.suppress(ValueError), cpu.capability("avx2"):
            assert cpu.path().startswith("avx2")
        assert cpu.path().startswith("portable")
    assert cpu.path() == before


def test_unknown_path():
    require("cpu")
    with (
        pytest.raises(ValueError, match=r"capability 'sse9' is unknown.*expected one of"),
        fm.backends.cpu.capability("sse9"),
    ):
        pass


@pytest.mark.parametrize("shape", [(40, 700, 33), (300, 129, 16)], ids=["B40", "B300"])
def test_paths_agree_closely(shape):
    """In float64 the instruction sets differ by rounding alone."""
    require("cpu")
    p = problem(MARGINS["arcface_linear"], MODES["fp64"], *shape)
    results = []
    for name in PATHS:
        with contextlib.suppress(ValueError), fm.backends.cpu.capability(name):
            results.append(cases.run(p, "cpu"))
    for other in results[1:]:
        for key, expected in results[0].items():
            torch.testing.assert_close(other[key], expected, rtol=1e-10, atol=1e-10)


def test_want_is_respected_by_the_backend():
    """Outputs that are not asked for are empty, and the flash outputs are there exactly for d_x."""
    require("cpu")
    inputs = Inputs(5, 9, 6)
    leaves = {n: t.detach() for n, t in inputs.leaves.items()}
    asked = {
        Want.NONE: [(0,), (0,), (0,)],
        Want.DX: [(5, 6), (0,), (0,)],
        Want.DX | Want.SUM: [(5, 6), (5, 6), (0,)],
        Want.DW: [(0,), (0,), (32 * 9,)],
    }
    for want, shapes in asked.items():
        out = torch.ops.fused_margin.sweep.default(
            leaves["x"], leaves["w"], inputs.labels, leaves["scale"], None, leaves["bias"], None,
            torch.zeros(0, dtype=torch.float64), *inputs.spec("cpu", want=int(want)),
        )  # fmt: skip
        assert [tuple(t.shape) for t in out[4:]] == shapes
