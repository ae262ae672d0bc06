"""Losses that push the hard rivals: N differs from c where a rival comes closer than the target, or by how close."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from ..angles import safe_sine
from ..rules import Rule
from .angular import ArcFace, largest
from .base import Margin, RowStats, StatefulMargin, Wrapper, cos_of, sin_of
from .checks import GRADIENTS, choice, number, parameter, scalar, without_gradient
from .parameters import RowParameter
from .softmax import NormFace


def turned(c: Tensor, m: float | Tensor) -> Tensor:
    """cos(theta + m), also where that angle passes pi."""
    return c * cos_of(m) - safe_sine(c) * sin_of(m)


@dataclass(frozen=True, eq=False)
class SVSoftmax(Wrapper):
    """Support-vector softmax: rivals that come closer than the target are pushed harder.

    Equivalent to: `T = base's T` and `N = t c + t - 1 where c > T(cos_y), else c`. Without a base it is SV-Softmax;
    with one, SV-X-Softmax. The mask carries no gradient; t = 1 masks nothing.
    Args: t >= 1 (default 1.2; the paper finds that t > 1.4 may not converge): a float or a 0-dim tensor. base: any
        margin without a rival rule, also one with a state or with a margin for each sample: T(cos_y), and so the mask,
        is that of the row. With AdaFace the rivals' clip at +-(1 - eps), a guard, gives way to N.
    Source: Wang et al. 2018, Support Vector Guided Softmax Loss (arXiv 1812.11317) eqs. 5-7, 12, 13; s = 30 there.
    """

    t: float | Tensor = 1.2
    base: Margin = field(default_factory=NormFace)
    gradient: str | None = field(default=None, kw_only=True)  # None: the base's
    additive: ClassVar[bool] = False  # N's t - 1 is one of cosines
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        scalar("t", self.t, 1)
        self._take_base()

    @property
    def default_scale(self) -> float | str:
        return "norm" if self.base.norm_as_scale else 30.0

    def rule(self) -> Rule:
        return Rule("hard", (self.t, self.t - 1))

    def threshold(self, cos_y: Tensor) -> Tensor:
        return self.base.target(cos_y)


@dataclass(frozen=True, eq=False)
class MVSoftmax(Margin):
    """Mis-classified vector softmax: SV-Softmax as its AAAI version and its code have it.

    Equivalent to: `f = c - m` (kind "am") or `cos(theta + m)` ("arc"); `T = f`, or c on the easy side;
    `N = (t + 1) c + t` (mode "adaptive") or `c + t` ("fixed") where `c_j > f(cos_y)`, else c.
    Args: m (default 0.35), t >= 0 (default 0.2; that of SV-Softmax is 1 + t). easy: "zero" takes T = c where c <= 0
        (the authors' code), "margin" where c <= m (FaceX-Zoo), None nowhere; the mask uses f in any case.
    Source: Wang et al. 2020, MV-Softmax (arXiv 1912.00833) and its code; s = 32.
    """

    t: float | Tensor = 0.2
    m: RowParameter = 0.35
    kind: str = "am"
    mode: str = "adaptive"
    easy: str | None = "zero"
    gradient: str = field(default="exact", kw_only=True)
    default_scale: ClassVar[float] = 32.0
    additive: ClassVar[bool] = False
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        scalar("t", self.t, 0)
        choice("kind", self.kind, ("am", "arc"))
        choice("mode", self.mode, ("adaptive", "fixed"))
        choice("easy", self.easy, ("zero", "margin", None))
        parameter("m", self.m, 0, *largest("easy" if self.easy and self.kind == "arc" else None))
        choice("gradient", self.gradient, GRADIENTS)

    def threshold(self, cos_y: Tensor) -> Tensor:
        return cos_y - self.m if self.kind == "am" else turned(cos_y, self.m)

    def target(self, cos_y: Tensor) -> Tensor:
        value = self.threshold(cos_y)
        if self.easy is None:
            return value
        return torch.where(cos_y > (0 if self.easy == "zero" else self.m), value, cos_y)

    def rule(self) -> Rule:
        return Rule("hard", (self.t + 1, self.t) if self.mode == "adaptive" else (1.0, self.t))


@dataclass(frozen=True, eq=False)
class _Curricular(Margin):
    """CurricularFace with its t of one batch."""

    m: RowParameter
    t: float | Tensor
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    masked: ClassVar[bool] = True

    def target(self, cos_y: Tensor) -> Tensor:
        return ArcFace(self.m, "linear").target(cos_y)

    def threshold(self, cos_y: Tensor) -> Tensor:
        return turned(cos_y, self.m)

    def rule(self) -> Rule:
        return Rule("curricular", (self.t,))


class CurricularFace(StatefulMargin):
    """Adaptive curriculum: hard rivals count little at first, and more as the targets' cosines rise.

    Equivalent to: `T` of `ArcFace(m)`, `N = c (t + c) where c > cos(theta_y + m), else c`, and in training mode, before
    use, `t = (1 - rate) t + rate mean(cos_y)`, t a constant in the gradient.
    Args: m in radians in [0, pi] (default 0.5), a float or a 0-dim tensor; rate in [0, 1] (default 0.01). State: `t`, 0
        at first.
    Source: Huang et al. 2020, CurricularFace (arXiv 2004.00288) and its code; s = 64.
    """

    needs = ("cos_y",)
    additive = False
    masked = True

    def __init__(self, m: float | Tensor = 0.5, rate: float = 0.01, *, gradient: str = "exact") -> None:
        super().__init__(gradient)
        self.hold("m", m, 0, math.pi)
        number("rate", rate, 0, 1)
        self.rate = rate
        self.register_buffer("t", torch.zeros(()))

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        t = self.moved("t", rows.mean(rows.cos_y), self.rate, rows)
        return _Curricular(self.m, t, gradient=self.gradient)

    def extra_repr(self) -> str:
        return f"m={self.m}, rate={self.rate}"


@dataclass(frozen=True, eq=False)
class NPCFace(Margin):
    """Negative-positive cooperation: hard rivals are raised, and raise the margin of their row's target.

    Equivalent to: `N = t c + a where c > cos(theta_y + m), else c`; `T = cos(theta + m0 + m1 h)` where c > 0, else c;
    h = the mean cosine of the row's hard rivals (0 without one), a constant in the gradient.
    Args: m in radians in [0, pi]; m0, m1 >= 0, m0 + m1 <= pi / 2; t >= 1, a >= 0 (0.5, 0.4, 0.2, 1.1, 0.2).
    Source: Zeng et al. 2020, NPCFace (arXiv 2007.10172), as in FaceX-Zoo; s = 64.
    """

    m: RowParameter = 0.5
    m0: RowParameter = 0.4
    m1: RowParameter = 0.2
    t: float | Tensor = 1.1
    a: float | Tensor = 0.2
    hard_mean: Tensor | None = field(default=None, init=False, repr=False)
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    constants: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("hard_mean",)

    def __post_init__(self) -> None:
        parameter("m", self.m, 0, math.pi)
        without_gradient("m", self.m)  # it sets the mask only
        parameter("m0", self.m0, 0, *largest("easy"))
        end, why = largest("easy")
        left = end - self.m0 if isinstance(self.m0, Real) else end
        parameter("m1", self.m1, 0, left, f"m0 + m1 is a margin, and {why}")
        for name, low in (("t", 1), ("a", 0)):
            scalar(name, getattr(self, name), low)
        choice("gradient", self.gradient, GRADIENTS)

    def threshold(self, cos_y: Tensor) -> Tensor:
        return turned(cos_y, self.m)

    def rule(self) -> Rule:
        return Rule("hard", (self.t, self.a))

    def after(self, hard_mean: Tensor) -> NPCFace:
        return self.replaced(hard_mean=hard_mean)

    def target(self, cos_y: Tensor) -> Tensor:
        m = self.m0 if self.hard_mean is None else self.m0 + self.m1 * self.hard_mean
        return torch.where(cos_y > 0, turned(cos_y, m), cos_y)


@dataclass(frozen=True, eq=False)
class ArcNegFace(Margin):
    """Every rival is weighted by how near it is to the target's logit.

    Equivalent to: `T` of `ArcFace(m)`, `N = q c + q - 1`, `q = alpha exp(-(c - T)^2 / sigma)`, a constant in
    the gradient.
    Args: m in radians in [0, pi], alpha > 0, sigma > 0 (defaults 0.5, 1.2, 2).
    Source: Liu et al. 2019, Towards Flops-constrained Face Recognition (arXiv 1909.00632), as in FaceX-Zoo; s = 64.
    """

    m: RowParameter = 0.5
    alpha: float | Tensor = 1.2
    sigma: float | Tensor = 2.0
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    constants: ClassVar[bool] = True

    def __post_init__(self) -> None:
        parameter("m", self.m, 0, math.pi)
        for name in ("alpha", "sigma"):
            scalar(name, getattr(self, name), 1e-6, 1e6)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return ArcFace(self.m, "linear").target(cos_y)

    def threshold(self, cos_y: Tensor) -> Tensor:
        return self.target(cos_y)

    def rule(self) -> Rule:
        return Rule("gauss", (self.alpha, self.sigma))
