"""The angle of a cosine, and its sine, with slopes that stay finite at c = +-1; the softplus of a logit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SINE_FLOOR = 1e-3  # 1/sin(theta) is kept below 1000: cosines within 5e-7 of +-1, in every dtype


def _sine(c: Tensor) -> Tensor:
    return ((1 - c) * (1 + c)).clamp_min(0).sqrt()


def _with_slope(value: Tensor, slope: Tensor, c: Tensor) -> Tensor:
    """`value`, whose derivative with respect to `c` is `slope`; both were computed of c.detach()."""
    return torch.addcmul(value, slope, c - c.detach())


def safe_sine(c: Tensor) -> Tensor:
    """sin(acos(c)) for c in [-1, 1], with a finite gradient -c / max(sin, 1e-3) at c = +-1.

    Equivalent to: `torch.sqrt((1 - c) * (1 + c))`
    """
    at = c.detach()
    sine = _sine(at)
    return _with_slope(sine, -at / sine.clamp_min(SINE_FLOOR), c)


def safe_angle(c: Tensor) -> Tensor:
    """The angle theta = acos(c) in radians for c in [-1, 1], with a finite gradient -1 / max(sin, 1e-3) at c = +-1.

    Equivalent to: `torch.acos(c)`. Build margins of your own with it: `lambda c: torch.cos(fm.safe_angle(c) + 0.5)`.
    """
    at = c.detach()
    return _with_slope(torch.acos(at), -1 / _sine(at).clamp_min(SINE_FLOOR), c)


def softplus(u: Tensor) -> Tensor:
    """log(1 + exp(u)), right at every u: beyond 80 it is u to the last bit, in float64 too.

    Equivalent to: `-F.logsigmoid(-u)`, which opens a parallel region for a vector of any length.
    """
    return F.softplus(u, threshold=80)
