"""The losses of docs/losses.md as dense functions [B, C], typed from the papers; nothing of fused_margin's formulas.

T and N are functions of cosines; with gradient="detached" their slope is 1. `.detach()` stands where a paper stops a
gradient.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import oracle
from .oracle import arcface


class Dense(NamedTuple):
    """What a loss may look at."""

    c_y: Tensor  # [B]
    c: Tensor  # [B, C]
    rival: Tensor  # [B, C]
    y: Tensor  # [B]
    valid: Tensor  # [B]
    s: Tensor  # [B]
    norm: Tensor  # [B] |x|
    w_norm: Tensor  # [B] |w_y|
    p: dict[str, Tensor]  # the margin's parameters
    draws: torch.dtype  # in which random numbers are drawn
    detached: bool
    smoothing: float = 0.0

    @property
    def classes(self) -> int:
        return self.c.shape[1]

    def mean(self, v: Tensor) -> Tensor:
        return v[self.valid].mean()

    def target(self, t: Callable[[Tensor], Tensor]) -> Tensor:
        return t(self.c_y.detach()) + self.c_y - self.c_y.detach() if self.detached else t(self.c_y)

    def rivals(self, n: Callable[[Tensor], Tensor]) -> Tensor:
        v = n(self.c)
        return v.detach() + self.c - self.c.detach() if self.detached else v


def cross_entropy(d: Dense, z: Tensor, u: Tensor) -> Tensor:
    """From logits; in float64 exact for losses of any size."""
    if z.dtype == torch.float32 or d.smoothing:
        logits = torch.where(d.rival, u, z[:, None])
        return F.cross_entropy(logits, d.y, reduction="none", label_smoothing=d.smoothing)
    gap = torch.where(d.rival, u, -math.inf) - z[:, None]
    top = gap.detach().amax(1).clamp_min(0)
    return top + torch.log1p(torch.expm1(-top) + torch.exp(gap - top[:, None]).sum(1))


def softmax(t: Callable, n: Callable = lambda d, c: c) -> Callable[[Dense], Tensor]:
    """The loss of T(d, c_y) and N(d, c)."""

    def rows(d: Dense) -> Tensor:
        z = d.s * d.target(lambda c: t(d, c))
        return cross_entropy(d, z, d.s[:, None] * d.rivals(lambda c: n(d, c)))

    return rows


def hard(tau: Callable[[Tensor], Tensor], a: float, b: float) -> Callable[[Dense, Tensor], Tensor]:
    return lambda d, c: torch.where(c > tau(d.c_y).detach()[:, None], a * c + b, c)


def turn(m: float) -> Callable[[Tensor], Tensor]:
    return lambda c: torch.cos(torch.acos(c) + m)


def softplus(v: Tensor) -> Tensor:
    return v.clamp_min(0) + torch.log1p(torch.exp(-v.abs()))


def curricular(d: Dense) -> Tensor:
    """2004.00288: t is updated before use, and counts as a constant."""
    t = 0.99 * 0.25 + 0.01 * d.mean(d.c_y).detach()
    tau = turn(0.5)(d.c_y).detach()[:, None]
    return softmax(lambda d, c: arcface(c, 0.5), lambda d, c: torch.where(c > tau, c * (t + c), c))(d)


def npc(d: Dense) -> Tensor:
    hit = d.rival & (d.c > turn(0.5)(d.c_y)[:, None])
    h = (torch.where(hit, d.c, 0.0).sum(1) / hit.sum(1).clamp_min(1)).detach()
    return softmax(
        lambda d, c: torch.where(c > 0, torch.cos(torch.acos(c) + 0.4 + 0.2 * h), c), hard(turn(0.5), 1.1, 0.2)
    )(d)


def arcneg(d: Dense) -> Tensor:
    q = 1.2 * torch.exp(-((d.c - arcface(d.c_y, 0.5)[:, None]) ** 2) / 2.0)
    return softmax(lambda d, c: arcface(c, 0.5), lambda d, c: q.detach() * c + q.detach() - 1)(d)


def adaface(d: Dense) -> Tensor:
    norm = d.norm.clamp(0.001, 100).detach()
    mean = 0.99 * 1.0 + 0.01 * norm[d.valid].mean()
    std = 0.99 * 0.25 + 0.01 * norm[d.valid].std()
    q = (0.333 * (norm - mean) / (std + 1e-3)).clamp(-1, 1)

    def target(d: Dense, c: Tensor) -> Tensor:
        theta = torch.acos(c.clamp(-1 + 1e-3, 1 - 1e-3))
        return torch.cos((theta - 0.4 * q).clamp(1e-3, math.pi - 1e-3)) - (0.4 + 0.4 * q)

    return softmax(target, lambda d, c: c.clamp(-1 + 1e-3, 1 - 1e-3))(d)


def magface(d: Dense) -> Tensor:
    a = d.norm.clamp(0.8, 1.2)
    m = 0.45 + (0.8 - 0.45) / (1.2 - 0.8) * (a - 0.8)
    loss = softmax(lambda d, c: torch.where(c > 0, torch.cos(torch.acos(c) + m), c))(d)
    return loss + 2.0 * (a / 1.2**2 + 1 / a)


def elastic(margin: Callable, m: float, plus: bool = False) -> Callable[[Dense], Tensor]:
    def rows(d: Dense) -> Tensor:
        drawn = m + 0.05 * torch.randn(len(d.s), dtype=d.draws).to(d.s.dtype)
        if plus:  # 2109.09416, section 3: the farther a sample is from its class, the larger its margin
            there = d.valid.nonzero()[:, 0].tolist()
            nearest_first = sorted(there, key=lambda i: -d.c_y[i].item())
            smallest_first = sorted(drawn[i].item() for i in there)
            drawn = drawn.clone()
            for i, given in zip(nearest_first, smallest_first, strict=True):
                drawn[i] = given
        return softmax(lambda d, c: margin(c, drawn))(d)

    return rows


def adacos(d: Dense) -> Tensor:
    """1905.00292: B_avg with the scale before, the angles' median; used on the same batch."""
    s = math.sqrt(2) * math.log(d.classes - 1)
    rivals = torch.where(d.rival, torch.exp(s * d.c.detach()), 0.0).sum(1)[d.valid]
    angle = torch.acos(d.c_y.detach()[d.valid]).sort().values
    median = angle[(len(angle) - 1) // 2]
    scale = torch.log(rivals.mean()) / torch.cos(median.clamp_max(math.pi / 4))
    return softmax(lambda d, c: c)(d._replace(s=scale.expand_as(d.s)))


def sphereface2(kind: str, m: float) -> Callable[[Dense], Tensor]:
    def g(c: Tensor) -> Tensor:
        return 2 * ((c + 1) / 2) ** 3 - 1

    targets = {
        "C": lambda c: g(c) - m,
        "A": lambda c: g(torch.cos((torch.acos(c) + m).clamp_max(math.pi))),
        "M": lambda c: g(torch.cos((torch.acos(c) * m).clamp_max(math.pi))),
    }

    def rows(d: Dense) -> Tensor:
        z = d.s * d.target(targets[kind]) + d.p["b"]
        u = d.s[:, None] * d.rivals(lambda c: g(c) + (m if kind == "C" else 0.0)) + d.p["b"]
        return 50 / d.s * (0.7 * softplus(-z) + 0.3 * torch.where(d.rival, softplus(u), 0.0).sum(1))

    return rows


def uniface(d: Dense) -> Tensor:
    b = d.p["b"].expand(d.classes)
    z = d.s * d.target(lambda c: c - 0.4) - b[d.y]
    u = d.s[:, None] * d.rivals(lambda c: c) - b
    return softplus(-z) + 1.5 * torch.where(d.rival, softplus(u), 0.0).sum(1)


def adam(d: Dense) -> Tensor:
    return softmax(lambda d, c: c - d.p["m"][d.y])(d) + 70 * (1 - d.p["m"].mean())


def kappa(d: Dense) -> Tensor:
    counts = 1 + torch.arange(d.classes, dtype=torch.float64) % 5
    w = 0.7 * (1 - 0.5) + 0.3 * (torch.cos(math.pi * counts / (1.05 * counts.max())) + 1) / 2  # before any epoch
    m = (0.8 * w).to(d.s.dtype)[d.y]
    return softmax(lambda d, c: arcface(c, m))(d)


def by_count(d: Dense) -> Tensor:
    n = (1 + torch.arange(d.classes, dtype=torch.float64) % 5) ** -0.25
    m = 0.05 + 0.45 * (n - n.min()) / (n.max() - n.min())
    return softmax(lambda d, c: arcface(c, m.to(d.s.dtype)[d.y]))(d)


def l_softmax(d: Dense, lam: float = 0.0) -> Tensor:
    """1612.02295 eq. 4, on products: d.c holds x . w; annealed as there."""
    n = d.norm * d.w_norm
    z = d.target(lambda c: (lam * c + n * oracle.sphereface((c / n).clamp(-1, 1), 4)) / (1 + lam))
    return cross_entropy(d, z, d.rivals(lambda c: c))


def focal(base: Callable[[Dense], Tensor], gamma: float, held: bool) -> Callable[[Dense], Tensor]:
    def rows(d: Dense) -> Tensor:
        loss = base(d)
        miss = 1 - torch.exp(-loss)
        return (miss.detach() if held else miss) ** gamma * loss

    return rows


def hardest(d: Dense) -> Tensor:
    loss = softmax(lambda d, c: c)(d)
    kept = int(0.9 * int(d.valid.sum()))
    place = torch.where(d.valid, loss, -1.0).topk(kept).indices
    return torch.where(torch.zeros_like(d.valid).index_fill(0, place, True), loss, 0.0)


def smoothed(d: Dense) -> Tensor:
    z = d.s * d.target(lambda c: arcface(c, 0.5))
    logits = torch.where(d.rival, d.s[:, None] * d.rivals(lambda c: c), z[:, None])
    return F.cross_entropy(logits, d.y, label_smoothing=0.1, reduction="none")


def sface(d: Dense) -> Tensor:
    r_y = torch.sigmoid(8 * (torch.acos(d.c_y) - 0.8)).detach()
    r_j = torch.sigmoid(-8 * (torch.acos(d.c) - 1.23)).detach()
    u = d.s[:, None] * d.rivals(lambda c: r_j * c)
    return torch.where(d.rival, u, 0.0).sum(1) - d.s * d.target(lambda c: r_y * c)


def p2sgrad(d: Dense) -> Tensor:
    z, u = d.target(lambda c: -0.5 * (1 - c) ** 2), d.rivals(lambda c: 0.5 * c**2)
    return d.s * (torch.where(d.rival, u, 0.0).sum(1) - z)


def sigmoid_angle(theta: Tensor, k: float = 0.5) -> Tensor:
    e = torch.exp(theta / k - math.pi / (2 * k))
    edge = math.exp(-math.pi / (2 * k))
    return (1 + edge) / (1 - edge) * (1 - e) / (1 + e)
