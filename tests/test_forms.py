"""The margins that kernels know compute what their Python definitions say: csrc/margins.h against `Margin.target`.

A subclass without changes is no type that `forms_of` lists, so it takes the way over PyTorch and autograd.
"""

import math

import numpy as np
import pytest
import torch

import fused_margin as fm
from fused_margin import ops
from fused_margin.functional import margin_cross_entropy
from fused_margin.margins.forms import KINDS, Form, Forms, forms_of
from fused_margin.spec import Rows, Spec

from .test_promises import data as single

BACKEND = "cpu"
MARGINS = {
    "normface": fm.NormFace(),
    "cosface": fm.CosFace(0.3),
    **{f"arcface_{tail}": fm.ArcFace(1.1, tail) for tail in fm.margins.TAILS},
    "arcface_none": fm.ArcFace(0.0),
    "arcface_whole": fm.ArcFace(math.pi),
    **{f"sphereface_{m}": fm.SphereFace(m) for m in (1, 2, 3, 4, 16, 17, 1.0, 1.7, 5.3)},
    "combined": fm.CombinedMargin(),
    **{f"combined_{tail}": fm.CombinedMargin(1.4, 0.9, 0.2, tail) for tail in ("raw", "continuous", "clamp", "easy")},
    "sv": fm.SVSoftmax(1.2),
    "sv_arcface": fm.SVSoftmax(1.1, fm.ArcFace(0.4)),
    "sv_sphereface": fm.SVSoftmax(1.3, fm.SphereFace(3)),
    "arcneg": fm.ArcNegFace(),
}


def data(*sizes):
    x, w, labels = single(*sizes)
    return x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), labels


def by_torch(margin: fm.Margin) -> fm.Margin:
    """The same margin as a type that no kernel knows."""
    unknown = object.__new__(type("Unknown", (type(margin),), {}))
    unknown.__dict__.update(margin.__dict__)
    return unknown


def circle(dtype=torch.float64):
    """x, w [B, 2] and labels: target cosines from -1 to 1, both ends exactly."""
    angle = torch.cat([torch.linspace(0, math.pi, 61, dtype=torch.float64), torch.tensor([0.0, math.pi]).double()])
    x = 1.3 * torch.stack([angle.cos(), angle.sin()], 1)
    x[-2:, 1] = 0  # cosines of exactly 1 and -1
    w = torch.tensor([[1.0, 0.0], [0.3, 0.7], [-0.6, 0.1], [-0.2, -1.0]]).double()
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), torch.zeros(len(x), dtype=torch.long)


def run(margin, x, w, labels, scale, **options):
    scale = torch.full((len(x),), scale, dtype=x.dtype, requires_grad=True)
    options = {"backend": BACKEND, "return_stats": True} | options
    loss, stats = margin_cross_entropy(x, w, labels, margin, scale=scale, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss, *torch.autograd.grad((loss * weights).sum(), (x, w, scale)), *stats]


