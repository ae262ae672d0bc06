"""torch's own checks of the operators with the CUDA C++ backend underneath, on the simulator."""

import pytest
import torch

from ...test_primitive import OPCHECKED, opcheck_sweep_backward, sweep_args
from .backend import simulated


@pytest.mark.parametrize("rule", OPCHECKED)
def test_sweep(rule):
    with simulated(seed=1):
        torch.library.opcheck(
            torch.ops.fused_margin.sweep.default, sweep_args("cuda", rule, torch.float32, **OPCHECKED[rule])
        )


@pytest.mark.parametrize("need", [1, 2, 15])
def test_sweep_backward(need):
    with simulated(seed=1):
        opcheck_sweep_backward(sweep_args("cuda", "identity", torch.float32), need)
