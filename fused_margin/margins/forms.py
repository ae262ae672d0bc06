"""Margins that kernels know: T and the threshold as records of plain numbers; csrc/margins.h computes them, with slope.

A margin of a type that is not listed here, or one that holds a tensor, is computed on [B] by PyTorch, as any user's is:
the sweep is the same. The formulas stand in `Margin.target` and in csrc/margins.h; tests/test_forms.py holds them
together.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

from .angular import TAILS, ArcFace, CombinedMargin, SphereFace
from .base import Margin
from .mining import ArcNegFace, SVSoftmax
from .softmax import CosFace, NormFace

KINDS = ("cosine", "angle", "multiple")  # c - m3; cos(m1 theta + m2) - m3 with a tail; psi(m1 theta)


class Form(NamedTuple):
    """One transform, as codes and numbers."""

    kind: str = "cosine"
    tail: str = "raw"
    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0


class Forms(NamedTuple):
    """What a kernel needs of a margin."""

    target: Form
    threshold: Form | None = None  # tau, for a rule that needs one

    def packed(self) -> list[float]:
        """Five numbers for each form, as csrc/margins.h reads them."""
        return [
            float(number)
            for form in self
            if form is not None
            for number in (KINDS.index(form.kind), TAILS.index(form.tail), *form[2:])
        ]


def _sv(margin: SVSoftmax) -> Forms | None:
    base = forms_of(margin.base)
    return None if base is None else Forms(base.target, base.target)


_FORMS: dict[type[Margin], Callable[..., Forms | None]] = {  # by exact type: a subclass may define another target
    NormFace: lambda margin: Forms(Form()),
    CosFace: lambda margin: Forms(Form(m3=margin.m)),
    ArcFace: lambda margin: Forms(Form("angle", margin.tail, m2=margin.m)),
    SphereFace: lambda margin: Forms(Form("multiple", m1=margin.m)),
    CombinedMargin: lambda margin: Forms(Form("angle", margin.tail, margin.m1, margin.m2, margin.m3)),
    ArcNegFace: lambda margin: Forms(Form("angle", "linear", m2=margin.m), Form("angle", "linear", m2=margin.m)),
    SVSoftmax: _sv,
}


def forms_of(margin: Margin) -> Forms | None:
    """The forms of a margin; None where it is not one that kernels know, or its parameters are no plain numbers."""
    make = _FORMS.get(type(margin))
    forms = None if make is None else make(margin)
    known = forms is not None and all(isinstance(m, Real) for form in forms if form for m in form[2:])
    return forms if known else None
