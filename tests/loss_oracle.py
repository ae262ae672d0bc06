"""The losses of docs/losses.md as dense functions [B, C], typed from the papers; nothing of fused_margin's formulas.

A row of `LOSSES` says how the library makes the loss, and what it means. T and N are functions of cosines; with
gradient="detached" their slope is 1. `.detach()` stands where a paper stops a gradient.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm

from . import oracle
from .oracle import arcface, combined, sphereface


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
    if z.dtype == torch.float32:
        return F.cross_entropy(torch.where(d.rival, u, z[:, None]), d.y, reduction="none")
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
    """2004.00288 eqs. 8-10: t is updated before use, and counts as a constant."""
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
        if plus:  # the sample that is the k-th nearest to its class gets the k-th smallest margin
            order = torch.where(d.valid, d.c_y.detach(), 0.0).argsort(descending=True)
            drawn = drawn.clone().index_copy(0, order, drawn.sort().values)
        return softmax(lambda d, c: margin(c, drawn))(d)

    return rows


def adacos(d: Dense) -> Tensor:
    """1905.00292 eq. 15: B_avg with the scale before, the angles' median; used on the same batch."""
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


def l_softmax(d: Dense) -> Tensor:
    """1612.02295 eq. 4, on products: d.c holds x . w."""
    n = d.norm * d.w_norm
    z = d.target(lambda c: n * oracle.sphereface((c / n).clamp(-1, 1), 4))
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


class Loss(NamedTuple):
    """How the library makes it, what it means, and how it is tested."""

    make: Callable[..., fm.Margin]  # (classes, dim, gradient=...)
    rows: Callable[[Dense], Tensor]
    options: Callable[[int], dict] = lambda classes: {}
    tau: Callable[[Tensor], Tensor] | None = None  # a step of N: no cosine may be near it
    scale: float | str = 16.0
    centres: int = 1
    products: bool = False
    exact: bool = True  # the gradient is the slope of the loss
    kernel: bool = True


def _set(margin: fm.StatefulMargin, **state: float) -> fm.StatefulMargin:
    for name, value in state.items():
        getattr(margin, name).fill_(value)
    return margin


def _counts(classes: int) -> Tensor:
    return 1 + torch.arange(classes) % 5


def _arc(tail: str) -> Loss:
    return Loss(lambda C, D, **g: fm.ArcFace(0.5, tail, **g), softmax(lambda d, c: arcface(c, 0.5, tail)))


def _ce(make: Callable[..., fm.Margin], t: Callable[[Tensor], Tensor], n: Callable | None = None, **more) -> Loss:
    rivals = (lambda d, c: n(c)) if n else (lambda d, c: c)
    return Loss(lambda C, D, **g: make(**g), softmax(lambda d, c: t(c), rivals), **more)


def _sv(make: Callable[..., fm.Margin], f: Callable[[Tensor], Tensor], t: float) -> Loss:
    return Loss(lambda C, D, **g: fm.SVSoftmax(t, make(), **g), softmax(lambda d, c: f(c), hard(f, t, t - 1)), tau=f)


def _mv(f: Callable, a: float, b: float, below: float | None = 0.0, **options) -> Loss:
    def target(d: Dense, c: Tensor) -> Tensor:
        return f(c) if below is None else torch.where(c > below, f(c), c)

    return Loss(lambda C, D, **g: fm.MVSoftmax(0.2, 0.35, **options, **g), softmax(target, hard(f, a, b)), tau=f)


def _cos(m: float) -> Callable[[Tensor], Tensor]:
    return lambda c: c - m


def _reference(make: Callable[..., fm.Margin], rows: Callable, **more) -> Loss:
    return Loss(lambda C, D, **g: make(**g), rows, kernel=False, **more)


def _of_angle(t: Callable[[Tensor], Tensor], n: Callable[[Tensor], Tensor]) -> Callable[[Dense], Tensor]:
    return softmax(lambda d, c: t(torch.acos(c)), lambda d, c: n(torch.acos(c)))


def _quarter(rows: Callable[[Dense], Tensor]) -> Callable[[Dense], Tensor]:
    return lambda d: 5.0 / d.s * rows(d)


_V1 = lambda c: torch.cos((1.4 * torch.acos(c)).clamp_max(math.pi))  # noqa: E731
_normface = softmax(lambda d, c: c)
_arcface = softmax(lambda d, c: arcface(c, 0.5))
_v2 = _of_angle(torch.cos, lambda theta: torch.cos(theta / 1.4))
_pull = lambda d: _v2(d) + 0.01 * (d.norm - 30).abs()  # noqa: E731

