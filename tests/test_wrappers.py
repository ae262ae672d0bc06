"""Margins that change another one: all that the base brings stays, or the two are refused."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy
from fused_margin.rules import Rule

from . import oracle
from .cases import spread

B, C, D, S = 16, 20, 8, 12.0
BIAS = torch.linspace(-1, 1, C, dtype=torch.float64)


@pytest.fixture
def inputs():
    x, w, labels = spread(B, C, D, 3)
    labels[5] = -100
    return x.requires_grad_(), w.requires_grad_(), labels


@dataclass(frozen=True, eq=False)
class Everything(fm.Margin):
    """A base that uses each part of the interface that a wrapper might drop."""

    norms: fm.PerSample | None = field(default=None, init=False)
    needs: ClassVar[tuple[str, ...]] = ("norm",)
    default_scale: ClassVar[float] = 7.0

    def prepare(self, rows, labels):
        return self.replaced(norms=fm.PerSample(rows.norm))

    def target(self, cos_y):
        return cos_y - 0.1

    def bias(self):
        return BIAS

    def row_loss(self, out):
        return 3.0 * super().row_loss(out)

    def penalty(self):
        return 0.5 * self.norms


WRAPPERS = {  # and N, where the target's logit is T
    "annealed": (lambda base: fm.Annealed(base, 2.0), lambda c, t: c, lambda c, t: (2 * c + t) / 3),
    "sv": (lambda base: fm.SVSoftmax(1.2, base), lambda c, t: torch.where(c > t[:, None], 1.2 * c + 0.2, c), None),
    "filter": (lambda base: fm.InterclassFilter(0.3, base), lambda c, t: torch.where(c > 0.3, 0.0, c), None),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_nothing_of_the_base_is_dropped(name, inputs, backend):
    """Its bias, its loss of a row, its penalty and its scale."""
    wrap, rivals, mixed = WRAPPERS[name]
    x, w, labels = inputs
    margin = wrap(Everything())
    got = margin_cross_entropy(x, w, labels, margin, scale=S, reduction="none", backend=backend)
    y = labels.clamp_min(0)
    found = oracle.cosines(x, w, y)
    t = found.c_y - 0.1
    n = rivals(found.c, t.detach())
    t = t if mixed is None else mixed(found.c_y, t)
    logits = S * torch.where(found.rival, n, t[:, None]) + BIAS
    expected = 3 * F.cross_entropy(logits, y, reduction="none") + 0.5 * x.norm(dim=1)
    expected = torch.where(labels >= 0, expected, 0.0)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b)
    own = {"annealed": 7.0, "filter": 7.0, "sv": 30.0}[name]
    assert fm.MarginHead(D, C, margin).scale == own


def test_what_comes_after_the_sweep_reaches_the_base(inputs, backend):
    """SV's hard rivals, for a base that asks for their mean cosine."""

    @dataclass(frozen=True, eq=False)
    class ByHardRivals(fm.Margin):
        mean: torch.Tensor | None = field(default=None, init=False)
        needs: ClassVar[tuple[str, ...]] = ("hard_mean",)
        constants: ClassVar[bool] = True

        def after(self, hard_mean):
            return self.replaced(mean=hard_mean)

        def target(self, cos_y):
            return cos_y if self.mean is None else cos_y - self.mean

    x, w, labels = inputs
    margin = fm.SVSoftmax(1.2, ByHardRivals())
    assert margin.constants
    got = margin_cross_entropy(x, w, labels, margin, scale=S, reduction="none", backend=backend)
    found = oracle.cosines(x, w, labels.clamp_min(0))
    hard = found.rival & (found.c > found.c_y[:, None])
    mean = (torch.where(hard, found.c, 0.0).sum(1) / hard.sum(1).clamp_min(1)).detach()
    n = torch.where(hard, 1.2 * found.c + 0.2, found.c)
    logits = S * torch.where(found.rival, n, (found.c_y - mean)[:, None])
    expected = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
    valid = labels >= 0
    torch.testing.assert_close(got[valid], expected[valid])


def test_sphereface_r_keeps_its_weight(inputs):
    x, w, labels = inputs
    base = fm.SphereFaceR(1.3, 1, weight=50.0)
    got = margin_cross_entropy(x, w, labels, fm.SVSoftmax(1.0, base), scale=S)  # t = 1 masks nothing
    torch.testing.assert_close(got, margin_cross_entropy(x, w, labels, base, scale=S))
    assert fm.SVSoftmax(1.2, fm.SphereFaceR(1.3, 0, "none")).default_scale == "norm"


