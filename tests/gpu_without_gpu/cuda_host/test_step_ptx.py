"""nvcc's PTX of the optimizers' kernels for sm_80 and sm_120, in the emulator: numbers, and planted errors."""

import pytest
import torch

from fused_margin.backends import cuda
from fused_margin.update_rules import State

from . import builder
from .backend import emulated, simulated
from .test_step_numbers import UPDATES, check, draw
from .test_sweep_ptx import check_mutants, mutating

pytestmark = pytest.mark.skipif(builder.NVCC is None, reason="no nvcc on PATH")

SMALL = {"classes": 140, "dim": 37}  # two tiles, and rows that no 16-byte access can read
STEPS = [
    (80, {"batches": (19, 5), "operands": torch.bfloat16, "centers": 2, "together": 2, "classes": 70}),
    (120, {"update": "nesterov", "dtype": torch.float16, "operands": torch.float16, "sampled": True}),
    (120, {"dtype": torch.bfloat16, "operands": torch.bfloat16, "dim": 64}),
    (80, {"update": "dampening", "batches": (3, 3, 3)}),
]


@pytest.mark.parametrize(
    "arch, options",
    [pytest.param(*case, marks=pytest.mark.slow if n > 1 else (), id=str(n)) for n, case in enumerate(STEPS)],
)
def test_numbers(arch, options):
    step = draw(**SMALL | options)
    with emulated(arch, chunk=128):
        got = step.take()
    with simulated(chunk=128):
        check(step, got)


def mutated(arch, dtype=torch.float32):
    found = {}
    step = draw(**SMALL, dtype=dtype, operands=torch.bfloat16)
    with emulated(arch, mutating(found, ("update_weights", "count_steps"))):
        step.take()
    with emulated(arch, mutating(found, ("update_rows",))):
        zeros = State(*(torch.zeros_like(t) for t in step.state))
        cuda.update_rows(step.w, zeros, None, torch.ones_like(step.w), UPDATES["adamw"])
    assert set(found) == {"count_steps", "update_weights", "update_rows"}
    return found


def test_mutants_of_the_updates():
    check_mutants(mutated(80), 80, "bf16", recorded=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch, mode", [(80, "bf16"), (120, "bf16_weight")])
def test_mutants(arch, mode):
    check_mutants(mutated(arch, torch.bfloat16 if "weight" in mode else torch.float32), arch, mode)
