"""The table of the losses that are tested: how the library makes each, and what it means, as loss_oracle.py has it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fused_margin as fm

from .loss_oracle import (
    Dense,
    adacos,
    adaface,
    adam,
    arcneg,
    by_count,
    curricular,
    elastic,
    focal,
    hard,
    hardest,
    kappa,
    l_softmax,
    magface,
    npc,
    p2sgrad,
    sface,
    sigmoid_angle,
    smoothed,
    softmax,
    sphereface2,
    turn,
    uniface,
)
from .oracle import arcface, combined, sphereface


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
    "l-softmax-annealed": Loss(
        lambda C, D, **g: fm.Annealed(fm.LSoftmax(4), 5.0, **g), partial(l_softmax, lam=5.0), products=True, scale=1.0
    ),
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
        lambda C, D, **g: fm.ElasticFace(0.4, 0.05, plus=True, kind="cos", **g), elastic(lambda c, m: c - m, 0.4, True)
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
