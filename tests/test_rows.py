"""Row work: mining, weights, smoothing, together and with ignored rows; against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from . import oracle
from .cases import spread

B, C, D = 24, 30, 12


@pytest.fixture
def inputs():
    x, w, labels = spread(B, C, D, 0)
    labels[[3, 9]] = -100
    return x.requires_grad_(), w.requires_grad_(), labels


def logits(x, w, labels, scale=16.0, m=0.2):
    found = oracle.cosines(x, w, labels.clamp_min(0))
    return scale * torch.where(found.rival, found.c, found.c - m)


def compare(got, expected, leaves):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    g = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).reshape(got.shape)
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_and_ignored_rows(inputs, backend, reduction):
    x, w, labels = inputs
    weights = torch.linspace(0, 2, C, dtype=torch.float64)
    got = margin_cross_entropy(
        x, w, labels, fm.CosFace(0.2), scale=16.0, class_weight=weights, reduction=reduction, backend=backend
    )
    compare(got, F.cross_entropy(logits(x, w, labels), labels, weights, reduction=reduction), (x, w))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing(inputs, backend, reduction):
    x, w, labels = inputs
    bias = torch.linspace(-1, 1, C, dtype=torch.float64).requires_grad_()
    got = margin_cross_entropy(
        x, w, labels, fm.CosFace(0.2), scale=16.0, bias=bias, label_smoothing=0.3, reduction=reduction, backend=backend
    )
    expected = F.cross_entropy(logits(x, w, labels) + bias, labels, label_smoothing=0.3, reduction=reduction)
    compare(got, expected, (x, w, bias))


def test_sample_weights(inputs, backend):
    x, w, labels = inputs
    weights = torch.rand(B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = F.cross_entropy(logits(x, w, labels), labels, reduction="none")
    got = margin_cross_entropy(x, w, labels, fm.CosFace(0.2), scale=16.0, sample_weight=weights, backend=backend)
    compare(got, (rows * weights).sum() / weights[labels >= 0].sum(), (x, w))


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 1.0])
def test_hard_rows(inputs, backend, keep):
    x, w, labels = inputs
    rows = F.cross_entropy(logits(x, w, labels), labels, reduction="none")[labels >= 0]
    got = margin_cross_entropy(x, w, labels, fm.CosFace(0.2), scale=16.0, mining=fm.HardRows(keep), backend=backend)
    compare(got, rows.topk(max(1, int(keep * 22))).values.mean(), (x, w))


def test_hard_rows_among_equals():
    loss = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5])
    valid = torch.tensor([True, True, True, True, True])
    assert fm.HardRows(0.4).factor(loss, valid).tolist() == [0, 1, 1, 0, 0]
    valid[1] = False
    assert fm.HardRows(0.5).factor(loss, valid).tolist() == [0, 0, 1, 1, 0]
    assert fm.HardRows(0.9).factor(torch.arange(10.0), torch.ones(10, dtype=torch.bool)).sum() == 9


def test_focal_gradient_in_closed_form():
    """The factor of the row's cross-entropy gradient: (1 - p)^g - g p (1 - p)^(g - 1) log p."""
    p = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for gradient in ("exact", "detached"):
        loss = (-p.log()).requires_grad_()
        focal = fm.Focal(2.5, 0.7, gradient=gradient)
        (slope,) = torch.autograd.grad((loss * focal.factor(loss, torch.ones_like(p).bool())).sum(), loss)
        expected = (1 - p) ** 2.5 - (2.5 * p * (1 - p) ** 1.5 * p.log() if gradient == "exact" else 0)
        torch.testing.assert_close(slope, 0.7 * expected)


def test_focal_of_a_mean_is_another_loss(inputs):
    """The trap: per sample, not on the mean."""
    x, w, labels = inputs
    rows = F.cross_entropy(logits(x, w, labels), labels, reduction="none")[labels >= 0]
    got = margin_cross_entropy(x, w, labels, fm.CosFace(0.2), scale=16.0, mining=fm.Focal(2))
    torch.testing.assert_close(got, ((1 - torch.exp(-rows)) ** 2 * rows).mean())
    assert abs(got.item() - ((1 - torch.exp(-rows.mean())) ** 2 * rows.mean()).item()) > 1e-3


