"""The losses by name, as the demo trains them: what makes the head for a number of classes, and its numbers.

Scales are those at which the demo's small network trains well, not the papers', which are for larger networks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import fused_margin as fm

SCALE = 20.0


class Entry(NamedTuple):
    """What a name stands for."""

    make: Callable[..., fm.Margin]  # takes the numbers by name, and `classes` where it needs their count
    numbers: tuple[str, ...] = ()
    scale: float | str = SCALE
    options: Callable[[int], dict] = lambda classes: {}
    of_classes: bool = False


def _counts(classes: int) -> torch.Tensor:
    return 1 + torch.arange(classes) % 9  # the demo's classes are of one size: made-up counts, for the mechanism


def _sphereface2(classes: int, kind: str = "C", gradient: str = "exact") -> fm.Margin:
    return fm.SphereFace2(classes, kind, weight=10, scale=SCALE, gradient=gradient)  # A, M: as published


_RAW = {"normalize_embeddings": False, "normalize_weight": False}
LOSSES: dict[str, Entry] = {
    "softmax": Entry(fm.NormFace, scale=1.0, options=lambda c: {"bias": True, **_RAW}),
    "normface": Entry(fm.NormFace),
    "cosface": Entry(fm.CosFace, ("m",)),
    "arcface": Entry(fm.ArcFace, ("m",)),
    "combined": Entry(fm.CombinedMargin, ("m1", "m2", "m3")),
    "sphereface": Entry(fm.SphereFace, ("m",)),
    "a-softmax": Entry(lambda m=2: fm.Annealed(fm.SphereFace(int(m)), 5.0), ("m",), "norm"),
    "l-softmax": Entry(lambda m=2: fm.LSoftmax(int(m)), ("m",), 1.0, lambda c: _RAW),
    "sphereface-r-v0": Entry(lambda m=1.4: fm.SphereFaceR(m, 0), ("m",)),
    "sphereface-r-v1": Entry(lambda m=1.4: fm.SphereFaceR(m, 1), ("m",)),
    "sphereface-r-v2": Entry(lambda m=1.4: fm.SphereFaceR(m, 2), ("m",)),
    "airface": Entry(lambda m=0.4: fm.LiArcFace(m, "cosine"), ("m",)),
    "li-arcface": Entry(fm.LiArcFace, ("m",)),
    "x2-softmax": Entry(fm.X2Softmax, ("a", "h", "k")),
    "ga-linear": Entry(lambda m=1.5: fm.GASoftmax("linear", m), ("m",)),
    "ga-cosine": Entry(lambda m=1.5: fm.GASoftmax("cosine", m), ("m",)),
    "ga-sigmoid": Entry(lambda m=1.5: fm.GASoftmax("sigmoid", m), ("m",)),
    "qamface": Entry(fm.QAMFace, ("m",), 2.0),
    "hm-softmax": Entry(fm.NormFace, options=lambda c: {"mining": fm.HardRows(0.9)}),
    "f-softmax": Entry(fm.NormFace, options=lambda c: {"mining": fm.Focal(2)}),
    "mining-margin": Entry(fm.ArcFace, ("m",), options=lambda c: {"mining": fm.Focal(2)}),
    "svsoftmax": Entry(fm.SVSoftmax, ("t",)),
    "sv-cosface": Entry(lambda t=1.2, m=0.35: fm.SVSoftmax(t, fm.CosFace(m)), ("t", "m")),
    "sv-arcface": Entry(lambda t=1.2, m=0.5: fm.SVSoftmax(t, fm.ArcFace(m)), ("t", "m")),
    "mv-am": Entry(fm.MVSoftmax, ("t", "m")),
    "mv-arc": Entry(lambda t=0.2, m=0.35: fm.MVSoftmax(t, m, "arc"), ("t", "m")),
    "curricularface": Entry(fm.CurricularFace, ("m",)),
    "npcface": Entry(fm.NPCFace, ("m", "m0", "m1")),
    "arcnegface": Entry(fm.ArcNegFace, ("m",)),
    "eqm": Entry(fm.EqM, ("t1", "t2", "offset")),
    "filter": Entry(fm.InterclassFilter, ("above",)),
    "circle": Entry(fm.CircleLoss, ("m",), 40.0),
    "adaface": Entry(fm.AdaFace, ("m", "h")),
    "magface": Entry(lambda l_a=5.0, u_a=30.0: fm.MagFace(l_a, u_a), ("l_a", "u_a")),
    "elasticface": Entry(fm.ElasticFace, ("m", "sigma")),
    "elasticface-cos": Entry(lambda m=0.35, sigma=0.05: fm.ElasticFace(m, sigma, "cos"), ("m", "sigma")),
    "elasticface+": Entry(lambda m=0.5, sigma=0.0175: fm.ElasticFace(m, sigma, plus=True), ("m", "sigma")),
    "adacos-fixed": Entry(fm.NormFace, options=lambda c: {"scale": fm.AdaCos(c, dynamic=False)}),
    "adacos": Entry(fm.NormFace, options=lambda c: {"scale": fm.AdaCos(c)}),
    "dynamic-margins": Entry(lambda classes: fm.ArcFace(fm.margins_by_count(_counts(classes))), of_classes=True),
    "adam-softmax": Entry(lambda classes: fm.AdaMSoftmax(classes, weight=1.0), of_classes=True),
    "kappaface": Entry(lambda classes: fm.KappaFace(_counts(classes), 128), of_classes=True),
    "sub-center": Entry(fm.ArcFace, ("m",), options=lambda c: {"sub_centers": 3}),
    "sphereface2-c": Entry(_sphereface2, of_classes=True),
    "sphereface2-a": Entry(partial(_sphereface2, kind="A", gradient="detached"), of_classes=True),
    "sphereface2-m": Entry(partial(_sphereface2, kind="M", gradient="detached"), of_classes=True),
    "uniface": Entry(lambda classes: fm.UniFace(classes), of_classes=True),
    "label-smoothing": Entry(fm.ArcFace, ("m",), options=lambda c: {"label_smoothing": 0.1}),
    "sface": Entry(fm.SFace, ("k", "a", "b")),
    "p2sgrad": Entry(fm.P2SGrad, scale=1.0),
}


class Loss(NamedTuple):
    """A loss that was chosen: its name, its numbers, a scale in place of the entry's."""

    name: str
    numbers: dict[str, float] = {}  # noqa: RUF012 (read only)
    scale: float | str | None = None

    def margin(self, classes: int) -> fm.Margin:
        entry = LOSSES[self.name]
        return entry.make(**self.numbers, **({"classes": classes} if entry.of_classes else {}))

    def head(self, classes: int) -> dict:
        """Arguments of MarginHead."""
        entry = LOSSES[self.name]
        scale = entry.scale if self.scale is None else self.scale
        return {"margin": self.margin(classes), "scale": scale} | entry.options(classes)

    def has_kernel(self, classes: int) -> bool:
        return not fm.why_not("cpu", spec=fm.functional.Spec(rule=self.margin(classes).rule().name))

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} = {value:g}" for name, value in self.numbers.items())
        return self.name + (f" ({numbers})" if numbers else "")
