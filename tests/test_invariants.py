"""What must not change the result, and what it must be equal to, whatever the formula of the loss."""

import pytest
import torch

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from . import oracle
from .cases import FP64, MARGINS, problem

TOLERANCE = 1e-10


def run(x, w, labels, margin, backend, scale=32.0):
    """Losses [B] and the gradients of x and w under an upstream gradient that differs from row to row."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = margin_cross_entropy(x, w, labels, margin, scale=scale, reduction="none", backend=backend)
    d_x, d_w = torch.autograd.grad(loss, (x, w), torch.sin(torch.arange(len(x), dtype=x.dtype)) + 2)
    return loss.detach(), d_x, d_w


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))


@pytest.fixture(params=MARGINS)
def given(request):
    """x, w, labels and a margin whose parameters are floats."""
    case = MARGINS[request.param]
    p = problem(case, FP64, 20, 30, 12, seed=3)
    return p.tensors["x"], p.tensors["w"], p.labels, case.make(case.params)


def test_rotation(backend, given):
    x, w, labels, margin = given
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    loss, d_x, d_w = run(x, w, labels, margin, backend)
    assert_equal(run(x @ turn, w @ turn, labels, margin, backend), (loss, d_x @ turn, d_w @ turn))


def test_permutation_of_classes(backend, given):
    x, w, labels, margin = given
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    loss, d_x, d_w = run(x, w, labels, margin, backend)
    assert_equal(run(x, w[order], order.argsort()[labels], margin, backend), (loss, d_x, d_w[order]))


def test_permutation_of_rows(backend, given):
    x, w, labels, margin = given
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    x, w = x.requires_grad_(), w.requires_grad_()
    results = []
    for rows in (torch.arange(20), order):
        loss = margin_cross_entropy(x[rows], w, labels[rows], margin, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    assert_equal(results[1], results[0])


def test_scaling_of_embeddings_and_weights(backend, given):
    """Losses stay; a gradient shrinks as its tensor grows."""
    x, w, labels, margin = given
    by_x, by_w = (0.1 + torch.rand(n, 1, dtype=torch.float64).exp() for n in (20, 30))
    loss, d_x, d_w = run(x, w, labels, margin, backend)
    assert_equal(run(by_x * x, by_w * w, labels, margin, backend), (loss, d_x / by_x, d_w / by_w))


def test_gradient_is_orthogonal_to_each_normalised_row(backend, given):
    x, w, labels, margin = given
    _, d_x, d_w = run(x, w, labels, margin, backend)
    for t, d in ((x, d_x), (w, d_w)):
        cos = (t * d).sum(1) / (t.norm(dim=1) * d.norm(dim=1)).clamp_min(1e-300)
        assert float((cos * (d.norm(dim=1) > 1e-9)).abs().max()) < 1e-9
        assert float(d.norm(dim=1).max()) > 1e-3


def test_rows_are_independent(backend, given):
    """Half of the batch gives half of the losses, and the gradients of w add up."""
    x, w, labels, margin = given
    whole = run(x, w, labels, margin, backend)
    x.requires_grad_(), w.requires_grad_()
    g = torch.sin(torch.arange(20, dtype=x.dtype)) + 2
    losses, d_w = [], 0
    for rows in (slice(0, 7), slice(7, 20)):
        loss = margin_cross_entropy(x[rows], w, labels[rows], margin, scale=32.0, reduction="none", backend=backend)
        losses.append(loss)
        d_w = d_w + torch.autograd.grad(loss, w, g[rows])[0]
    assert_equal((torch.cat(losses).detach(), d_w), (whole[0], whole[2]))


SAME = {  # margins without margin, and masks without mask
    "cosface 0": (fm.CosFace(0.0), fm.NormFace()),
    "arcface 0": (fm.ArcFace(0.0), fm.NormFace()),
    "sphereface 1": (fm.SphereFace(1), fm.NormFace()),
    "combined 1, 0, 0": (fm.CombinedMargin(1.0, 0.0, 0.0), fm.NormFace()),
    "combined is arcface": (fm.CombinedMargin(1.0, 0.4, 0.0), fm.ArcFace(0.4)),
    "combined is cosface": (fm.CombinedMargin(1.0, 0.0, 0.3), fm.CosFace(0.3)),
    "sv with t = 1": (fm.SVSoftmax(1.0), fm.NormFace()),
    "sv-x with t = 1": (fm.SVSoftmax(1.0, fm.ArcFace(0.5)), fm.ArcFace(0.5)),
    "detached where T' is 1": (fm.CosFace(0.3, gradient="detached"), fm.CosFace(0.3)),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as(backend, name):
    p = problem(MARGINS["normface"], FP64, 20, 30, 12, seed=3)
    x, w = p.tensors["x"], p.tensors["w"]
    one, other = SAME[name]
    assert_equal(run(x, w, p.labels, one, backend), run(x, w, p.labels, other, backend))
    if isinstance(other, fm.NormFace):  # and that is the plain normalised softmax
        logits = 32 * oracle.unit(x) @ oracle.unit(w).T
        expected = torch.nn.functional.cross_entropy(logits, p.labels, reduction="none")
        torch.testing.assert_close(run(x, w, p.labels, one, backend)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("t", [1.1, 1.3])
def test_a_mask_only_adds(backend, t):
    """SV-Softmax never lowers a rival's logit: its loss is at least the base's, and more where a rival is ahead."""
    p = problem(MARGINS["cosface"], FP64, 40, 30, 12, seed=3)
    x, w = p.tensors["x"], p.tensors["w"]
    base, sv = fm.CosFace(0.35), fm.SVSoftmax(t, fm.CosFace(0.35))
    more = run(x, w, p.labels, sv, backend)[0] - run(x, w, p.labels, base, backend)[0]
    found = oracle.cosines(x, w, p.labels)
    ahead = ((found.c > found.c_y[:, None] - 0.35) & found.rival).any(1)
    assert float(more.min()) >= -1e-10
    assert bool((more[ahead] > 1e-6).all())
    assert bool((more[~ahead].abs() < 1e-10).all())
    assert ahead.any()
