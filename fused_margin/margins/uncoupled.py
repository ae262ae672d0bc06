"""Losses without softmax: every class a decision of its own. loss = a softplus(-z_y) + b sum_j softplus(u_j)

z_y = s T(c_y) + bias, u_j = s N(c_j) + bias; the sum over the rivals is the sweep's other reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..angles import softplus
from ..rules import IDENTITY, Rule
from .angular import ArcFace, clamped_multiple
from .base import Margin, Outcome, RowStats, StatefulMargin
from .checks import choice, count, number
from .parameters import Whole


def _power(c: Tensor, t: float) -> Tensor:
    """g(c) = 2 ((c + 1) / 2)^t - 1."""
    return 2 * ((c + 1) / 2) ** t - 1


@dataclass(frozen=True, eq=False)
class _Sphere2(Margin):
    """SphereFace2 with the bias of one batch."""

    kind: str
    m: float
    t: float
    balance: float
    weight: float
    b: Whole  # 0-dim or [C]
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    reduction: ClassVar[str] = "softplus"
    softmax: ClassVar[bool] = False

    def target(self, cos_y: Tensor) -> Tensor:
        if self.kind == "A":
            return _power(ArcFace(self.m, "clamp").target(cos_y), self.t)
        if self.kind == "M":
            return _power(clamped_multiple(cos_y, self.m), self.t)
        return _power(cos_y, self.t) - self.m

    def rule(self) -> Rule:
        return Rule("power", (float(self.t), float(self.m) if self.kind == "C" else 0.0))

    def bias(self) -> Tensor:
        return self.b.values

    def row_loss(self, out: Outcome) -> Tensor:
        loss = self.balance * softplus(-out.z) + (1 - self.balance) * out.red
        return self.weight / out.scale * loss


class SphereFace2(StatefulMargin):
    """Binary classification of each class, with margins of three kinds and a learned bias b.

    Equivalent to: `g(c) = 2 ((c + 1) / 2)^t - 1`,
    `loss = weight / s (balance softplus(-z_y) + (1 - balance) sum_j softplus(u_j))` with, for kind
    "C": `z_y = s (g(c_y) - m) + b`, `u_j = s (g(c_j) + m) + b`; "A": `z_y = s g(cos(min(theta_y + m, pi))) + b`;
    "M": `z_y = s g(cos(min(m theta_y, pi))) + b`; in both `u_j = s g(c_j) + b`.
    Args: num_classes and scale, for the value that b starts with: that at which, with all cosines 0, the target pulls
        as hard as all rivals together push, margins included. m (C: 0.4, A: 0.5, M: 1.7), t >= 1 (3), balance in
        (0, 1) (0.7), weight > 0 (50; its config: 10). scale (40): a head that is given none takes this one.
    Source: Wen et al. 2022, SphereFace2 (arXiv 2108.01513) and OpenSphere, which takes gradient="detached".
    """

    additive = False
    reduction = "softplus"
    softmax = False

    def __init__(
        self,
        num_classes: int,
        kind: str = "C",
        m: float | None = None,
        t: float = 3.0,
        balance: float = 0.7,
        weight: float = 50.0,
        scale: float = 40.0,
        *,
        gradient: str = "exact",
    ) -> None:
        super().__init__(gradient)
        choice("kind", kind, ("C", "A", "M"))
        m = {"C": 0.4, "A": 0.5, "M": 1.7}[kind] if m is None else m
        number("m", m, *{"C": (0, 2), "A": (0, math.pi), "M": (1, math.inf)}[kind])
        number("t", t, 1, math.inf, "for t < 1 the slope at c = -1 is infinite")
        number("balance", balance, 1e-6, 1 - 1e-6)
        number("weight", weight, 1e-9)
        number("scale", scale, 1e-9)
        num_classes = count("num_classes", num_classes)
        self.num_classes = num_classes
        self.kind, self.m, self.t, self.balance, self.weight = kind, m, t, balance, weight
        self.default_scale = float(scale)
        self.b = nn.Parameter(torch.tensor(self._start(num_classes, scale)))

    def _start(self, num_classes: int, scale: float) -> float:
        """The bias for which, at cosines of 0, the target pulls as hard as all rivals together."""
        ratio = self.balance / ((1 - self.balance) * max(num_classes - 1, 1))
        start = _Sphere2(self.kind, self.m, self.t, self.balance, self.weight, Whole(torch.zeros((), device="cpu")))
        own = scale * float(start.target(torch.zeros((), dtype=torch.float64, device="cpu")))
        rival = scale * (2 * 0.5**self.t - 1 + (self.m if self.kind == "C" else 0.0))
        product = 4 * ratio * math.exp(own - rival)
        root = math.sqrt((1 - ratio) ** 2 + product)
        rest = 1 - ratio + root if ratio <= 1 else product / (ratio - 1 + root)  # equal; free of cancellation
        return math.log(2 * ratio) - rival - math.log(rest)

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        self.same_classes(self.num_classes, rows)
        b = Whole(self.b.to(rows.dtype))
        return _Sphere2(self.kind, self.m, self.t, self.balance, self.weight, b, gradient=self.gradient)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, m={self.m}, t={self.t}, balance={self.balance}, weight={self.weight}"


@dataclass(frozen=True, eq=False)
class _Uni(Margin):
    """UniFace with the bias of one batch."""

    m: float
    weight: float
    b: Whole  # 0-dim or [C]
    gradient: str = field(default="exact", kw_only=True)
    reduction: ClassVar[str] = "softplus"
    softmax: ClassVar[bool] = False

    def target(self, cos_y: Tensor) -> Tensor:
        return cos_y - self.m

    def rule(self) -> Rule:
        return IDENTITY

    def bias(self) -> Tensor:
        return self.b.values

    def row_loss(self, out: Outcome) -> Tensor:
        return softplus(-out.z) + self.weight * out.red


class UniFace(StatefulMargin):
    """Unified cross-entropy: one threshold b, learned, separates all target cosines from all rivals.

    Equivalent to: `loss = softplus(-(s (c_y - m) - b)) + weight sum_j softplus(s c_j - b)`
    Args: num_classes, for the value log(10 C) that b starts with; m (0.4), a float or a 0-dim tensor; weight > 0 (1).
        per_class: a threshold for each class, which is the binary cross-entropy. Parameter: `b`, the bias's negative.
    Source: Zhou et al. 2023, UniFace (ICCV 2023) and its code; s = 64. Its sampling of rivals, and its clamp of the
    exponents to [-s, s], are left out.
    """

    reduction = "softplus"
    softmax = False

    def __init__(
        self,
        num_classes: int,
        m: float | Tensor = 0.4,
        weight: float = 1.0,
        per_class: bool = False,
        *,
        gradient: str = "exact",
    ) -> None:
        super().__init__(gradient)
        self.hold("m", m, 0, 2)
        number("weight", weight, 1e-9)
        num_classes = count("num_classes", num_classes)
        self.weight, self.num_classes = weight, num_classes
        self.by_class = ("b",) if per_class else ()
        self.b = nn.Parameter(torch.full((num_classes,) if per_class else (), math.log(10 * num_classes)))

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        self.same_classes(self.num_classes, rows)
        return _Uni(self.m, self.weight, Whole(-self.b.to(rows.dtype)), gradient=self.gradient)

    def extra_repr(self) -> str:
        return f"m={self.m}, weight={self.weight}"
