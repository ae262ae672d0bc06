"""Numerical hazards: c = +-1, large logits, floors, ties, zero norms, 16 bit; and bad hyper-parameters."""

import math

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from .cases import FP32
from .loss_table import LOSSES
from .test_losses import data, options


def fused(name):
    """Both backends where the loss has a kernel."""
    return ("reference", "cpu") if LOSSES[name].kernel and not fm.why_not("cpu") else ("reference",)


def run(name, x, w, labels, backend, **more):
    loss = LOSSES[name]
    torch.manual_seed(0)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    margin = loss.make(len(w) // loss.centres, x.shape[1])
    rows = margin_cross_entropy(
        x, w, labels, margin, reduction="none", backend=backend, **options(loss, len(w) // loss.centres) | more
    )
    return rows.detach(), *torch.autograd.grad(rows.sum(), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_class_centres_or_their_opposites(name, dtype):
    """c = 1 and -1 for targets and rivals, and duplicate classes: all is finite, in every operand dtype."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 8, generator=g)
    w[1], w[2] = w[0], -w[0]
    w = w.repeat_interleave(LOSSES[name].centres, 0)
    x = torch.stack([w[0], -w[0], w[0] * 3, torch.randn(8, generator=g)])
    for backend in fused(name):
        for t in run(name, x, w, torch.tensor([0, 0, 2, 4]), backend, compute_dtype=dtype):
            assert t.isfinite().all(), backend


@pytest.mark.parametrize("name", LOSSES)
def test_zero_rows_are_finite(name):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6 * LOSSES[name].centres, 8, generator=g)
    x = torch.randn(3, 8, generator=g)
    x[0], w[-1] = 0, 0
    for backend in fused(name):
        for t in run(name, x, w, torch.tensor([0, 5, 2]), backend):
            assert t.isfinite().all(), backend


def _rows(name, x, w, labels, backend):
    """Losses and gradients, and the state that the loss leaves behind."""
    loss = LOSSES[name]
    torch.manual_seed(0)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    margin = loss.make(len(w) // loss.centres, x.shape[1])
    given = options(loss, len(w) // loss.centres)
    rows = margin_cross_entropy(x, w, labels, margin, reduction="none", backend=backend, **given)
    grads = torch.autograd.grad(rows.sum(), (x, w))
    modules = [m for m in (margin, given["scale"]) if isinstance(m, torch.nn.Module)]
    return rows.detach(), *grads, [b for m in modules for b in m.buffers()]


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_nan_rows_take_no_part(name):
    """Nor in the batch's statistics, the draws, the ranks or the state: bit for bit what the other rows give."""
    x, w, labels = data(name, FP32, 0, (12, 30, 8))
    labels = labels.clone()
    labels[[1, 7]] = -100
    bad = x.clone()
    bad[1], bad[7, 2] = torch.nan, torch.inf
    for backend in fused(name):
        *expected, state = _rows(name, x, w, labels, backend)
        *got, after = _rows(name, bad, w, labels, backend)
        for a, b in zip([*got, *after], [*expected, *state], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


OF_THE_BATCH = ("hm-softmax", "curricularface", "adaface", "adacos", "elasticface+")  # a row changes the others'


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_row_shows_and_spoils_no_other(name, value):
    """Its loss and gradient are NaN; the others' are what they are without it, and no state takes it in."""
    x, w, labels = data(name, FP32, 0, (12, 30, 8))
    labels = torch.where(labels < 0, 3, labels)
    bad, others = x.clone(), torch.arange(12) != 4
    bad[4, 2] = value
    for backend in fused(name):
        expected = _rows(name, x, w, labels, backend)
        loss, d_x, d_w, state = _rows(name, bad, w, labels, backend)
        assert loss[4].isnan()
        assert d_x[4].isnan().all()
        assert d_w.isnan().any()
        assert all(t.isfinite().all() for t in (loss[others], d_x[others], *state)), backend
        if name not in OF_THE_BATCH:
            torch.testing.assert_close(loss[others], expected[0][others], rtol=0, atol=0)
            torch.testing.assert_close(d_x[others], expected[1][others], rtol=0, atol=0)


LARGE = {  # largest logit, beyond float32's 88 for a sum of plain exponentials
    "sv": (lambda: fm.SVSoftmax(1.2), 64.0, 64 * 1.4),
    "curricular": (lambda: _curricular(1.0), 64.0, 128.0),
    "circle": (lambda: fm.CircleLoss(0.25), 256.0, 256 * 1.25 * 0.75),
    "psi": (lambda: fm.SphereFace(4), 1000.0, 1000.0),
    "qam": (fm.QAMFace, 6.0, 6 * 4 * math.pi**2),  # no kernel
}


def _curricular(t):
    margin = fm.CurricularFace().eval()
    margin.t.fill_(t)
    return margin


@pytest.mark.parametrize("name", LARGE)
def test_logits_beyond_the_range_of_exp(name, backend):
    """A rival at c = 1 and a target at -1: the loss is the difference of the two logits."""
    make, scale, largest = LARGE[name]
    if reasons := fm.why_not(backend, make()):
        pytest.skip(f"{backend}: {reasons[0]}")
    w = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
    w[1] = -w[0]
    x = (-w[:1]).clone().requires_grad_()  # label 0: c_y = -1; class 1: c = 1
    margin = make()
    loss = margin_cross_entropy(x, w, torch.tensor([0]), margin, scale=scale, backend=backend)
    z = scale * _target(margin, w.new_tensor([-1.0])).item()
    assert loss.item() == pytest.approx(largest - z, rel=1e-5)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def _target(margin, c):
    found = fm.RowStats(torch.ones(1, dtype=torch.bool), 5, c.dtype, c)
    return margin.prepare(found, torch.zeros(1).long()).target(c)


def test_eqm_floor_and_pairs(backend):
    """log C where nothing is left to do, with gradient 0; else log(1 + sum exp s([t1 - c_y]_+ + [c_j - t2]_+))."""
    w = torch.eye(6, dtype=torch.float64)
    x = torch.eye(6, dtype=torch.float64)[:3].requires_grad_()
    loss = margin_cross_entropy(x, w, torch.arange(3), fm.EqM(0.75, 0.25), scale=32.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(6))
    assert not torch.autograd.grad(loss, x)[0].any()
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (8, 20))
    labels, cos = torch.arange(8), F.normalize(x) @ F.normalize(w).T
    pair = torch.relu(0.6 - cos[range(8), labels])[:, None] + torch.relu(cos - 0.2)
    rival = torch.ones_like(pair).scatter(1, labels[:, None], 0)
    expected = torch.log1p((rival * torch.exp(16 * pair)).sum(1))
    got = margin_cross_entropy(x, w, labels, fm.EqM(0.6, 0.2), scale=16.0, reduction="none", backend=backend)
    torch.testing.assert_close(got, expected)


def _curricular_of_no_margin():
    margin = fm.CurricularFace(0.0).eval()
    margin.t.fill_(0.5)
    return margin


@pytest.mark.parametrize(
    "margin",
    [
        fm.SVSoftmax(1.2),
        fm.MVSoftmax(m=0.0),
        fm.InterclassFilter(1.0, fm.NormFace()),
        _curricular_of_no_margin(),
        fm.NPCFace(0.0, 0.0, 0.3),  # the mean of no hard rival is 0
    ],
)
def test_a_tie_is_not_hard(margin, backend):
    """Strict comparisons: a rival exactly at the threshold is left alone."""
    w = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]].contiguous()
    x = torch.eye(4, dtype=torch.float64)[:1]
    got = margin_cross_entropy(x, w, torch.tensor([0]), margin, scale=4.0, backend=backend)
    expected = F.cross_entropy(4 * x @ w.T, torch.tensor([0]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("c_y, margin", [(0.0, fm.EqM(0.0, -0.5)), (1.0, fm.EqM(0.5, 0.0))], ids=["t1", "t2"])
def test_at_a_bound_the_slope_is_0(c_y, margin, backend):
    """EqM with the target's cosine exactly t1, or all rivals' exactly t2."""
    w = torch.eye(4, dtype=torch.float64).requires_grad_()
    x = torch.eye(4, dtype=torch.float64)[0 if c_y else 1][None].requires_grad_()
    labels = torch.tensor([0])
    loss = margin_cross_entropy(x, w, labels, margin, scale=4.0, backend=backend)
    t = min(c_y, margin.t1) - (margin.t1 - margin.t2)
    rivals = [max(c, margin.t2) for c in ((0.0, 0.0, 0.0) if c_y else (1.0, 0.0, 0.0))]
    expected = math.log(1 + sum(math.exp(4 * (r - t)) for r in rivals))
    assert loss.item() == pytest.approx(expected)
    (d_w,) = torch.autograd.grad(loss, w)
    assert not d_w[0].any(), "the target's"
    assert bool(d_w[2:].any()) == (not c_y), "the rivals'"


def test_a_margin_module_is_not_called():
    with pytest.raises(TypeError, match="CurricularFace is a margin: pass it to a head"):
        fm.CurricularFace()(torch.zeros(3))


@pytest.mark.parametrize("margin", [fm.LSoftmax(), fm.Annealed(fm.LSoftmax())], ids=["plain", "annealed"])
def test_a_margin_on_products_refuses_cosines(margin):
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=f"{type(margin).__name__} works on products of raw rows"):
        margin_cross_entropy(x, w, torch.tensor([0, 1]), margin)
