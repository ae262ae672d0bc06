"""The AMX build of the sweep on a CPU that has AVX-512 with bfloat16 only: `tile_registers.h` stands in for AMX.

It is the same source, compiled with the tile instructions in software: numbers, order and memory are those of the real
ones, their time is not.
"""

from __future__ import annotations

from pathlib import Path

from fused_margin.backends import cpu

HEADER = Path(__file__).parent / "tile_registers.h"
BUILD = {"CFLAGS": f"-include {HEADER}", "FUSED_MARGIN_CUDA": "0"}  # environment of a build with it


def _runs(capability: str) -> bool:
    try:
        with cpu.capability(capability):
            return True
    except (RuntimeError, ValueError):  # the extension is not built; this CPU lacks it
        return False


def why_not() -> str:
    """Why that is not possible here, or not needed; "" if it is."""
    if not _runs("avx512_bf16"):
        return "the AMX build needs AVX-512 with bfloat16 beside AMX, and this CPU lacks them"
    if _runs("amx"):
        return "this CPU has AMX, so that the suite runs that build as it is"
    return ""