LOSSES: dict[str, Loss] = {
    "softmax": _ce(fm.NormFace, lambda c: c, products=True, scale=1.0),
    "normface": _ce(fm.NormFace, lambda c: c),
    "a-softmax": _ce(lambda **g: fm.SphereFace(4, **g), lambda c: sphereface(c, 4), scale="norm"),
    "a-softmax-2": _ce(lambda **g: fm.SphereFace(2, **g), lambda c: sphereface(c, 2), scale="norm"),
    "a-softmax-3": _ce(lambda **g: fm.SphereFace(3, **g), lambda c: sphereface(c, 3), scale="norm"),
    "sphereface": _ce(lambda **g: fm.SphereFace(1.7, **g), lambda c: sphereface(c, 1.7)),
    "annealed": _ce(
        lambda **g: fm.Annealed(fm.SphereFace(4), torch.tensor(5.0), **g), lambda c: (5 * c + sphereface(c, 4)) / 6
    ),
    "l-softmax": Loss(lambda C, D, **g: fm.LSoftmax(4, **g), l_softmax, products=True, scale=1.0),
    "sphereface-r-v0": _ce(lambda **g: fm.SphereFaceR(1.4, 0, **g), lambda c: sphereface(c, 1.4)),
    "sphereface-r-v1": _ce(lambda **g: fm.SphereFaceR(1.4, 1, **g), _V1),
    "cosface": _ce(lambda **g: fm.CosFace(0.35, **g), _cos(0.35)),
    **{f"arcface-{tail}": _arc(tail) for tail in ("raw", "linear", "continuous", "clamp", "easy")},
    "combined": _ce(
        lambda **g: fm.CombinedMargin(1.1, 0.3, 0.2, **g), lambda c: combined(c, 1.1, 0.3, 0.2, "continuous")
    ),
    "airface": _ce(lambda **g: fm.LiArcFace(0.45, "cosine", **g), lambda c: 1 - 2 * (torch.acos(c) + 0.45) / math.pi),
    "x2-softmax": _ce(lambda **g: fm.X2Softmax(**g), lambda c: -0.9 * torch.acos(c) ** 2 + 0.65),
    "hm-softmax": Loss(
        lambda C, D, **g: fm.NormFace(**g), hardest, lambda C: {"mining": fm.HardRows(0.9)}, exact=False
    ),
    "f-softmax": Loss(
        lambda C, D, **g: fm.NormFace(**g), focal(_normface, 2, False), lambda C: {"mining": fm.Focal(2)}
    ),
    "f-softmax-detached": Loss(
        lambda C, D, **g: fm.NormFace(**g),
        focal(_normface, 2, True),
        lambda C: {"mining": fm.Focal(2, gradient="detached")},
        exact=False,
    ),
    "mining-margin": Loss(
        lambda C, D, **g: fm.ArcFace(0.5, **g), focal(_arcface, 1.5, False), lambda C: {"mining": fm.Focal(1.5)}
    ),
    "sv-softmax": _sv(fm.NormFace, lambda c: c, 1.2),
    "sv-x-am": _sv(fm.CosFace, _cos(0.35), 1.2),
    "sv-x-arc": _sv(fm.ArcFace, lambda c: arcface(c, 0.5), 1.2),
    "sv-x-psi": _sv(lambda: fm.SphereFace(2), lambda c: sphereface(c, 2), 1.1),
    "mv-am": _mv(_cos(0.35), 1.2, 0.2),
    "mv-am-fixed": _mv(_cos(0.35), 1.0, 0.2, mode="fixed"),
    "mv-am-easy-margin": _mv(_cos(0.35), 1.2, 0.2, 0.35, easy="margin"),
    "mv-arc": _mv(turn(0.35), 1.2, 0.2, kind="arc"),
    "mv-arc-fixed": _mv(turn(0.35), 1.0, 0.2, None, kind="arc", mode="fixed", easy=None),
    "curricularface": Loss(
        lambda C, D, **g: _set(fm.CurricularFace(**g), t=0.25), curricular, tau=turn(0.5), exact=False
    ),
    "npcface": Loss(lambda C, D, **g: fm.NPCFace(**g), npc, tau=turn(0.5), exact=False),
    "arcnegface": Loss(lambda C, D, **g: fm.ArcNegFace(**g), arcneg, exact=False),
    "eqm": _ce(lambda **g: fm.EqM(0.6, 0.2, **g), lambda c: c.clamp_max(0.6) - 0.4, lambda c: c.clamp_min(0.2)),
    "eqm-offset-0": _ce(
        lambda **g: fm.EqM(0.6, 0.2, torch.tensor(0.0), **g), lambda c: c.clamp_max(0.6), lambda c: c.clamp_min(0.2)
    ),
    "filter": _ce(
        lambda **g: fm.InterclassFilter(0.25, fm.CosFace(0.2), **g),
        _cos(0.2),
        lambda c: torch.where(c > 0.25, 0.0, c),
        tau=lambda c: torch.full_like(c, 0.25),
    ),
    "circle": _ce(
        lambda **g: fm.CircleLoss(0.25, **g),
        lambda c: (1.25 - c).clamp_min(0).detach() * (c - 0.75),
        lambda c: (c + 0.25).clamp_min(0).detach() * (c - 0.25),
        exact=False,
    ),
    "adaface": Loss(lambda C, D, **g: _set(fm.AdaFace(**g), mean=1.0, std=0.25), adaface, exact=False),
    "magface": Loss(lambda C, D, **g: fm.MagFace(0.8, 1.2, 0.45, 0.8, 2.0, **g), magface),
    "elasticface-arc": Loss(lambda C, D, **g: fm.ElasticFace(**g), elastic(lambda c, m: arcface(c, m, "raw"), 0.5)),
    "elasticface-cos": Loss(lambda C, D, **g: fm.ElasticFace(kind="cos", **g), elastic(lambda c, m: c - m, 0.35)),
    "elasticface+": Loss(
        lambda C, D, **g: fm.ElasticFace(0.4, plus=True, kind="cos", **g), elastic(lambda c, m: c - m, 0.4, True)
    ),
    "adacos-fixed": Loss(
        lambda C, D, **g: fm.NormFace(**g),
        lambda d: _normface(d._replace(s=torch.full_like(d.s, math.sqrt(2) * math.log(d.classes - 1)))),
        lambda C: {"scale": fm.AdaCos(C, dynamic=False)},
    ),
    "adacos": Loss(lambda C, D, **g: fm.NormFace(**g), adacos, lambda C: {"scale": fm.AdaCos(C)}, exact=False),
    "dynamic-margins": Loss(lambda C, D, **g: fm.ArcFace(fm.margins_by_count(_counts(C).double()), **g), by_count),
    "adam-softmax": Loss(lambda C, D, **g: fm.AdaMSoftmax(C, **g), adam),
    "kappaface": Loss(lambda C, D, **g: fm.KappaFace(_counts(C).double(), D, **g).double(), kappa),
    "sub-center": _arc("linear")._replace(options=lambda C: {"sub_centers": 3}, centres=3),
    "sphereface2-c": Loss(lambda C, D, **g: fm.SphereFace2(C, **g), sphereface2("C", 0.4)),
    "sphereface2-a": Loss(lambda C, D, **g: fm.SphereFace2(C, "A", **g), sphereface2("A", 0.5)),
    "sphereface2-m": Loss(lambda C, D, **g: fm.SphereFace2(C, "M", **g), sphereface2("M", 1.7)),
    "uniface": Loss(lambda C, D, **g: fm.UniFace(C, weight=1.5, **g), uniface),
    "uniface-bce": Loss(lambda C, D, **g: fm.UniFace(C, weight=1.5, per_class=True, **g), uniface),
    "label-smoothing": _arc("linear")._replace(rows=smoothed, options=lambda C: {"label_smoothing": 0.1}),
    "ga-linear": _reference(
        lambda **g: fm.GASoftmax("linear", 1.5, **g),
        _of_angle(lambda a: 1 - 2 * 1.5 * a / math.pi, lambda a: 1 - 2 * a / math.pi),
    ),
    "ga-cosine": _ce(lambda **g: fm.GASoftmax("cosine", 1.5, **g), lambda c: sphereface(c, 1.5)),
    "ga-sigmoid": _reference(
        lambda **g: fm.GASoftmax("sigmoid", 1.5, **g), _of_angle(lambda a: sigmoid_angle(1.5 * a), sigmoid_angle)
    ),
    "li-arcface": _reference(
        fm.LiArcFace, _of_angle(lambda a: 1 - 2 * (a + 0.45) / math.pi, lambda a: 1 - 2 * a / math.pi)
    ),
    "qamface": _reference(
        fm.QAMFace, _of_angle(lambda a: (2 * math.pi - a - 0.5) ** 2, lambda a: (2 * math.pi - a) ** 2), scale=1.0
    ),
    "sphereface-r-v2": _reference(fm.SphereFaceR, _v2),
    "sphereface-r-hard": _reference(lambda **g: fm.SphereFaceR(weight=5.0, **g), _quarter(_v2)),
    "sphereface-r-none": _reference(lambda **g: fm.SphereFaceR(norm="none", **g), _v2, scale="norm"),
    "sphereface-r-soft": _reference(lambda **g: fm.SphereFaceR(norm="soft", **g), _pull, scale="norm"),
    "sface": _reference(lambda **g: fm.SFace(8.0, **g), sface, exact=False),
    "p2sgrad": _reference(fm.P2SGrad, p2sgrad, scale=1.0),
}
