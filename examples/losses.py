"""The losses by name, as the demo trains them: what makes the head for a number of classes, and its numbers.

Scales are those at which the demo's small network trains well, not the papers', which are for larger networks.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import NamedTuple

import torch
from torch import nn

import fused_margin as fm

SCALE = 20.0
DIM = 128  # of the embeddings


class Term(NamedTuple):
    """A loss of (embeddings, labels) that is added to the head's."""

    factor: float
    name: str
    make: Callable[[int], nn.Module]  # takes the number of classes


class Entry(NamedTuple):
    """What a name stands for."""

    make: Callable[..., fm.Margin]  # takes the numbers by name, and `classes` where it needs their count
    numbers: tuple[str, ...] = ()
    scale: float | str = SCALE
    options: Callable[[int], dict] = lambda classes: {}
    of_classes: bool = False
    term: Term | None = None


def _counts(classes: int) -> torch.Tensor:
    return 1 + torch.arange(classes) % 9  # the demo's classes are of one size: made-up counts, for the mechanism


def _sphereface2(classes: int, kind: str = "C", gradient: str = "exact") -> fm.Margin:
    return fm.SphereFace2(classes, kind, weight=10, scale=SCALE, gradient=gradient)  # A, M: as published


def _centers(classes: int) -> nn.Module:
    return fm.CenterLoss(DIM, classes)


_RAW = {"normalize_embeddings": False, "normalize_weight": False}
LOSSES: dict[str, Entry] = {
    "softmax": Entry(fm.NormFace, scale=1.0, options=lambda c: {"bias": True, **_RAW}),
    "normface": Entry(fm.NormFace),
    "cosface": Entry(fm.CosFace, ("m",)),
    "arcface": Entry(fm.ArcFace, ("m",)),
    "combined": Entry(fm.CombinedMargin, ("m1", "m2", "m3")),
    "sphereface": Entry(fm.SphereFace, ("m",)),
    "a-softmax": Entry(lambda m=4: fm.SphereFace(int(m)), ("m",), "norm"),
    "annealed": Entry(lambda m=2, lam=5.0: fm.Annealed(fm.SphereFace(int(m)), lam), ("m", "lam"), "norm"),
    "l-softmax": Entry(lambda m=2: fm.LSoftmax(int(m)), ("m",), 1.0, lambda c: _RAW),
    "l-softmax-annealed": Entry(
        lambda m=4, lam=5.0: fm.Annealed(fm.LSoftmax(int(m)), lam), ("m", "lam"), 1.0, lambda c: _RAW
    ),
    "sphereface-r-v0": Entry(lambda m=1.4: fm.SphereFaceR(m, 0), ("m",)),
    "sphereface-r-v1": Entry(lambda m=1.4: fm.SphereFaceR(m, 1), ("m",)),
    "sphereface-r-v2": Entry(lambda m=1.4: fm.SphereFaceR(m, 2), ("m",)),
    "sphereface-r-hard": Entry(lambda m=1.4, weight=30.0: fm.SphereFaceR(m, weight=weight), ("m", "weight")),
    "sphereface-r-none": Entry(lambda m=1.4: fm.SphereFaceR(m, norm="none"), ("m",), "norm"),
    "sphereface-r-soft": Entry(lambda m=1.4: fm.SphereFaceR(m, norm="soft"), ("m",), "norm"),
    "airface": Entry(lambda m=0.4: fm.LiArcFace(m, "cosine"), ("m",)),
    "li-arcface": Entry(fm.LiArcFace, ("m",)),
    "x2-softmax": Entry(fm.X2Softmax, ("a", "h", "k")),
    "ga-linear": Entry(lambda m=1.5: fm.GASoftmax("linear", m), ("m",)),
    "ga-cosine": Entry(lambda m=1.5: fm.GASoftmax("cosine", m), ("m",)),
    "ga-sigmoid": Entry(lambda m=1.5: fm.GASoftmax("sigmoid", m), ("m",)),
    "qamface": Entry(fm.QAMFace, ("m",), 2.0),
    "hm-softmax": Entry(fm.NormFace, options=lambda c: {"mining": fm.HardRows(0.9)}),
    "f-softmax": Entry(fm.NormFace, options=lambda c: {"mining": fm.Focal(2)}),
    "f-softmax-detached": Entry(fm.NormFace, options=lambda c: {"mining": fm.Focal(2, gradient="detached")}),
    "mining-margin": Entry(fm.ArcFace, ("m",), options=lambda c: {"mining": fm.Focal(2)}),
    "sv-softmax": Entry(fm.SVSoftmax, ("t",)),
    "sv-x-am": Entry(lambda t=1.2, m=0.35: fm.SVSoftmax(t, fm.CosFace(m)), ("t", "m")),
    "sv-x-arc": Entry(lambda t=1.2, m=0.5: fm.SVSoftmax(t, fm.ArcFace(m)), ("t", "m")),
    "sv-x-psi": Entry(lambda t=1.1, m=2: fm.SVSoftmax(t, fm.SphereFace(m)), ("t", "m")),
    "mv-am": Entry(fm.MVSoftmax, ("t", "m")),
    "mv-am-fixed": Entry(partial(fm.MVSoftmax, mode="fixed"), ("t", "m")),
    "mv-am-easy-margin": Entry(partial(fm.MVSoftmax, easy="margin"), ("t", "m")),
    "mv-arc": Entry(partial(fm.MVSoftmax, kind="arc"), ("t", "m")),
    "mv-arc-fixed": Entry(partial(fm.MVSoftmax, kind="arc", mode="fixed", easy=None), ("t", "m")),
    "curricularface": Entry(fm.CurricularFace, ("m",)),
    "npcface": Entry(fm.NPCFace, ("m", "m0", "m1")),
    "arcnegface": Entry(fm.ArcNegFace, ("m",)),
    "eqm": Entry(fm.EqM, ("t1", "t2", "offset")),
    "eqm-offset-0": Entry(partial(fm.EqM, offset=0.0), ("t1", "t2")),
    "filter": Entry(fm.InterclassFilter, ("above",)),
    "circle": Entry(fm.CircleLoss, ("m",), 40.0),
    "adaface": Entry(fm.AdaFace, ("m", "h")),
    "magface": Entry(lambda l_a=5.0, u_a=30.0: fm.MagFace(l_a, u_a), ("l_a", "u_a")),
    "elasticface-arc": Entry(fm.ElasticFace, ("m", "sigma")),
    "elasticface-cos": Entry(lambda m=0.35, sigma=0.05: fm.ElasticFace(m, sigma, "cos"), ("m", "sigma")),
    "elasticface+": Entry(lambda m=0.5, sigma=0.0175: fm.ElasticFace(m, sigma, plus=True), ("m", "sigma")),
    "adacos-fixed": Entry(fm.NormFace, options=lambda c: {"scale": fm.AdaCos(c, dynamic=False)}),
    "adacos": Entry(fm.NormFace, options=lambda c: {"scale": fm.AdaCos(c)}),
    "dynamic-margins": Entry(lambda classes: fm.ArcFace(fm.margins_by_count(_counts(classes))), of_classes=True),
    "adam-softmax": Entry(lambda classes: fm.AdaMSoftmax(classes, weight=1.0), of_classes=True),
    "kappaface": Entry(lambda classes: fm.KappaFace(_counts(classes), DIM), of_classes=True),
    "sub-center": Entry(fm.ArcFace, ("m",), options=lambda c: {"sub_centers": 3}),
    "sphereface2-c": Entry(_sphereface2, of_classes=True),
    "sphereface2-a": Entry(partial(_sphereface2, kind="A", gradient="detached"), of_classes=True),
    "sphereface2-m": Entry(partial(_sphereface2, kind="M", gradient="detached"), of_classes=True),
    "uniface": Entry(lambda classes: fm.UniFace(classes), of_classes=True),
    "uniface-bce": Entry(lambda classes: fm.UniFace(classes, per_class=True), of_classes=True),
    "label-smoothing": Entry(fm.ArcFace, ("m",), options=lambda c: {"label_smoothing": 0.1}),
    "sface": Entry(fm.SFace, ("k", "a", "b")),
    "p2sgrad": Entry(fm.P2SGrad, scale=1.0),
    "center": Entry(
        fm.NormFace, (), 1.0, lambda c: {"bias": True, **_RAW}, term=Term(0.003 / 2, "CenterLoss", _centers)
    ),
    "contrastive": Entry(fm.NormFace, term=Term(1.0, "contrastive", lambda c: fm.pairs.contrastive())),
    "triplet": Entry(fm.NormFace, term=Term(1.0, "triplet", lambda c: fm.pairs.triplet())),
}


