"""Margins that adapt: to a sample's norm, to chance, to a class's size or spread, or by learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..angles import safe_angle
from ..labels import classes_of
from ..rules import Rule
from .angular import TAILS, ArcFace, largest
from .base import Margin, RowStats, StatefulMargin
from .checks import GRADIENTS, choice, class_counts, count, number
from .parameters import PerClass, PerSample
from .softmax import CosFace


@dataclass(frozen=True, eq=False)
class _Ada(Margin):
    """AdaFace with q, each row's quality in [-1, 1]."""

    m: float | Tensor
    q: PerSample
    eps: float
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    guards: ClassVar[bool] = True

    def target(self, cos_y: Tensor) -> Tensor:
        c = cos_y.clamp(-1 + self.eps, 1 - self.eps)
        angle = (safe_angle(c) - self.m * self.q).clamp(self.eps, math.pi - self.eps)
        return torch.cos(angle) - (self.m + self.m * self.q)

    def rule(self) -> Rule:
        return Rule("clip", (-1 + self.eps, 1 - self.eps))


class AdaFace(StatefulMargin):
    """The norm of an embedding as a measure of image quality, which sets angle and cosine margin.

    Equivalent to: `q = clip(h (|x| - mean) / (std + eps), -1, 1)`, a constant in the gradient, with |x| clipped to
    [1e-3, 100]; `T = cos(clip(theta - m q, eps, pi - eps)) - (m + m q)`, all cosines clipped to +-(1 - eps) first
    (the target's alone in `SVSoftmax` and other wrappers: their rule takes the place of this guard). In training mode,
    before use, mean and std (unbiased) move towards those of the batch by `rate`.
    Args: m >= 0 (0.4), a float or a 0-dim tensor; h > 0 (0.333), rate in [0, 1] (0.01), eps (1e-3). State: `mean` 20,
        `std` 100 at first.
    Source: Kim et al. 2022, AdaFace (arXiv 2204.00964) and its code; s = 64.
    """

    needs = ("norm",)
    additive = False
    constants = True
    guards = True

    def __init__(
        self,
        m: float | Tensor = 0.4,
        h: float = 0.333,
        rate: float = 0.01,
        eps: float = 1e-3,
        *,
        gradient: str = "exact",
    ) -> None:
        super().__init__(gradient)
        self.hold("m", m, 0, math.pi / 2)
        number("h", h, 1e-6)
        number("rate", rate, 0, 1)
        number("eps", eps, 0, 0.1)
        self.h, self.rate, self.eps = h, rate, eps
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def rule(self) -> Rule:
        return Rule("clip", (-1 + self.eps, 1 - self.eps))

    @torch.no_grad()
    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        norm = rows.norm.clamp(1e-3, 100)
        mean = rows.mean(norm)
        squares = torch.where(rows.valid, (norm - mean) ** 2, 0).sum()
        std = (squares / (rows.valid.sum() - 1).clamp_min(1)).sqrt()
        mean, std = self.moved("mean", mean, self.rate, rows), self.moved("std", std, self.rate, rows)
        q = ((norm - mean) / (std + self.eps) * self.h).clamp(-1, 1)
        return _Ada(self.m, PerSample(q), self.eps, gradient=self.gradient)

    def extra_repr(self) -> str:
        return f"m={self.m}, h={self.h}, rate={self.rate}"


