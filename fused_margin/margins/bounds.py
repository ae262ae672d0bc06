"""Losses that stop or reweigh cosines at a bound: what is good enough moves no further.

EqM: T = min(c, t1) - offset, N = max(c, t2)     filter: N = 0 above a threshold     circle: both weighted
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..rules import Rule
from .angular import ArcFace
from .base import Margin, Wrapper
from .checks import GRADIENTS, choice, scalar


@dataclass(frozen=True, eq=False)
class EqM(Margin):
    """Equalized margin: targets are pulled up to t1 only, rivals pushed down to t2 only.

    Equivalent to: `T = min(c, t1) - offset`, `N = max(c, t2)`, that is for the default offset t1 - t2
    `log(1 + sum_j exp(s (relu(t1 - c_y) + relu(c_j - t2))))`. At equality the slopes are 0. The smallest value is
    log C, not 0; a row with c_y >= t1 and no rival above t2 has gradient 0.

    Certain (the abstract, and a review's summary of eqs. 7-18): both bounds, the difference t1 - t2 as an offset, W_y
    is updated only while c_y < t1 and W_j only while c_j > t2, steady as the scale varies. Inferred: the exact form of
    eq. 7. offset=0 is the other reading of it; a toy run spoke for t1 - t2, as offset=0 depends on the scale.
    Args: -1 <= t2 < t1 <= 1 (the paper's values are unknown; ours are 0.75 and 0.25), offset in [0, 2]: None
        for t1 - t2; each a float or a 0-dim tensor, which may change during a training.
    Source: Sun et al. 2020, An Equalized Margin Loss for Face Recognition (IEEE TMM, DOI 10.1109/TMM.2020.2966863; UCL
    Discovery 10089852 is an open copy, which was not read for this).
    """

    t1: float | Tensor = 0.75
    t2: float | Tensor = 0.25
    offset: float | Tensor | None = None
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("t1", "t2", "offset"):
            if getattr(self, name) is not None:
                scalar(name, getattr(self, name), *((-1, 1) if name != "offset" else (0, 2)))
        if not isinstance(self.t1, Tensor) and not isinstance(self.t2, Tensor) and self.t2 >= self.t1:
            raise ValueError(
                f"t1 = {self.t1!r}, t2 = {self.t2!r}; expected t2 < t1: t1 is the bound of the targets' cosines from "
                "below, t2 that of the rivals' from above"
            )
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        offset = self.t1 - self.t2 if self.offset is None else self.offset
        return torch.where(cos_y < self.t1, cos_y, self.t1) - offset

    def rule(self) -> Rule:
        return Rule("clip", (self.t2, math.inf))


@dataclass(frozen=True, eq=False)
class InterclassFilter(Wrapper):
    """Rivals that are too similar are taken for mislabelled, and dropped: logit 0, gradient 0.

    Equivalent to: `T = base's T`, `N = 0 where c > above, else c`
    Args: above in (0, 1] (default 0.4), a float or a 0-dim tensor; base: any margin without a rival rule (ArcFace).
    Source: InsightFace arcface_torch, `interclass_filtering_threshold` (An et al. 2022, arXiv 2203.15565).
    """

    above: float | Tensor = 0.4
    base: Margin = field(default_factory=ArcFace)
    gradient: str | None = field(default=None, kw_only=True)  # None: the base's
    additive: ClassVar[bool] = False
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        scalar("above", self.above, 1e-6, 1, "below 0 it would drop rivals that are far away")
        self._take_base()

    def rule(self) -> Rule:
        return Rule("filter", (self.above,))


@dataclass(frozen=True, eq=False)
class CircleLoss(Margin):
    """Circle loss at class level: each cosine weighted by its distance from its optimum.

    Equivalent to: `T = relu(1 + m - c) (c - (1 - m))`, `N = relu(c + m) (c - m)`, both weights constants in
    the gradient.
    Args: m in [0, 1] (default 0.25), a float or a 0-dim tensor. The scale is the paper's gamma, 256 there.
    Source: Sun et al. 2020, Circle loss (arXiv 2002.10857), with class-level labels.
    """

    m: float | Tensor = 0.25
    gradient: str = field(default="exact", kw_only=True)
    default_scale: ClassVar[float] = 256.0
    additive: ClassVar[bool] = False
    constants: ClassVar[bool] = True

    def __post_init__(self) -> None:
        scalar("m", self.m, 0, 1)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return torch.relu(1 + self.m - cos_y).detach() * (cos_y - (1 - self.m))

    def rule(self) -> Rule:
        return Rule("circle", (self.m,))
