"""Runs PTX on numpy: the code that Triton and nvcc really emit, executed on a machine without a GPU.

One thread block after another; a register is a vector with one lane a thread. Knows what Triton and nvcc emit for
mma.sync (sm_75 to sm_89, sm_120) and wgmma (sm_90); anything else is refused by name. Global memory is the torch CPU
tensors passed in; shared memory starts as NaN; cp.async lands at its wait_group, wgmma too.
"""

from typing import NamedTuple

import numpy as np

from .block import Block
from .formats import TYPES, PTXError
from .memory import Buffer, buffer_of
from .parse import Kernel

__all__ = ["Counts", "Kernel", "PTXError", "launch"]


class Counts(NamedTuple):
    """What a launch did."""

    instructions: int  # counted per block
    flops: int  # of tensor-core instructions
    read: int  # different bytes of global memory
    written: int


def _scalar(v, ty):
    dtype = np.dtype(TYPES[ty])
    return dtype.type(v if dtype.kind == "f" else int(v) & (1 << 8 * dtype.itemsize) - 1).tobytes()


def launch(ptx, grid, threads, args, smem=0, name=None, more_buffers=(), **options):
    """Run a kernel on torch CPU tensors (written in place) and Python scalars, given in PTX parameter order.

    ptx: text or Kernel; grid, threads: int or tuple; smem: dynamic shared bytes. Missing trailing pointers are null.
    A struct comes as its bytes, and what it points to as more_buffers: (address, array of bytes) each.
    check_races=False; truncates=True: tensor cores cut off what sums have beyond float32. Raises PTXError.
    """
    kernel = ptx if isinstance(ptx, Kernel) else Kernel(ptx, name)
    grid, threads = (((n,) if isinstance(n, int) else tuple(n)) + (1, 1) for n in (grid, threads))
    params, buffers = {}, [Buffer(table.ctypes.data, table) for table in kernel.tables.values()]
    for (param, ty, size), v in zip(kernel.params, [*args, *[0] * (len(kernel.params) - len(args))], strict=True):
        if hasattr(v, "data_ptr"):
            if v.numel():
                buffers.append(Buffer(*buffer_of(v)))
            v = v.data_ptr()
        params[param] = np.frombuffer(v if ty is None else _scalar(v, ty), np.uint8)
        if len(params[param]) != size:
            raise PTXError(f"{param} is {len(params[param])} bytes; the kernel takes {size}")
    buffers += [Buffer(*memory) for memory in more_buffers]
    instructions = flops = 0
    for z, y, x in np.ndindex(grid[2], grid[1], grid[0]):
        block = Block(kernel, threads[:3], smem, buffers, params, (x, y, z), grid, **options)
        block.run()
        instructions, flops = instructions + block.count, flops + block.flops
    read, written = (sum(int(b.touched(writing).sum()) for b in buffers) for writing in (False, True))
    return Counts(instructions, flops, read, written)