@dataclass(frozen=True, eq=False)
class MagFace(Margin):
    """The norm of an embedding sets its margin, with gradient, and a penalty makes it grow.

    Equivalent to: `a = clip(|x|, l_a, u_a)`, `m = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)`, `T` of
    `ArcFace(m, tail)`, and `weight (a / u_a^2 + 1 / a)` added to each row's loss.
    Args: l_a < u_a norms (10, 110), l_m <= u_m radians (0.45, 0.8), weight >= 0 (35), tail (easy, as its code).
    Source: Meng et al. 2021, MagFace (arXiv 2103.06627) and its code; s = 64.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    weight: float = 35.0
    tail: str = "easy"
    norms: PerSample | None = field(default=None, init=False, repr=False)  # a
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("norm",)

    def __post_init__(self) -> None:
        choice("tail", self.tail, TAILS)
        for name, low, high in (("l_a", 1e-6, math.inf), ("l_m", 0, math.pi), ("weight", 0, 1e6)):
            number(name, getattr(self, name), low, high)
        number("u_a", self.u_a, self.l_a * (1 + 1e-6), math.inf, "the norms' upper end lies above l_a")
        end, why = largest(self.tail)
        number("u_m", self.u_m, self.l_m, end, f"the margin grows with the norm{why and ', and '}{why}")
        choice("gradient", self.gradient, GRADIENTS)

    def prepare(self, rows: RowStats, labels: Tensor) -> MagFace:
        return self.replaced(norms=PerSample(rows.norm.clamp(self.l_a, self.u_a)))

    def target(self, cos_y: Tensor) -> Tensor:
        m = self.l_m + (self.u_m - self.l_m) * (self.norms - self.l_a) / (self.u_a - self.l_a)
        return ArcFace(m, self.tail).target(cos_y)

    def penalty(self) -> Tensor:
        return self.weight * (self.norms / self.u_a**2 + 1 / self.norms)


class ElasticFace(StatefulMargin):
    """A margin drawn anew for each row and step; in eval mode its mean.

    Equivalent to: `ArcFace(fm.PerSample(m + sigma * torch.randn(B)))` (kind "arc"), or `CosFace` of that ("cos").
    Args: m (0.5; for "cos" 0.35), a float or a 0-dim tensor; sigma in [0, 1] (0.05; with plus 0.0175 for "arc", 0.02
        for "cos"). plus: ElasticFace+, of the margins drawn the row that is nearest to its class gets the smallest, the
        farthest the largest, as the paper says; its code puts the sorted margins in the order of the sorting, not of
        the ranks. tail: of ArcFace ("raw", as its code).
    Source: Boutros et al. 2022, ElasticFace (arXiv 2109.09416); s = 64. Draws come from torch's generator of
    the device: `torch.manual_seed` repeats them.
    """

    additive = False

    def __init__(
        self,
        m: float | Tensor | None = None,
        sigma: float | None = None,
        kind: str = "arc",
        plus: bool = False,
        tail: str = "raw",
        *,
        gradient: str = "exact",
    ) -> None:
        super().__init__(gradient)
        choice("kind", kind, ("arc", "cos"))
        choice("tail", tail, TAILS)
        self.hold("m", {"arc": 0.5, "cos": 0.35}[kind] if m is None else m, 0, largest(tail)[0])
        if sigma is None:
            sigma = {"arc": 0.0175, "cos": 0.02}[kind] if plus else 0.05
        number("sigma", sigma, 0, 1)
        self.sigma, self.kind, self.plus, self.tail = sigma, kind, plus, tail
        self.needs = ("cos_y",) if plus else ()

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        m = torch.zeros(labels.shape, dtype=rows.dtype, device=labels.device) + self.m
        if self.training:
            m = m + self.sigma * torch.randn_like(m)
        if self.plus and self.training:
            near = torch.where(rows.valid, rows.cos_y, -torch.inf)
            rank = near.argsort(descending=True).argsort()  # 0: the nearest to its class; ignored rows come last
            m = torch.where(rows.valid, m, torch.inf).sort().values[rank]
            m = torch.where(rows.valid, m, self.m)
        make = {"arc": lambda m, **g: ArcFace(m, self.tail, **g), "cos": CosFace}[self.kind]
        return make(PerSample(m), gradient=self.gradient)

    def extra_repr(self) -> str:
        return f"m={self.m}, sigma={self.sigma}, kind={self.kind!r}, plus={self.plus}"


@dataclass(frozen=True, eq=False)
class _AdaM(CosFace):
    """CosFace whose margins learn: a larger mean margin lowers the loss."""

    weight: float = 0.0
    mean: Tensor | float = 0.0

    def penalty(self) -> Tensor:
        return self.weight * (1 - self.mean)


class AdaMSoftmax(StatefulMargin):
    """A cosine margin for each class that is learned.

    Equivalent to: `T = c - m[label]` and `weight (1 - m.mean())` added to the loss; m is kept in [0, 1].
    Args: num_classes, low, high: m starts uniform in [low, high] (0.3, 0.4), weight >= 0 (70). Parameter: `m` [C].
    Source: Liu et al. 2019, AdaptiveFace (CVPR 2019); s = 30. For a margin that learns without penalty give
    `CosFace` or `ArcFace` an nn.Parameter.
    """

    default_scale = 30.0
    by_class = ("m",)

    def __init__(
        self, num_classes: int, low: float = 0.3, high: float = 0.4, weight: float = 70.0, *, gradient: str = "exact"
    ) -> None:
        super().__init__(gradient)
        num_classes = count("num_classes", num_classes)
        number("low", low, 0, 1)
        number("high", high, low, 1)
        number("weight", weight, 0)
        self.weight = weight
        self.m = nn.Parameter(torch.empty(num_classes).uniform_(low, high))

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        if self.training:
            with torch.no_grad():
                self.m.clamp_(0, 1)
        return _AdaM(PerClass(self.m), self.weight, self.m.to(rows.dtype).mean(), gradient=self.gradient)


def margins_by_count(counts: Tensor, low: float = 0.05, high: float = 0.5, power: float = 0.25) -> PerClass:
    """Margins that are larger for rarer classes.

    Equivalent to: `r = counts ** -power; low + (high - low) * (r - r.min()) / (r.max() - r.min())`
    Args: counts [C], samples of each class, not all 0; 0 is read as 1. Use: `fm.ArcFace(fm.margins_by_count(counts))`.
    Source: Ha et al. 2020, sub-centre ArcFace with dynamic margins (arXiv 2010.05350); there s = 80, three sub-centres.
    """
    number("low", low, 0)
    number("high", high, low, math.pi, "rarer classes get the larger margin, and no angle is larger than pi")
    number("power", power, 0)
    counts = class_counts(counts)
    rarity = counts.clamp_min(1) ** -power
    span = (rarity.max() - rarity.min()).clamp_min(torch.finfo(rarity.dtype).tiny)
    return PerClass(low + (high - low) * (rarity - rarity.min()) / span)


class KappaFace(StatefulMargin):
    """Margins by class: larger for classes that are rare, and for those whose embeddings are spread.

    Equivalent to: `ArcFace(fm.PerClass(m w))`, `w = gamma (1 - sigmoid(T k)) + (1 - gamma) (cos(pi n / K) + 1) / 2`,
    K = 1.05 max n; k: the concentrations `r (d - r^2) / (1 - r^2)`, r the length of the mean unit embedding of a class,
    standardised over the classes.
    Call `observe(embeddings, labels)` in each step and `end_epoch()` after each epoch, which sets the margins; until
    the first end_epoch all k are 0.
    Args: counts [C] samples of each class, not all 0; m (0.8), temperature T (0.4), gamma (0.7). State: `kappa`, and
        the sums of the running epoch.
    Source: Oinar et al. 2023, KappaFace (arXiv 2201.07394) and its code, which takes w = 0.5 for all classes before the
    first end_epoch; s = 64.
    """

    additive = False
    by_class = ("counts", "kappa", "sums", "seen")

    def __init__(
        self,
        counts: Tensor,
        embedding_size: int,
        m: float = 0.8,
        temperature: float = 0.4,
        gamma: float = 0.7,
        tail: str = "linear",
        *,
        gradient: str = "exact",
    ) -> None:
        super().__init__(gradient)
        choice("tail", tail, TAILS)
        number("m", m, 0, *largest(tail))
        number("temperature", temperature, 0)
        number("gamma", gamma, 0, 1)
        self.m, self.temperature, self.gamma, self.tail = m, temperature, gamma, tail
        counts = class_counts(counts)
        embedding_size = count("embedding_size", embedding_size)
        self.register_buffer("counts", counts)
        self.register_buffer("kappa", torch.zeros_like(counts))
        self.register_buffer("sums", counts.new_zeros(len(counts), embedding_size))
        self.register_buffer("seen", torch.zeros_like(counts))

    @torch.no_grad()
    def observe(self, embeddings: Tensor, labels: Tensor, ignore_index: int = -100) -> None:
        """Takes in the embeddings [B, D] of a step, without the rows that are ignored or not finite."""
        if embeddings.dim() != 2 or embeddings.shape[1] != self.sums.shape[1]:
            raise ValueError(
                f"embeddings have shape {list(embeddings.shape)}; expected [B, {self.sums.shape[1]}], as "
                f"KappaFace(counts, {self.sums.shape[1]}) says: pass its embedding_size as that of the head"
            )
        classes, valid = classes_of(labels, len(embeddings), len(self.counts), ignore_index)
        x = embeddings.to(self.sums.dtype)
        valid = valid & torch.linalg.vector_norm(x, dim=1).isfinite()
        self.sums.index_add_(0, classes, torch.where(valid[:, None], F.normalize(x, dim=1), 0))
        self.seen.index_add_(0, classes, valid.to(self.seen.dtype))

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Sets the concentrations from what was observed, and starts anew."""
        r = torch.linalg.vector_norm(self.sums / self.seen.clamp_min(1)[:, None], dim=1).clamp(0, 1 - 1e-6)
        kappa = r * (self.sums.shape[1] - r**2) / (1 - r**2)
        deviation = kappa.std(correction=min(1, len(kappa) - 1))  # of one class 0, and so is its kappa
        self.kappa.copy_((kappa - kappa.mean()) / deviation.clamp_min(1e-6))
        self.sums.zero_()
        self.seen.zero_()

    def margins(self) -> Tensor:
        """[C], in radians."""
        spread = 1 - torch.sigmoid(self.temperature * self.kappa)
        rarity = (torch.cos(math.pi * self.counts / (1.05 * self.counts.max())) + 1) / 2
        return self.m * (self.gamma * spread + (1 - self.gamma) * rarity)

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        return ArcFace(PerClass(self.margins()), self.tail, gradient=self.gradient)
