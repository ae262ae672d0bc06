"""Losses whose rivals need an angle for every element, or no log-sum-exp: on the reference backend only.

`fm.why_not("cpu", margin)` names the rule that kernels lack. Where only the target changes (rivals="cosine", kind
"cosine", versions 0 and 1) they run on every backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..angles import safe_angle
from ..rules import IDENTITY, Rule
from .angular import SphereFace, clamped_multiple
from .base import Margin, Outcome, RowStats
from .checks import GRADIENTS, choice, number, parameter, psi_factor, scalar
from .parameters import PerSample, RowParameter


@dataclass(frozen=True, eq=False)
class GASoftmax(Margin):
    """Generalized angular softmax: one falling function g of the angle for all classes, the margin inside the target's.

    Equivalent to: `T = g(m theta)`, `N = g(theta)`, where g is, by `kind`,
    linear: `1 - 2 theta / pi` | cosine: `cos` continued to fall (psi of `SphereFace`, so that N = c) |
    sigmoid: `A (1 - e) / (1 + e)`, `e = exp(theta / k - h)`, `A = (1 + exp(-h)) / (1 - exp(-h))`, `h = pi / (2 k)`.
    Args: m >= 1 (1.5), for cosine at most 64; k in [1e-3, 1e3] for sigmoid (0.5). Linear and sigmoid have no kernel.
    Source: Liu et al. 2017, Deep Hyperspherical Learning (arXiv 1711.03189); scale="norm" there, 30 in OpenSphere,
    whose code leaves the factor m out of the gradient.
    """

    kind: str = "linear"
    m: RowParameter = 1.5
    k: float | Tensor = 0.5
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    default_scale: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("linear", "cosine", "sigmoid"))
        parameter("m", self.m, 1, math.inf, "for m < 1 the target would be favoured")
        if self.kind == "cosine":
            psi_factor("m", self.m)
        scalar("k", self.k, 1e-3, 1e3)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        if self.kind == "cosine":
            return SphereFace(self.m).target(cos_y)
        angle = self.m * safe_angle(cos_y)
        if self.kind == "linear":
            return 1 - 2 * angle / math.pi
        edge = math.pi / (4 * self.k)
        edge = torch.tanh(edge) if isinstance(edge, Tensor) else math.tanh(edge)
        return torch.tanh((math.pi / 2 - angle) / (2 * self.k)) / edge

    def rule(self) -> Rule:
        rules = {"linear": Rule("angle", (1.0, -2 / math.pi, 0.0)), "sigmoid": Rule("angle_sigmoid", (self.k,))}
        return rules.get(self.kind, IDENTITY)


@dataclass(frozen=True, eq=False)
class LiArcFace(Margin):
    """A logit that is linear in the angle (AirFace).

    Equivalent to: `T = 1 - 2 (theta + m) / pi`, `N = 1 - 2 theta / pi` (rivals "angle", no kernel) or c ("cosine").
    Args: m >= 0 in radians (0.45).
    Source: Li et al. 2019, AirFace (arXiv 1907.12256); s = 64.
    """

    m: RowParameter = 0.45
    rivals: str = "angle"
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parameter("m", self.m, 0, math.pi)
        choice("rivals", self.rivals, ("angle", "cosine"))
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return 1 - 2 * (safe_angle(cos_y) + self.m) / math.pi

    def rule(self) -> Rule:
        return Rule("angle", (1.0, -2 / math.pi, 0.0)) if self.rivals == "angle" else IDENTITY


@dataclass(frozen=True, eq=False)
class QAMFace(Margin):
    """Quadratic additive angular margin; no kernel.

    Equivalent to: `T = (2 pi - theta - m)^2`, `N = (2 pi - theta)^2`
    Args: m in radians in [0, pi] (0.5: beyond pi T would rise with the angle).
    Source: Zhao et al. 2020, QAMFace (ICIP 2020), formula and defaults from its code; s = 6, logits reach 39.5 s.
    """

    m: RowParameter = 0.5
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    default_scale: ClassVar[float] = 6.0

    def __post_init__(self) -> None:
        parameter("m", self.m, 0, math.pi)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return (2 * math.pi - safe_angle(cos_y) - self.m) ** 2

    def rule(self) -> Rule:
        return Rule("angle", (4 * math.pi**2, -4 * math.pi, 1.0))


@dataclass(frozen=True, eq=False)
class SphereFaceR(Margin):
    """SphereFace revived: a multiplicative margin in three versions and three treatments of the norm.

    Equivalent to: version 0: `T = psi(m theta)` | 1: `T = cos(min(m theta, pi))`, both with N = c |
    2: `T = c`, `N = cos(theta / m)` (no kernel).
    norm "hard": `loss = weight / s CE` with a fixed s (30), or plain CE without a weight | "none": CE with s = |x|,
    which is `scale="norm"` | "soft": the same and `pull | |x| - length |`.
    Args: m >= 1 (1.4), in version 0 at most 64; weight > 0 of "hard" (None; OpenSphere has 50), pull >= 0 (0.01),
        length (30).
    Source: Liu et al. 2022, SphereFace Revived (arXiv 2109.05565), OpenSphere, which takes gradient="detached".
    """

    m: RowParameter = 1.4
    version: int = 2
    norm: str = "hard"
    weight: float | None = None
    pull: float = 0.01
    length: float = 30.0
    norms: PerSample | None = field(default=None, init=False, repr=False)
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parameter("m", self.m, 1)
        if self.version not in (0, 1, 2):
            raise ValueError(f"version = {self.version!r}; expected 0, 1 or 2")
        if self.version == 0:
            psi_factor("m", self.m)
        if self.version == 2:
            scalar("m", self.m, 1)
        choice("norm", self.norm, ("hard", "none", "soft"))
        if self.weight is not None:
            number("weight", self.weight, 1e-9)
            if self.norm != "hard":
                raise ValueError(f"weight = {self.weight!r} with norm={self.norm!r}; it belongs to norm='hard' only")
        number("pull", self.pull, 0)
        number("length", self.length, 1e-9)
        choice("gradient", self.gradient, GRADIENTS)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("norm",) if self.norm == "soft" else ()

    @property
    def default_scale(self) -> float | str:
        return "norm" if self.norm_as_scale else 30.0

    @property
    def norm_as_scale(self) -> bool:
        return self.norm != "hard"

    def prepare(self, rows: RowStats, labels: Tensor) -> SphereFaceR:
        return self if rows.norm is None else self.replaced(norms=PerSample(rows.norm))

    def target(self, cos_y: Tensor) -> Tensor:
        if self.version == 2:
            return cos_y
        return SphereFace(self.m).target(cos_y) if self.version == 0 else clamped_multiple(cos_y, self.m)

    def rule(self) -> Rule:
        return Rule("angle_fraction", (self.m,)) if self.version == 2 else IDENTITY

    def row_loss(self, out: Outcome) -> Tensor:
        return self.row_factor(out) * super().row_loss(out)

    def row_factor(self, out: Outcome) -> Tensor | float:
        return 1.0 if self.weight is None else self.weight / out.scale

    def penalty(self) -> Tensor | float:
        return self.pull * (self.norms - self.length).abs() if self.norm == "soft" else 0.0


@dataclass(frozen=True, eq=False)
class SFace(Margin):
    """Sigmoid-constrained gradients: cosines are pulled and pushed directly, each as far as its sigmoid says.

    Equivalent to: `loss = s (sum_j r_j c_j - r_y c_y)`, `r_y = sigmoid(k (theta_y - a))`,
    `r_j = sigmoid(-k (theta_j - b))`, both constants in the gradient. No softmax, and no kernel.
    Args: k > 0 (80), a, b in radians (0.8, 1.23).
    Source: Zhong et al. 2021, SFace (IEEE TIP, arXiv 2205.12010) and its code; s = 64.
    """

    k: float | Tensor = 80.0
    a: float | Tensor = 0.8
    b: float | Tensor = 1.23
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    constants: ClassVar[bool] = True
    softmax: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("sum_u",)

    def __post_init__(self) -> None:
        for name, low, high in (("k", 1e-6, 1e6), ("a", 0, math.pi), ("b", 0, math.pi)):
            scalar(name, getattr(self, name), low, high)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return torch.sigmoid(self.k * (safe_angle(cos_y.detach()) - self.a)) * cos_y

    def rule(self) -> Rule:
        return Rule("sigmoid_weight", (self.k, self.b))

    def row_loss(self, out: Outcome) -> Tensor:
        return out.sum_u - out.z


@dataclass(frozen=True, eq=False)
class P2SGrad(Margin):
    """The mean squared error of the cosines to one-hot, whose gradient is that of P2SGrad; no kernel.

    Equivalent to: `loss = s / 2 ((1 - c_y)^2 + sum_j c_j^2)`, so that d loss / d c_y = s (c_y - 1), d / d c_j = s c_j.
    Source: Zhang et al. 2019, P2SGrad (arXiv 1905.02479), which gives the gradient; as a squared error in Wang's NII
    scripts and in pytorch-metric-learning, whose mean is over B x C. s = 1.
    """

    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    softmax: ClassVar[bool] = False
    default_scale: ClassVar[float] = 1.0
    needs: ClassVar[tuple[str, ...]] = ("sum_u",)

    def __post_init__(self) -> None:
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return -((1 - cos_y) ** 2) / 2

    def rule(self) -> Rule:
        return Rule("square")

    def row_loss(self, out: Outcome) -> Tensor:
        return out.sum_u - out.z
