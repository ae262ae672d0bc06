"""Every backend against the float64 oracle under the error rule: losses and all gradients.

All of margins x dtypes x shapes x parameters would be 48,000 runs. A margin lives on [B], a dtype and a shape in the
sweep, so an error shows in a pair of them: every margin runs in every dtype, every two values of any two axes meet,
and each way of reading the tensors runs at the largest shape.
"""

import functools
import itertools
import math

import pytest
import torch

from . import cases
from .cases import BACKENDS, MARGINS, MODES
from .error_rule import ErrorRule

BATCHES, CLASSES, DIMS = [0, 1, 3, 128], [1, 2, 129, 10_007], [8, 100, 512]
PARAMETERS = ["float", "sample", "class", "class_bias"]
AXES = list(MARGINS), list(MODES), BATCHES, CLASSES, DIMS, PARAMETERS
COVER = cases.covering(*AXES, cost=lambda batch, classes, dim, _: classes * dim * (batch or math.inf))
LARGEST = [("arcface_linear", mode, 128, 10_007, 512, "sample") for mode in ("fp64", "fp32", "bf16", "fp16_weight")]
RUNS = COVER + [run for run in LARGEST if run not in COVER]


def _draws(mode: str, batch: int, classes: int, dim: int) -> int:
    """Enough for 16 independent rows, 64 where operands are rounded; fewer where the weights are large."""
    rows = 64 if MODES[mode].operands else 16
    wanted = 1 if batch == 0 else max(rows // batch, 16 // classes)
    return max(1, min(wanted, 12_000_000 // (classes * dim)))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # changes fastest: the backends share what is expected
@pytest.mark.parametrize(
    ("margin", "mode", "batch", "classes", "dim", "per"),
    RUNS,
    ids=[f"{m}-{d}-B{b}-C{c}-D{e}-{p}" for m, d, b, c, e, p in RUNS],
)
def test_parity(margin, mode, batch, classes, dim, per, backend, threads):
    if batch * classes * dim > 1e8:
        torch.set_num_threads(threads)
    rule, draws = ErrorRule(), _draws(mode, batch, classes, dim)
    for first, last in ((0, draws), (draws, 4 * draws), (4 * draws, 16 * draws)):
        for p, plain, exact in _expected(margin, mode, batch, classes, dim, per, first, last):
            rule.add_all(cases.run(p, backend), plain, exact)
        if not rule.failures():
            return  # else plain PyTorch may have been lucky: more draws decide, not a wider limit
    rule.check()


@functools.lru_cache(maxsize=1)
def _expected(margin, mode, batch, classes, dim, per, first, last) -> list[tuple]:
    per, _, bias = per.replace("float", "").partition("_")
    shape = MARGINS[margin], MODES[mode], batch, classes, dim
    problems = [cases.problem(*shape, seed, per, bool(bias)) for seed in range(first, last)]
    return [(p, cases.plain(p), cases.exact(p)) for p in problems]


def test_every_two_values_meet():
    for (i, first), (j, second) in itertools.combinations(enumerate(AXES), 2):
        met = {(row[i], row[j]) for row in COVER}
        assert met == set(itertools.product(first, second))