def test_all_together(inputs, backend):
    x, w, labels = inputs
    sample, classes = torch.linspace(0.5, 1, B).double(), torch.linspace(0.2, 2, C).double()
    got = margin_cross_entropy(
        x, w, labels, fm.CosFace(0.2), scale=16.0, label_smoothing=0.1, mining=fm.Focal(2), sample_weight=sample,
        class_weight=classes, backend=backend,
    )  # fmt: skip
    valid = labels >= 0
    rows = F.cross_entropy(logits(x, w, labels), labels, reduction="none", label_smoothing=0.1)
    p = torch.exp(-F.cross_entropy(logits(x, w, labels), labels, reduction="none"))  # not of the smoothed one
    weights = sample * classes[labels.clamp_min(0)]
    compare(got, ((1 - p) ** 2 * rows * weights)[valid].sum() / weights[valid].sum(), (x, w))


PENALISED = {  # with what is added to the cross-entropy of a row
    "magface": (
        lambda: fm.MagFace(0.8, 1.2, 0.3, 0.6, 2.0, "raw"),
        lambda x, c, p: torch.cos(torch.acos(c) + 0.3 + 0.3 * (x.norm(dim=1).clamp(0.8, 1.2) - 0.8) / 0.4),
        lambda x, p: 2.0 * (x.norm(dim=1).clamp(0.8, 1.2) / 1.2**2 + 1 / x.norm(dim=1).clamp(0.8, 1.2)),
    ),
    "adam": (lambda: fm.AdaMSoftmax(C, weight=3.0), lambda x, c, p: c - p, lambda x, p: 3 * (1 - p.mean())),
}


@pytest.mark.parametrize("mining", [fm.Focal(2), fm.Focal(2, gradient="detached"), fm.HardRows(0.5)])
@pytest.mark.parametrize("name", PENALISED)
def test_mining_looks_at_the_softmax_alone(inputs, backend, name, mining):
    """The factor comes from the row's p; what the margin adds comes after, and is not weighted by it."""
    x, w, labels = inputs
    make, target, added = PENALISED[name]
    margin = make()
    if isinstance(margin, torch.nn.Module):
        margin.double()
        margin.m.data.fill_(0.3)
    got = margin_cross_entropy(x, w, labels, margin, scale=16.0, mining=mining, backend=backend)
    found, valid = oracle.cosines(x, w, labels.clamp_min(0)), labels >= 0
    m = torch.full((C,), 0.3, dtype=torch.float64)
    t = target(x, found.c_y, 0.3)
    ce = F.cross_entropy(16 * torch.where(found.rival, found.c, t[:, None]), labels.clamp_min(0), reduction="none")
    penalty = added(x, m if name == "adam" else None).expand(B)
    if isinstance(mining, fm.HardRows):
        kept = torch.where(valid, ce, -1.0).topk(11).indices
        expected = (ce + penalty)[kept].mean()
    else:
        factor = (1 - torch.exp(-ce)) ** 2
        expected = ((factor.detach() if mining.gradient == "detached" else factor) * ce + penalty)[valid].mean()
    compare(got, expected, (x, w))


def test_focal_of_a_weighted_cross_entropy(inputs):
    """SphereFace-R multiplies its loss with weight / s; p is that of the softmax."""
    x, w, labels = inputs
    margin = fm.SphereFaceR(1.0, 1, weight=40.0)
    got = margin_cross_entropy(x, w, labels, margin, scale=16.0, mining=fm.Focal(2))
    rows = F.cross_entropy(logits(x, w, labels, m=0.0), labels, reduction="none")[labels >= 0]
    compare(got, ((1 - torch.exp(-rows)) ** 2 * 40 / 16 * rows).mean(), (x, w))


