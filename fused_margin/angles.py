"""The angle of a cosine, and its sine, with slopes that stay finite at c = +-1."""

from __future__ import annotations

import torch
from torch import Tensor

SINE_FLOOR = 1e-3  # 1/sin(theta) is kept below 1000: cosines within 5e-7 of +-1, in every dtype


def _with_slope(value: Tensor, slope: Tensor, c: Tensor) -> Tensor:
    """`value`, whose derivative with respect to `c` is `slope`."""
    return value.detach() + slope.detach() * (c - c.detach())


def safe_sine(c: Tensor) -> Tensor:
    """sin(acos(c)) for c in [-1, 1], with a finite gradient -c / max(sin, 1e-3) at c = +-1.

    Equivalent to: `torch.sqrt((1 - c) * (1 + c))`
    """
    sine = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    return _with_slope(sine, -c / sine.clamp_min(SINE_FLOOR), c)


def safe_angle(c: Tensor) -> Tensor:
    """The angle theta = acos(c) in radians for c in [-1, 1], with a finite gradient -1 / max(sin, 1e-3) at c = +-1.

    Equivalent to: `torch.acos(c)`. Build margins of your own with it: `lambda c: torch.cos(fm.safe_angle(c) + 0.5)`.
    """
    sine = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    return _with_slope(torch.acos(c), -1 / sine.clamp_min(SINE_FLOOR), c)
