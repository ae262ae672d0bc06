"""Memory that goes from one step to the next: fresh pages from the system would take much of a step's time."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

SMALL = 2**22  # bytes: below, the C library hands out what was freed before anyhow

# Not shared memory, which mmap gives otherwise: it has no huge pages, and a container's limit of its own.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_spare: dict[str, mmap.mmap] = {}  # for each use the last block that was given back


def numbers(count: int, dtype: torch.dtype, use: str) -> Tensor:
    """An uninitialised tensor [count] on the CPU; its memory comes back when no tensor shares it any more.

    Then it is held for the next tensor with the same `use` and size; of each use, one block.
    """
    size = count * dtype.itemsize
    if size < SMALL:
        return torch.empty(count, dtype=dtype, device="cpu")
    block = _spare.pop(use, None)
    if block is None or len(block) != size:
        block = None  # goes before the new one comes
        block = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a wish; some systems have no huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
    lent = (ctypes.c_char * size).from_buffer(block)  # the tensor holds it, it holds the block
    weakref.finalize(lent, _give_back, use, block).atexit = False
    return torch.frombuffer(lent, dtype=dtype)


def release() -> None:
    """Gives what is held for the next step back to the system."""
    _spare.clear()


def _give_back(use: str, block: mmap.mmap) -> None:
    _spare[use] = block