@pytest.mark.parametrize("mining", [None, fm.Focal(2), fm.HardRows(0.7)], ids=["none", "focal", "hard"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("margin", [fm.CosFace(0.2), fm.MagFace(0.5, 1.5)], ids=["cosface", "magface"])
def test_nan_weights_of_ignored_rows_take_no_part(inputs, backend, margin, reduction, mining):
    x, w, labels = inputs
    results = []
    for value in (math.nan, math.inf, 0.7):
        sample = torch.linspace(0.5, 1, B, dtype=torch.float64).index_fill(0, torch.tensor([3, 9]), value)
        sample.requires_grad_()
        classes = torch.ones(C, dtype=torch.float64).index_fill(0, torch.tensor(0), value if 0 not in labels else 1.0)
        loss = margin_cross_entropy(
            x, w, labels, margin, scale=16.0, sample_weight=sample, class_weight=classes, mining=mining,
            reduction=reduction, backend=backend,
        )  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss.sum(), (x, w, sample))])
    for bad in results[:2]:
        for got, expected in zip(bad, results[2], strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mining", [None, fm.Focal(1), fm.HardRows(0.5)], ids=["none", "focal", "hard"])
def test_no_valid_row(inputs, backend, mining):
    x, w, labels = inputs
    for rows in (slice(0, 0), slice(0, B)):
        loss = margin_cross_entropy(
            x[rows], w, torch.full_like(labels, -100)[rows], fm.ArcFace(), mining=mining, backend=backend
        )
        assert loss.item() == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, w)))


def test_the_head_has_them(inputs):
    x, _, labels = inputs
    weights = torch.linspace(0.1, 2, C, dtype=torch.float64)
    head = fm.MarginHead(
        D, C, fm.CosFace(0.2), 16.0, class_weight=weights, label_smoothing=0.1, mining=fm.HardRows(0.7), dtype=x.dtype
    )
    assert set(head.state_dict()) == {"weight", "class_weight"}
    sample = torch.linspace(0.5, 1, B, dtype=torch.float64)
    expected = margin_cross_entropy(
        x, head.weight, labels, fm.CosFace(0.2), scale=16.0, class_weight=weights, label_smoothing=0.1,
        mining=fm.HardRows(0.7), sample_weight=sample,
    )  # fmt: skip
    torch.testing.assert_close(head(x, labels, sample_weight=sample), expected)


class Tripled(fm.NormFace):
    def row_loss(self, out):
        return 3.0 * super().row_loss(out)


class Doubled(Tripled):
    def row_loss(self, out):
        return self.row_factor(out) * fm.NormFace.row_loss(self, out)

    def row_factor(self, out):
        return 2.0


class Squared(Doubled):
    """Has a factor from above, which is not that of its own loss."""

    def row_loss(self, out):
        return super().row_loss(out) ** 2


@pytest.mark.parametrize("wrap", [lambda m: m, fm.Annealed])
def test_label_smoothing_of_a_loss_with_its_factor(inputs, wrap):
    x, w, labels = inputs
    more = {"scale": 16.0, "label_smoothing": 0.3}
    got = margin_cross_entropy(x, w, labels, wrap(Doubled()), **more)
    compare(got, 2 * F.cross_entropy(logits(x, w, labels, m=0.0), labels, label_smoothing=0.3), (x, w))
    with pytest.raises(ValueError, match=r"with .*, which has a row_loss of its own"):
        margin_cross_entropy(x, w, labels, wrap(Squared()), **more)


