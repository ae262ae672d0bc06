"""Same inputs, same bits: twice, and at any number of threads."""

import pytest
import torch

from . import cases
from .cases import MARGINS, MODES, problem
from .conftest import require

SHAPES = [(3, 10_007, 100), (300, 1500, 65), (128, 5000, 64), (600, 129, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=["B{}-C{}-D{}".format(*s) for s in SHAPES])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp64", "fp16_weight"])
@pytest.mark.parametrize("margin", ["arcface_linear", "sv_cosface"])
def test_same_bits_at_any_thread_count(margin, mode, shape):
    """Of losses and all gradients; the reference backend leaves this to torch, which does not promise it."""
    require("cpu")
    p = problem(MARGINS[margin], MODES[mode], *shape, per="class", bias=True)
    results = []
    for count in (1, 2, 3, 8, 2):
        torch.set_num_threads(count)
        results.append(cases.run(p, "cpu"))
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), f"{name} differs"


def test_twice_the_same(backend):
    p = problem(MARGINS["arcface_linear"], MODES["fp32"], 64, 3000, 48, per="sample")
    first, second = (cases.run(p, backend) for _ in range(2))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), f"{name} differs"