def described(value: object) -> str:
    """A margin or another record as one types it, with its numbers; of its tensors, the shapes of those that learn."""
    if isinstance(value, fm.PerClass):
        return "a value a class"
    if isinstance(value, (Real, str)):
        return f"{value:g}" if isinstance(value, float) else repr(value)
    names = [f.name for f in dataclasses.fields(value) if f.init] if dataclasses.is_dataclass(value) else []
    names = names or [name for name in inspect.signature(type(value)).parameters if name != "num_classes"]
    held = {name: getattr(value, name, None) for name in names}
    said = {n: v for n, v in held.items() if isinstance(v, (Real, str, fm.Margin, fm.PerClass)) and v is not False}
    text = f"{type(value).__name__}({', '.join(f'{n}={described(v)}' for n, v in said.items() if v != 'exact')})"
    learned = value.named_parameters() if isinstance(value, nn.Module) else ()
    return " ".join([text, *(f"learns {name} {list(parameter.shape)}" for name, parameter in learned)])


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

    def term(self, classes: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """What is added to the head's loss, if anything is."""
        term = LOSSES[self.name].term
        if term is None:
            return None
        loss = term.make(classes)
        return lambda embeddings, labels: term.factor * loss(embeddings, labels)

    def described(self, classes: int) -> str:
        """What is trained, with its numbers."""
        options, term = self.head(classes), LOSSES[self.name].term
        margin, scale = described(options.pop("margin")), options.pop("scale")
        raw = [options.pop(name) for name in _RAW if name in options]
        parts = [
            margin + (f" + {term.factor:g} {term.name}" if term else ""),
            f"scale {scale if isinstance(scale, str) else described(scale)}",
            *(f"{name} {described(value)}" for name, value in options.items()),
        ]
        return ", ".join(parts + ["raw products"] * bool(raw))

    def has_kernel(self, classes: int) -> bool:
        return not fm.why_not("cpu", self.margin(classes))

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} = {value:g}" for name, value in self.numbers.items())
        return self.name + (f" ({numbers})" if numbers else "")
