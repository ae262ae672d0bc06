"""Margins on the angle. T = cos(theta + m), psi(m theta), cos(m1 theta + m2) - m3, and other functions of theta"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from ..angles import safe_angle, safe_sine
from ..spec import EPS
from .base import Margin, RowStats, Wrapper, cos_of, sin_of
from .checks import GRADIENTS, choice, parameter, psi_factor, scalar
from .parameters import PerClass, PerSample, RowParameter

TAILS = ("raw", "linear", "continuous", "clamp", "easy")
LARGEST_DEGREE = 16  # of psi's polynomial for whole m; beyond, and between, psi takes the angle


@dataclass(frozen=True, eq=False)
class ArcFace(Margin):
    """Additive angular margin.

    Equivalent to: `T = cos(theta + m)`, theta = acos(c), and for theta + m > pi the tail:
    raw: cos(theta + m) | linear (default): c - m sin m | continuous: c - (1 - cos m) | clamp: -1
    | easy: cos(theta + m) where c > 0, else c.
    Args: m in radians, 0 <= m <= pi (default 0.5): a float, [C] per class or [B] per sample, with gradient if asked.
    Source: Deng et al. 2019, ArcFace (arXiv 1801.07698) eq. 3; tails as in InsightFace, WeSpeaker and OpenSphere.
    """

    m: RowParameter = 0.5
    tail: str = "linear"
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        choice("tail", self.tail, TAILS)
        parameter("m", self.m, 0, *largest(self.tail))
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        cos_m, sin_m = cos_of(self.m), sin_of(self.m)
        beyond = cos_y < -cos_m  # theta + m > pi
        return _tail(self.tail, cos_y, cos_y * cos_m - safe_sine(cos_y) * sin_m, beyond, -cos_m, self.m * sin_m)


def largest(tail: str | None) -> tuple[float, str]:
    """The largest margin in radians, and why."""
    return (math.pi / 2, "beyond pi / 2 the easy margin's T rises with the angle") if tail == "easy" else (math.pi, "")


def _tail(tail: str, c: Tensor, value: Tensor, beyond: Tensor, joint: float | Tensor, drop: float | Tensor) -> Tensor:
    """T past the angle where the margin's cosine would turn; `joint` is the cosine at which it does."""
    if tail == "raw":
        return value
    if tail == "easy":
        return torch.where(c > 0, value, c)
    if tail == "clamp":
        return torch.where(beyond, -1.0, value)
    return torch.where(beyond, c - drop if tail == "linear" else c - joint - 1, value)


def multiple_angle(c: Tensor, m: int) -> Tensor:
    """cos(m * acos(c)) as the Chebyshev polynomial T_m: no acos, so no singular slope at c = +-1."""
    previous, current = torch.ones_like(c), c
    for _ in range(m - 1):
        previous, current = current, 2 * c * current - previous
    return current


@dataclass(frozen=True, eq=False)
class SphereFace(Margin):
    """Multiplicative angular margin, made monotone.

    Equivalent to: `T = psi(theta) = (-1)^k cos(m theta) - 2 k`, k = floor(m theta / pi). An integer m (int or a whole
    float) is computed as a polynomial in c, without acos; any other m, and a tensor, from the angle.
    Args: m in [1, 64] (default 1.7): a float, [C] per class or [B] per sample, with gradient if asked.
    Source: Liu et al. 2017, SphereFace (arXiv 1704.08063) eq. 7; real m as in SphereFace-R (arXiv 2109.05565).
    A-Softmax proper is `SphereFace(4)` with `scale="norm"`; else s = 30, as OpenSphere has it.
    """

    m: RowParameter = 1.7
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    default_scale: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        psi_factor("m", self.m)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        m = self.m
        if not isinstance(m, Tensor) and m == int(m) and m <= LARGEST_DEGREE:
            k = sum((cos_y <= math.cos(i * math.pi / m)).to(cos_y.dtype) for i in range(1, int(m)))
            k = k if isinstance(k, Tensor) else torch.zeros_like(cos_y)
            value = multiple_angle(cos_y, int(m))
        else:
            angle = safe_angle(cos_y)
            k = torch.floor((angle * m / math.pi).detach())
            value = torch.cos(angle * m)
        return (1 - 2 * (k % 2)) * value - 2 * k


