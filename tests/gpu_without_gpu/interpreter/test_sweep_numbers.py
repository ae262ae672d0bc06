"""The Triton kernels' numbers, in the interpreter: every rule, reduction, operand dtype and option against the oracle.

Tiles are of 16 and 32, so that shapes of a few dozen have several tiles and a tail in every dimension.
"""

import pytest
import torch

from fused_margin.kernels.configs import Cut, Device, Tile, use

from ...cases import MARGINS, MODES, check, problem
from ..sweep_cases import BATCH, CLASSES, HEADS, OPERANDS, Sweep, combinations, hold_to_the_rule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS = ("flash", "chunk")  # the shapes of sweep_cases: two blocks of 16 rows, three tiles of 32 classes (five of 16)


def device(form: str = "chunk", slots: int = 32, depth: int = 16) -> Device:
    tile = Tile(rows=16, slots=slots, warps=4, stages=1)
    cut = Cut(tile, tile, tile, depth, flash_width=1024 if form == "flash" else 0)
    return Device(cut, cut, "ieee", programs=4, chunk_bytes=1 << 20)


@pytest.fixture(params=FORMS)
def form(request):
    with use(device(request.param)):
        yield request.param


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of one tile, and few rows at a time where rows are sorted by their target."""
    monkeypatch.setattr("fused_margin.kernels.gradients._CHUNK_ROWS", (32, 32))
    monkeypatch.setattr("fused_margin.kernels.gradients._SCAN", 16)


@pytest.mark.parametrize("rule, operands, reduction, part, unit_slope, layout, bias, dim", list(combinations()))
def test_sweep(rule, operands, reduction, part, unit_slope, layout, bias, dim):
    form, sums = part
    parts = (0, 1, 2) if sums else (0, 1)

    def draw(seed, pooled):
        Sweep(rule, operands, layout, bias, dim, seed, backend="triton").check(reduction, unit_slope, parts, pooled)

    with use(device(form, slots=16 if rule in ("identity", "hard") else 32)):
        hold_to_the_rule(operands, draw)


def draws(margin, mode, **options):
    return (problem(MARGINS[margin], MODES[mode], BATCH, CLASSES, 20, seed, **options) for seed in range(2))


@pytest.mark.parametrize("margin, mode", HEADS)
def test_heads(margin, mode):
    """Whole heads through `functional`: losses of built-in margins from the row kernels, weights stored in 16 bit."""
    with use(device("flash" if mode.endswith("weight") else "chunk")):
        check(draws(margin, mode), "triton")


@pytest.mark.parametrize("per", ["sample", "class"])
def test_margins_and_scales_of_rows(form, per):
    """They are tensors, so the work on [B] is PyTorch's."""
    check(draws("cosface", "fp32", per=per, bias=True), "triton")


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("layout", ["plain", "2 centers"])
def test_several_chunks_and_rows_that_share_a_target(operands, layout):
    with use(device()):
        sweep = Sweep("identity", operands, layout, backend="triton")
        sweep.labels[:] = sweep.labels[torch.tensor([0, 5, 2]).repeat(7)[:BATCH]]
        sweep.check()
