"""How the kernels are cut on each architecture: one record each. Nothing is tuned at run time unless the environment
variable FUSED_MARGIN_TRITON_TUNE=1 asks for it, see tune.py.

Not measured on any device: chosen so that the compiler spills no register and shared memory suffices, see docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    rows: int  # of x
    slots: int  # rows of w
    warps: int
    stages: int


class Cut(NamedTuple):
    """For one width of the operands. The depth is one, so that both directions see the same bits of a cosine."""

    sweep: Tile  # log-sum-exp only
    gradient: Tile
    flash: Tile  # with O by online softmax
    depth: int  # of D, at a time
    flash_width: int  # the largest D, rounded up to a power of two, for which the flash form is taken


class Device(NamedTuple):
    half: Cut  # operands of 16 bit
    full: Cut  # of 32 bit
    precision: str  # of products of float32 operands, see PRECISIONS
    programs: (
        int  # at one time, which sets the number of splits; a constant, so that equal architectures get equal bits
    )
    chunk_bytes: int  # of G, and of a step's products, so that they stay in the L2 cache beside the rows of w
    ranged_depth: int = 0  # in place of half's, if not 0, for fp16 operands made of wider weights: see tile.cosines


PRECISIONS = ("ieee", "tf32x3", "tf32")  # the last one, wrong by 2.5e-2 in a log-sum-exp at s = 64, only on request
_MIB = 2**20


def _cut(tile: Tile, depth: int, flash: Tile, flash_width: int) -> Cut:
    return Cut(tile, tile, flash, depth, flash_width)


_FLASH, _NONE = Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)
_HALF = _cut(Tile(128, 128, 8, 3), 32, _FLASH, 256)
_FULL = _cut(Tile(128, 64, 8, 2), 32, _NONE, 0)
DEVICES: dict[str, Device] = {
    "cuda80": Device(_HALF, _FULL, "tf32x3", programs=108, chunk_bytes=12 * _MIB),
    "cuda90": Device(_cut(Tile(128, 128, 8, 3), 64, _FLASH, 256), _FULL, "tf32x3", 132, 16 * _MIB),
    "cuda100": Device(_cut(Tile(128, 128, 8, 3), 64, _FLASH, 256), _FULL, "tf32x3", 148, 32 * _MIB, ranged_depth=32),
    "cuda120": Device(_HALF, _FULL, "tf32x3", 170, 32 * _MIB),
    "hip": Device(_HALF, _cut(Tile(64, 64, 8, 2), 32, _NONE, 0), "ieee", 304, 32 * _MIB),
    "interpreter": Device(*2 * (_cut(Tile(32, 64, 4, 1), 64, Tile(32, 64, 4, 1), 128),), "ieee", 4, _MIB),
}

_override: list[Device] = []


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, as it reads its environment."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@contextlib.contextmanager
def use(device: Device) -> Iterator[None]:
    """Within the block, this record stands for every architecture: for tests and experiments."""
    _override.append(device)
    try:
        yield
    finally:
        _override.pop()


def device_for(x: torch.Tensor) -> Device:
    """The record of the device that x is on, with the precision that FUSED_MARGIN_TRITON_PRECISION asks for."""
    device, asked = _device_for(x), os.environ.get("FUSED_MARGIN_TRITON_PRECISION", "")
    if asked and asked not in PRECISIONS:
        raise ValueError(f"FUSED_MARGIN_TRITON_PRECISION = {asked!r}; expected one of {PRECISIONS}")
    return device._replace(precision=asked) if asked else device


def _device_for(x: torch.Tensor) -> Device:
    """That of its architecture, or of the nearest older one."""
    if _override:
        return _override[-1]
    if x.device.type == "cpu" and interpreted():
        return DEVICES["interpreter"]
    backend, arch = _architecture(x)
    if backend != "cuda":
        return DEVICES["hip"]
    older = [int(name[4:]) for name in DEVICES if name.startswith("cuda") and int(name[4:]) <= arch]
    return DEVICES[f"cuda{max(older, default=80)}"]


def _architecture(x: torch.Tensor) -> tuple[str, int]:
    if x.device.type == "cuda":
        if torch.version.hip:
            return "hip", 0
        major, minor = torch.cuda.get_device_capability(x.device)
        return "cuda", 10 * major + minor
    from triton.runtime import driver  # CPU tensors under a driver that only compiles, or emulates

    target = driver.active.get_current_target()
    return target.backend, target.arch if target.backend == "cuda" else 0
