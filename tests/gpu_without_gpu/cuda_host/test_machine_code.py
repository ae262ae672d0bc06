"""The shipped machine code of the CUDA C++ kernels, held to a budget on each architecture.

Nothing is spilled, the sweeps use tensor cores and 128-bit loads, and at least one block fits a multiprocessor; the
optimizers' kernels, which wait for memory, leave room for many warps.
"""

import pytest
import torch

from fused_margin.spec import Want
from fused_margin.update_rules import OPTIMIZERS

from ..proof import record
from . import machine_code
from .backend import emulated
from .test_sweep_numbers import sweep

SWEEPS = ("forward", "gradient")
UPDATES = (*(f"{name}<{by}>" for name in ("update_weights", "update_rows") for by in OPTIMIZERS), "count_steps")
MOST_REGISTERS = 96  # of a kernel that waits for memory: 20 warps on a multiprocessor
pytestmark = pytest.mark.slow  # a minute, to disassemble the library

CALLS = {"loss": 40, "prologue": 40}  # bytes a thread that libdevice's slow path of sin and cos keeps on the stack


@pytest.fixture(scope="module")
def rows():
    if reason := machine_code.why_not():
        pytest.skip(reason)
    return machine_code.rows()


@pytest.fixture(scope="module")
def shared():
    """{kernel: bytes of dynamic shared memory}, the most over the dtypes of weights, as the launches ask for it."""
    found = {}

    def run(name, text, grid, threads, argument, smem, buffers):
        kernel = machine_code.short(name)
        assert threads <= machine_code.THREADS_OF_BLOCK
        found[kernel] = max(smem, found.get(kernel, 0))

    for operands in (torch.float32, torch.bfloat16, torch.float16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rule in ("identity", "hard"):
                s = sweep(rule, operands, bias=False)
                s.leaves["w"] = s.leaves["w"].detach().to(dtype).requires_grad_()
                s.leaves["scale"] = s.leaves["scale"].detach()  # its gradient takes another variant of the kernel
                with emulated(None, run):
                    red, *_ = s.run("cuda", compute_dtype=operands, want=int(Want.DX))
                    red.sum().backward()
    return found


def test_every_architecture_is_there(rows):
    assert {row.arch for row in rows} == set(machine_code.MACHINES)


@pytest.mark.usefixtures("rows")
def test_ptx_of_the_oldest():
    """So that it runs on what has no code of its own, such as capability 11.0."""
    assert machine_code.ptx() == {"sm_80"}


def test_budget(rows, shared):
    assert {row.kernel for row in rows} >= set(UPDATES)
    for row in rows:
        of_block = shared.get(row.kernel, 0)
        fits = machine_code.blocks(row, of_block)
        if row.kernel.startswith(SWEEPS) or row.kernel in UPDATES:
            memory = f"{of_block / 1024:.0f} of {machine_code.MACHINES[row.arch][3]} KB"
            shown = {"device": row.arch, "kernel": f"`{row.kernel}`", "registers": row.registers, "stack": row.stack}
            shown |= {"shared": memory, "blocks on a multiprocessor": fits}
            record("cuda_resources", shown | {"HMMA": row.tensor_ops, "128-bit loads": row.wide_loads})
        if row.kernel in UPDATES:
            assert row.registers <= MOST_REGISTERS, row
        if row.kernel.startswith(SWEEPS):
            assert of_block, row
            assert row.tensor_ops > 0, row
            assert row.wide_loads > 0, row
        allowed = CALLS.get(row.kernel, 0)
        assert row.stack <= allowed, row
        assert of_block <= machine_code.MACHINES[row.arch][3] * 1024, row
        assert fits >= 1, row
