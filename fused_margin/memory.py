"""Memory that goes from one step to the next: fresh pages from the system would take much of a step's time."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

SMALL = 2**18  # bytes: below, a few fresh pages cost less than what is done here
SPARE = 2**22  # bytes of blocks that are held for each use, and beside them one that is larger

# Not shared memory, which mmap gives otherwise: it has no huge pages, and a container's limit of its own.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# For each use what was given back, the last one last; larger blocks apart, so that a small head leaves them alone.
_spare: dict[tuple[str, bool], list[mmap.mmap]] = {}


def numbers(count: int, dtype: torch.dtype, use: str) -> Tensor:
    """An uninitialised tensor [count] on the CPU; its memory comes back when no tensor shares it any more.

    Then it is held for the next tensor with the same `use` and size.
    """
    size = count * dtype.itemsize
    if size < SMALL:
        return torch.empty(count, dtype=dtype, device="cpu")
    spare = _held(use, size)
    block = _take(spare, size)
    if block is None:
        if size > SPARE:
            spare.clear()  # before the new one comes
        try:
            block = mmap.mmap(-1, size, **_PRIVATE)
        except OSError as error:
            raise MemoryError(
                f"no memory for {use} of {size / 2**20:,.0f} MiB ({error}); expected that much to be free"
            ) from error
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
    spare = _held(use, len(block))
    spare.append(block)
    while len(spare) > 1 and sum(map(len, spare)) > SPARE:
        del spare[:1]


def _held(use: str, size: int) -> list[mmap.mmap]:
    return _spare.setdefault((use, size > SPARE), [])


def _take(spare: list[mmap.mmap], size: int) -> mmap.mmap | None:
    # Another block may come back meanwhile, in this thread or in another, and push this one out.
    for block in reversed(spare):
        if len(block) == size:
            with contextlib.suppress(ValueError):
                spare.remove(block)
                return block
    return None
