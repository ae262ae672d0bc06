"""Softmax with nothing or a constant taken from the target's cosine. T = c, T = c - m"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .base import Margin
from .checks import GRADIENTS, choice, parameter
from .parameters import RowParameter


@dataclass(frozen=True, eq=False)
class NormFace(Margin):
    """No margin: the normalised softmax.

    Equivalent to: `T = c`
    Source: Wang et al. 2017, NormFace (arXiv 1704.06369); also called NSL and COCO. With normalisation off, scale 1 and
    a bias it is the plain softmax.
    """

    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return cos_y


@dataclass(frozen=True, eq=False)
class CosFace(Margin):
    """Additive cosine margin.

    Equivalent to: `T = c - m`
    Args: m in cosine units (default 0.35): a float, [C] per class or [B] per sample, with gradient if it asks for one.
        m < 0 is allowed and favours the target, which few-shot learning does (arXiv 2003.12060). On cosines |m| <= 2.
    Source: Wang et al. 2018, CosFace (arXiv 1801.09414) eq. 4; Wang et al. 2018, AM-Softmax (arXiv 1801.05599).
    """

    m: RowParameter = 0.35
    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        parameter("m", self.m)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return cos_y - self.m