@dataclass(frozen=True, eq=False)
class _Filtered(fm.Margin):
    def target(self, cos_y):
        return cos_y

    def rule(self):
        return Rule("filter", (0.3,))


class _RuleInItsRecord(fm.StatefulMargin):
    def prepare(self, rows, labels):
        return _Filtered()


@pytest.mark.parametrize("wrap", [fm.Annealed, lambda m: fm.SVSoftmax(1.2, m), lambda m: fm.InterclassFilter(0.4, m)])
def test_a_base_with_a_rule_is_refused(wrap, inputs):
    for base in (fm.CurricularFace(), fm.EqM(), fm.CircleLoss(), fm.NPCFace(), fm.SFace(), fm.UniFace(C)):
        with pytest.raises(TypeError, match=f"base = {type(base).__name__} has a rival rule of its own"):
            wrap(base)
    margin = wrap(_RuleInItsRecord())  # known only where the batch is
    with pytest.raises(TypeError, match="base = _Filtered has a rival rule of its own, and a row's"):
        margin_cross_entropy(*inputs, margin)


def _adaface():
    margin = fm.AdaFace(0.4).double()
    margin.mean.fill_(1.0)
    margin.std.fill_(0.25)
    return margin.eval()


def _of_quality(c, norm, y):
    """2204.00964, q a constant; no target cosine here is near +-1."""
    q = (0.333 * (norm.detach() - 1.0) / (0.25 + 1e-3)).clamp(-1, 1)
    return torch.cos((torch.acos(c) - 0.4 * q).clamp(1e-3, math.pi - 1e-3)) - (0.4 + 0.4 * q)


PER_ROW = {  # margins of each row by itself, and the target transform of the oracle
    "per sample": (
        lambda: fm.ArcFace(fm.PerSample(torch.linspace(0.1, 0.7, B, dtype=torch.float64)), "raw"),
        lambda c, norm, y: torch.cos(torch.acos(c) + torch.linspace(0.1, 0.7, B, dtype=torch.float64)),
    ),
    "per class": (
        lambda: fm.CosFace(fm.PerClass(torch.linspace(0.0, 0.5, C, dtype=torch.float64))),
        lambda c, norm, y: c - torch.linspace(0.0, 0.5, C, dtype=torch.float64)[y],
    ),
    "magface": (
        lambda: fm.MagFace(0.5, 1.5, 0.2, 0.8, 0.0, "raw"),
        lambda c, norm, y: torch.cos(torch.acos(c) + 0.2 + 0.6 * (norm.clamp(0.5, 1.5) - 0.5)),
    ),
    "adaface": (_adaface, _of_quality),
}


@pytest.mark.parametrize("name", PER_ROW)
def test_sv_x_masks_each_row_by_its_own_margin(name, inputs, backend):
    """arXiv 1812.11317 eq. 13: f of the row in both numerator and mask."""
    make, target = PER_ROW[name]
    x, w, labels = inputs
    y, valid = labels.clamp_min(0), labels >= 0
    found = oracle.cosines(x, w, y)
    t = target(found.c_y, x.norm(dim=1), y)
    tau = t.detach()[:, None]
    hard = found.rival & (found.c > tau)
    assert (hard & ~(found.c > found.c_y[:, None]))[valid].any(), "a mask without the margin is another one"
    n = torch.where(hard, 1.2 * found.c + 0.2, found.c)
    expected = F.cross_entropy(S * torch.where(found.rival, n, t[:, None]), y, reduction="none")[valid]
    got = margin_cross_entropy(x, w, labels, fm.SVSoftmax(1.2, make()), scale=S, reduction="none", backend=backend)
    torch.testing.assert_close(got[valid], expected)
    for a, b in zip(torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_bias_of_the_margin_and_one_of_the_call(inputs):
    class Biased(fm.Margin):
        def target(self, cos_y):
            return cos_y

        def bias(self):
            return torch.zeros(C, dtype=torch.float64)

    with pytest.raises(ValueError, match="Biased has a bias of its own; expected bias=None"):
        margin_cross_entropy(*inputs, Biased(), bias=torch.zeros(C, dtype=torch.float64))
    assert margin_cross_entropy(*inputs, Biased()).isfinite()