BAD = {
    "gamma": (lambda x, w, y: fm.Focal(0.5), ValueError, r"gamma = 0.5; expected .* in \[1, 1000\]: below 1 the slope"),
    "keep": (lambda x, w, y: fm.HardRows(0.0), ValueError, "keep = 0.0"),
    "smoothing": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), label_smoothing=1.5),
        ValueError,
        "label_smoothing = 1.5",
    ),
    "complex weights": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), class_weight=torch.ones(C) + 0j),
        TypeError,
        "class_weight are torch.complex64; expected real numbers",
    ),
    "a list as bias": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.NormFace(), bias=[0.0] * C),
        TypeError,
        "bias: got list; expected a tensor or None",
    ),
    "smoothing without softmax": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.UniFace(C), label_smoothing=0.1),
        ValueError,
        "label_smoothing is defined for a softmax",
    ),
    "smoothing of SFace": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.SFace(), label_smoothing=0.1, backend="reference"),
        ValueError,
        "label_smoothing is defined for a softmax",
    ),
    "focal without softmax": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.UniFace(C), mining=fm.Focal()),
        ValueError,
        "fm.Focal takes p of a softmax, and this loss has none",
    ),
    "mining": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), mining=2.0),
        TypeError,
        r"mining: got 2.0; expected fm.Focal\(\)",
    ),
    "sample weights": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), sample_weight=torch.ones(5)),
        ValueError,
        r"sample_weight: got a tensor of shape \[5\]",
    ),
    "class weights": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), class_weight=torch.ones(5)),
        ValueError,
        r"class_weight: got a tensor of shape \[5\]",
    ),
    "smoothing of an unknown loss": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.Annealed(Tripled()), label_smoothing=0.1),
        ValueError,
        r"label_smoothing = 0.1 with Annealed, which has a row_loss of its own; expected .* row_factor",
    ),
    "sample weights in a list": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), sample_weight=[1.0] * B),
        TypeError,
        "sample_weight: got list; expected a tensor",
    ),
    "class weights in a string": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.ArcFace(), class_weight="balanced"),
        TypeError,
        "class_weight: got str; expected a tensor",
    ),
    "class weights of a head": (
        lambda x, w, y: fm.MarginHead(D, C, class_weight=torch.ones(C + 1)),
        ValueError,
        rf"class_weight: got a tensor of shape \[{C + 1}\]; expected \[{C}\], one a class",
    ),
    "AdaCos of products": (
        lambda x, w, y: margin_cross_entropy(
            x, w, y, fm.NormFace(), scale=fm.AdaCos(C, dynamic=True), normalize_embeddings=False
        ),
        ValueError,
        "scale = AdaCos takes the angles",
    ),
    "norm of products": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.NormFace(), scale="norm", normalize_embeddings=False),
        ValueError,
        "the products have the norm of x in them already",
    ),
    "scale of LSoftmax": (
        lambda x, w, y: margin_cross_entropy(
            x, w, y, fm.LSoftmax(), scale=2.0, normalize_embeddings=False, normalize_weight=False
        ),
        ValueError,
        "scale = 2.0 with LSoftmax, which works on raw products; expected scale=1",
    ),
    "CosFace": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.CosFace(35.0)),
        ValueError,
        r"m = 35.0; expected a finite number in \[-2, 2\]: two cosines",
    ),
    "m3": (lambda x, w, y: fm.CombinedMargin(1, 0.3, 2.5), ValueError, "m3 = 2.5"),
    "SphereFace": (lambda x, w, y: fm.SphereFace(100), ValueError, r"m = 100; expected .* in \[1, 64\]"),
    "EqM": (lambda x, w, y: fm.EqM(offset=-0.1), ValueError, "offset = -0.1"),
    "margins by count": (lambda x, w, y: fm.margins_by_count(torch.ones(3), high=4.0), ValueError, "high = 4.0"),
    "no counts": (lambda x, w, y: fm.margins_by_count(torch.zeros(3)), ValueError, "counts are all 0"),
    "bias of UniFace": (
        lambda x, w, y: margin_cross_entropy(x, w, y, fm.UniFace(C), bias=torch.zeros(C)),
        ValueError,
        "UniFace has a bias of its own",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, inputs):
    run, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run(*inputs)


def test_focal_of_large_and_small_losses():
    """1 - p by expm1: right at a loss of 1e-12 and of 1e3."""
    loss = torch.tensor([0.0, 1e-12, 1e3], dtype=torch.float64)
    factor = fm.Focal(1.0).factor(loss, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(factor, loss.new_tensor([0.0, 1e-12, 1.0]), rtol=1e-10, atol=0)
    assert math.isfinite(float(factor.sum()))