@dataclass(frozen=True, eq=False)
class CombinedMargin(Margin):
    """The three margins in one formula.

    Equivalent to: `T = cos(m1 theta + m2) - m3`, and where m1 theta + m2 > pi the tail (names as in `ArcFace`; the
    default is "linear" for m1 = 1 and "continuous" otherwise, as the linear tail is a formula of m2 alone).
    Args: m1 >= 1 a factor, m2 in [0, pi] radians, m3 in cosine units; each a float, [C] per class or [B] per sample.
    Source: InsightFace's combined margin, Deng et al. 2019 (arXiv 1801.07698) eq. 4.
    """

    m1: RowParameter = 1.0
    m2: RowParameter = 0.3
    m3: RowParameter = 0.2
    tail: str | None = None
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parameter("m1", self.m1, 1)
        parameter("m2", self.m2, 0, math.pi)
        parameter("m3", self.m3, -2, 2, "two cosines differ by 2 at most")
        plain = not isinstance(self.m1, (Tensor, PerClass, PerSample)) and self.m1 == 1
        if self.tail is None:
            object.__setattr__(self, "tail", "linear" if plain else "continuous")
        choice("tail", self.tail, TAILS)
        if self.tail == "easy" and isinstance(self.m1, Real):
            parameter("m2", self.m2, 0, math.pi * (1 - self.m1 / 2), "where m1 theta + m2 > pi, T rises")
        if self.tail == "linear" and not plain:
            raise ValueError(f"tail='linear' is defined for m1 = 1, got m1 = {self.m1!r}; choose one of the others")
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        angle = safe_angle(cos_y)
        turned = angle * self.m1 + self.m2
        joint = cos_of((math.pi - self.m2) / self.m1)
        value = torch.cos(turned)
        return _tail(self.tail, cos_y, value, turned.detach() > math.pi, joint, self.m2 * sin_of(self.m2)) - self.m3


def clamped_multiple(c: Tensor, m: float | Tensor) -> Tensor:
    """cos(min(m theta, pi))."""
    angle = safe_angle(c) * m
    return torch.where(angle.detach() > math.pi, -1.0, torch.cos(angle))


@dataclass(frozen=True, eq=False)
class X2Softmax(Margin):
    """A parabola of the angle, which leaves the larger margin to classes that are farther apart; rivals stay cosines.

    Equivalent to: `T = a (theta - h)^2 + k`
    Args: a < 0, h <= 0 in radians (else T would not fall everywhere), k; the defaults -0.9, 0, 0.65 are those of the
        authors' script, the paper's own were not seen.
    Source: Xu et al. 2023, X2-Softmax (arXiv 2312.05281); its code takes gradient="detached".
    """

    a: RowParameter = -0.9
    h: RowParameter = 0.0
    k: RowParameter = 0.65
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parameter("a", self.a, -math.inf, -1e-9, "T must fall with the angle")
        parameter("h", self.h, -math.inf, 0, "for theta < h, T would rise with the angle")
        parameter("k", self.k)
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return self.a * (safe_angle(cos_y) - self.h) ** 2 + self.k


@dataclass(frozen=True, eq=False)
class Annealed(Wrapper):
    """A margin mixed with none, as SphereFace trains: lambda falls from 1000 or so to 5.

    Equivalent to: `T = (lam c + base's T) / (1 + lam)`
    Args: lam >= 0, best a 0-dim tensor that an `fm.schedules.MarginSchedule` moves; any base without a rival rule.
    Source: Liu et al. 2017, SphereFace (arXiv 1704.08063) and its Caffe prototxt, `fm.schedules.SphereFaceAnnealing`.
    """

    base: Margin
    lam: float | Tensor = 5.0
    gradient: str | None = field(default=None, kw_only=True)  # None: the base's

    def __post_init__(self) -> None:
        scalar("lam", self.lam, 0)
        self._take_base(products=True)

    @property
    def additive(self) -> bool:
        return self.base.additive

    @property
    def products(self) -> bool:
        return self.base.products

    def target(self, cos_y: Tensor) -> Tensor:
        return (self.lam * cos_y + self.base.target(cos_y)) / (1 + self.lam)


@dataclass(frozen=True, eq=False)
class LSoftmax(Margin):
    """Large-margin softmax: psi on the target's product of raw embedding and raw class weight.

    Equivalent to: `T = n psi(theta)`, n = |x| |w_y|, on products `x . w` (`normalize_embeddings=False,
    normalize_weight=False, scale=1`); psi as in `SphereFace`. The gradient through |w_y| makes a second tensor [C, D].
    Args: m in [1, 64] (default 4).
    Source: Liu et al. 2016, Large-Margin Softmax (arXiv 1612.02295) eqs. 4-6, annealed: `Annealed(LSoftmax())`.
    """

    m: RowParameter = 4
    lengths: PerSample | None = field(default=None, init=False, repr=False)  # n
    gradient: str = field(default="exact", kw_only=True)
    products: ClassVar[bool] = True
    default_scale: ClassVar[float] = 1.0
    needs: ClassVar[tuple[str, ...]] = ("norm", "weight_norm")

    def __post_init__(self) -> None:
        psi_factor("m", self.m)
        choice("gradient", self.gradient, GRADIENTS)

    def prepare(self, rows: RowStats, labels: Tensor) -> LSoftmax:
        return self.replaced(lengths=PerSample((rows.norm * rows.weight_norm).clamp_min(EPS)))

    def target(self, cos_y: Tensor) -> Tensor:
        c = cos_y / self.lengths
        c = c + (c.clamp(-1, 1) - c).detach()
        return self.lengths * SphereFace(self.m).target(c)
