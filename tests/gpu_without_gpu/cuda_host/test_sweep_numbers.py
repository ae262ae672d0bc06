"""The CUDA C++ kernels' numbers on the simulator: what Triton's are held to in the interpreter, and the same oracle.

Tiles are of 128 rows and 128 classes: 150 classes are two of them, the dimensions of 16-bit operands one slice to four.
"""

import pytest
import torch

from ... import cases
from ...cases import MARGINS, MODES, problem
from ...error_rule import ErrorRule
from ..sweep_cases import HEADS, OPERANDS, Sweep, combinations, hold_to_the_rule
from .backend import simulated
from .builder import sanitizer_in_use

CLASSES = 150
DIMS = {20: 20, 32: 72, 37: 101}  # in place of Triton's, whose slices are shorter
SEEDS = range(6)
DRAWS = 24 if not sanitizer_in_use() else 2  # in 16 bit


def sweep(rule, operands, layout="plain", bias=True, dim=72, seed=0, **options):
    return Sweep(rule, operands, layout, bias, dim, seed, backend="cuda", **{"classes": CLASSES, **options})


@pytest.mark.parametrize("rule, operands, reduction, part, unit_slope, layout, bias, dim", list(combinations()))
def test_sweep(rule, operands, reduction, part, unit_slope, layout, bias, dim):
    parts = (0, 1, 2) if part[1] else (0, 1)

    def draw(seed, pooled):
        with simulated(seed, programs=1 + seed % 3, chunk=64):
            sweep(rule, operands, layout, bias, DIMS[dim], seed).check(reduction, unit_slope, parts, pooled)

    if sanitizer_in_use():  # what it reports is what counts, and it takes its time
        draw(0, ErrorRule())
    else:
        hold_to_the_rule(operands, draw, DRAWS, 8 * DRAWS)


def test_sums_that_tensor_cores_truncate():
    """In float32 at D = 512, where errors that all go one way would have added up."""
    with simulated(seed=3, truncates=True):
        sweep("identity", torch.float32, bias=False, dim=512).check()


def draws(margin, mode, count=2, **options):
    return (problem(MARGINS[margin], MODES[mode], 19, CLASSES, 40, seed, **options) for seed in range(count))


@pytest.mark.parametrize("margin, mode", HEADS)
def test_heads(margin, mode):
    """Whole heads through `functional`: losses of built-in margins from the row kernels, weights stored in 16 bit."""
    with simulated(seed=3):
        cases.check(draws(margin, mode), "cuda")


@pytest.mark.parametrize("per", ["sample", "class"])
def test_margins_and_scales_of_rows(per):
    with simulated(seed=5):
        cases.check(draws("cosface", "fp32", per=per, bias=True), "cuda")


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("layout", ["plain", "2 centers"])
def test_several_blocks_chunks_and_rows_that_share_a_target(operands, layout):
    pooled = ErrorRule()
    for seed in range(1 if operands == torch.float32 else 4):
        with simulated(seed, programs=2, chunk=128):
            s = sweep("identity", operands, layout, dim=40, seed=seed, batch=140, classes=300)
            s.labels[:] = s.labels[torch.tensor([0, 5, 2]).repeat(47)[:140]]
            s.check(rule=pooled)
    pooled.check()


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_same_bits_under_every_schedule(mode):
    p = problem(MARGINS["arcface_linear"], MODES[mode], 19, CLASSES, 101)
    found = []
    for seed in SEEDS:
        with simulated(seed, programs=1):
            found.append(cases.run(p, "cuda"))
    for other in found[1:]:
        assert [name for name in other if not torch.equal(other[name], found[0][name])] == []