@pytest.mark.parametrize("gradient", ["exact", "detached"])
@pytest.mark.parametrize("name", MARGINS)
def test_kernel_and_python_agree(name, gradient):
    margin = MARGINS[name].replaced(gradient=gradient)
    assert forms_of(margin) is not None
    assert forms_of(by_torch(margin)) is None
    inputs = circle()
    for reduction in ("none", "mean", "sum"):
        kernel, python = (run(m, *inputs, 20.0, reduction=reduction) for m in (margin, by_torch(margin)))
        for found, expected in zip(kernel, python, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_threshold_is_not_the_target():
    """Each has a form, though the margins above have the same one twice."""
    (x, w, labels), rule = circle(), fm.SVSoftmax(1.2).rule()
    x, w, scale = x.detach(), w.detach(), torch.full((len(x),), 20.0, dtype=x.dtype)
    spec = Spec(rule.name, compute_dtype=x.dtype, num_classes=len(w), backend=BACKEND)
    forms = Forms(Form("angle", m2=0.4), Form(m3=0.3))
    rows = Rows(*ops.sweep_loss(x, w, labels, scale, rule.tensor(x), spec, forms, "mean")[1])
    tau = rows.cos_y - 0.3
    torch.testing.assert_close(rows.tau, tau, rtol=0, atol=1e-15)
    red = ops.sweep(x, w, labels, scale, tau, None, None, rule.tensor(x), spec)[0]
    torch.testing.assert_close(rows.red, red, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["arcface_linear", "sv_arcface", "combined_clamp", "sphereface_1.7"])
def test_rows_that_do_not_count_and_weights(name):
    x, w, labels = data(40, 30)
    labels[3:9] = -1
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    ways = (
        {"ignore_index": -1},
        {"ignore_index": -1, "reduction": "sum", "sample_weight": weights},
        {"ignore_index": -1, "reduction": "none"},
        {"ignore_index": -1, "mining": fm.Focal(2.0), "class_weight": torch.rand(30).double() + 0.5},
        {"ignore_index": -1, "mining": fm.HardRows(0.5), "sub_centers": 3},
    )
    for options in ways:
        classes = 30 // options.get("sub_centers", 1)
        inputs = x, w, torch.where(labels < 0, -1, labels % classes)
        kernel, python = (run(m, *inputs, 30.0, **options) for m in (MARGINS[name], by_torch(MARGINS[name])))
        for found, expected in zip(kernel, python, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_no_valid_row_and_no_rival():
    x, w, labels = data(5, 8)
    for m in (MARGINS["arcface_linear"], MARGINS["sv"]):
        loss, d_x, d_w, *_ = run(m, x, w, torch.full_like(labels, -100), 30.0)
        assert loss == 0
        assert not d_x.any()
        assert not d_w.any()
        loss, d_x, d_w, *_ = run(m, x, w[:1].detach().requires_grad_(), labels * 0, 30.0)
        assert loss == 0
        assert not d_x.any()
        assert not d_w.any()


def test_numbers_of_numpy_are_plain():
    for m in (np.float32(0.5), np.float64(0.5)):
        assert forms_of(fm.ArcFace(m)) == forms_of(fm.ArcFace(0.5))


def test_tensors_and_users_margins_take_the_way_over_torch():
    for margin in (
        fm.ArcFace(torch.tensor(0.5)),
        fm.CosFace(fm.PerClass(torch.full((4,), 0.3))),
        fm.SVSoftmax(1.2, fm.CosFace(torch.tensor(0.3))),
        fm.SVSoftmax(1.2, fm.ArcFace(torch.tensor(0.5))),
        fm.margins.as_margin(torch.cos),
    ):
        assert forms_of(margin) is None


def test_packed_as_the_header_reads_them():
    assert KINDS == ("cosine", "angle", "multiple")
    assert forms_of(fm.CombinedMargin(1.2, 0.3, 0.1, "clamp")).packed() == [1.0, 3.0, 1.2, 0.3, 0.1]
    both = Forms(Form("multiple", m1=4), Form(m3=0.25)).packed()
    assert both == [2.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.25]


def test_opcheck():
    x, w, labels = data(6, 10)
    spec = fm.ops.Spec(compute_dtype=torch.float64, num_classes=10, backend=BACKEND, want=1)
    scale = torch.full((6,), 30.0, dtype=torch.float64)
    args = (x, w, labels, scale, x.new_zeros(0), *spec, forms_of(fm.ArcFace(0.5)).packed())
    for reduction in ("mean", "none"):
        torch.library.opcheck(torch.ops.fused_margin.sweep_loss.default, (*args, reduction))


def test_gradcheck():
    x, w, labels = data(3, 5, 4)
    for margin in (fm.ArcFace(0.5), fm.SphereFace(1.7), fm.CombinedMargin(1.2, 0.3, 0.2)):
        torch.autograd.gradcheck(
            lambda a, b, m=margin: margin_cross_entropy(a, b, labels, m, scale=8.0, backend=BACKEND), (x, w)
        )
