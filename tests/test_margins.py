"""The margins alone: T and its slope on [B] against the papers, tails, hazards at c = +-1, parameters of every kind."""

import math

import numpy as np
import pytest
import torch

import fused_margin as fm

from . import oracle
from .cases import MARGINS

ANGLES = torch.linspace(0.01, math.pi - 0.01, 401, dtype=torch.float64)
COSINES = ANGLES.cos()
ENDS = torch.tensor([-1.0, 1.0], dtype=torch.float64)


def value_and_slope(fn, c):
    c = c.clone().requires_grad_()
    t = fn(c)
    (slope,) = torch.autograd.grad(t.sum(), c)
    return t.detach(), slope


@pytest.mark.parametrize("name", MARGINS)
def test_value_and_slope(name):
    case = MARGINS[name]
    value, slope = value_and_slope(case.make(case.params).transform, COSINES)
    expected, d_expected = value_and_slope(lambda c: case.target(c, case.params), COSINES)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(slope, torch.ones_like(COSINES) if case.detached else d_expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", [n for n, case in MARGINS.items() if case.params and case.t is None])
def test_slope_by_the_margin(name):
    """dT/dm, per sample; the angle and cosine margins in closed form, the others from the oracle's autograd."""
    case = MARGINS[name]
    params = {n: torch.full_like(COSINES, v).requires_grad_() for n, v in case.params.items()}
    wrapped = {n: fm.PerSample(p) for n, p in params.items()}
    labels = torch.zeros(len(COSINES), dtype=torch.long)
    got = torch.autograd.grad(
        case.make(wrapped).at(labels, 7, torch.float64).transform(COSINES).sum(), list(params.values())
    )
    expected = torch.autograd.grad(case.target(COSINES, params).sum(), list(params.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    if name == "arcface_raw":
        torch.testing.assert_close(got[0], -torch.sin(ANGLES + 0.5))
    if name == "cosface":
        torch.testing.assert_close(got[0], -torch.ones_like(COSINES))


PSI = {  # wy1iu/sphereface, margin_inner_product_layer: no acos
    2: lambda c: 2 * c.sign() * c**2 - 1,
    3: lambda c: (c.abs() - 0.5).sign() * (4 * c**3 - 3 * c) + c.sign() * (1 + (c.abs() - 0.5).sign()) - 2,
    4: lambda c: (
        c.sign() * (2 * c**2 - 1).sign() * (8 * c**4 - 8 * c**2 + 1)
        + 2 * c.sign()
        + c.sign() * (2 * c**2 - 1).sign()
        - 3
    ),
}
PSI_SLOPE = {
    2: lambda c: 4 * c.sign() * c,
    3: lambda c: (c.abs() - 0.5).sign() * (12 * c**2 - 3),
    4: lambda c: c.sign() * (2 * c**2 - 1).sign() * (32 * c**3 - 16 * c),
}


@pytest.mark.parametrize("m", PSI)
def test_psi_without_acos(m):
    """Integer m: exact at c = +-1 too, where psi is 1 and 1 - 2m and its slope m^2."""
    c = torch.cat([COSINES, ENDS])
    value, slope = value_and_slope(fm.SphereFace(m).target, c)
    torch.testing.assert_close(value, PSI[m](c), rtol=0, atol=1e-13)
    torch.testing.assert_close(slope, PSI_SLOPE[m](c), rtol=0, atol=1e-11)
    torch.testing.assert_close(value[-2:], torch.tensor([1.0 - 2 * m, 1.0], dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(slope[-2:].abs(), torch.full_like(ENDS, m**2), rtol=0, atol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16, 17, 40])
def test_psi_of_a_tensor_is_psi_of_the_number(m):
    m_tensor = torch.full_like(COSINES, m)
    real = (
        fm.SphereFace(fm.PerSample(m_tensor))
        .at(torch.zeros(len(COSINES), dtype=torch.long), 3, torch.float64)
        .target(COSINES)
    )
    torch.testing.assert_close(fm.SphereFace(m).target(COSINES), real, rtol=0, atol=1e-13 * m**2)


@pytest.mark.parametrize("m", [2, 4, 1.5, 2.7])
def test_psi_joins_at_its_segments(m):
    """At theta = k pi / m the value is 1 - 2k and the slope by theta 0, from either side."""
    k = torch.arange(1, math.floor(m) + (m != int(m)), dtype=torch.float64)
    for side in (-1e-7, 0, 1e-7):
        joint = torch.cos(k * math.pi / m + side)
        torch.testing.assert_close(fm.SphereFace(m).target(joint), 1 - 2 * k, rtol=0, atol=1e-12 + (m * side) ** 2)


@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_arcface_slope_in_closed_form(gradient):
    _, slope = value_and_slope(fm.ArcFace(0.5, "raw", gradient=gradient).transform, COSINES)
    exact = math.cos(0.5) + math.sin(0.5) * COSINES / (1 - COSINES**2).sqrt()
    torch.testing.assert_close(slope, exact if gradient == "exact" else torch.ones_like(exact))


@pytest.mark.parametrize(
    "make", [fm.ArcFace, lambda m, tail: fm.CombinedMargin(1.0, m, 0.0, tail)], ids=["arc", "comb"]
)
@pytest.mark.parametrize("m", [0.3, 0.5, 1.2])
def test_tails_by_hand(make, m):
    """Just before and after theta + m = pi, and for `easy` around c = 0."""
    before, after = (math.cos(math.pi - m + side) for side in (-1e-6, 1e-6))
    c = torch.tensor([before, after], dtype=torch.float64)
    tails = {
        "raw": [math.cos(math.pi - 1e-6), math.cos(math.pi + 1e-6)],
        "linear": [math.cos(math.pi - 1e-6), after - m * math.sin(m)],
        "continuous": [math.cos(math.pi - 1e-6), after - 1 + math.cos(m)],
        "clamp": [math.cos(math.pi - 1e-6), -1],
        "easy": [before, after],
    }
    for tail, expected in tails.items():
        torch.testing.assert_close(make(m, tail).target(c), c.new_tensor(expected), rtol=0, atol=1e-13, msg=tail)
    around = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    expected = around.new_tensor([-1e-9, 0.0, math.cos(math.acos(1e-9) + m)])
    torch.testing.assert_close(make(m, "easy").target(around), expected, rtol=0, atol=1e-12)


TAIL_SLOPES = {"linear": 1.0, "continuous": 1.0, "clamp": 0.0, "easy": 1.0}


@pytest.mark.parametrize("tail", TAIL_SLOPES)
def test_slope_past_the_joint(tail):
    c = torch.cos(torch.linspace(math.pi - 0.49, math.pi - 1e-3, 50, dtype=torch.float64))
    for margin in (fm.ArcFace(0.5, tail), fm.CombinedMargin(1.0, 0.5, 0.1, tail)):
        _, slope = value_and_slope(margin.target, c)
        torch.testing.assert_close(slope, torch.full_like(c, TAIL_SLOPES[tail]), rtol=0, atol=1e-12)


FALLING = {  # T falls as the angle grows, but for jumps that the tail makes
    "arcface continuous": fm.ArcFace(0.5, "continuous"),
    "arcface linear": fm.ArcFace(0.5, "linear"),  # jumps down at the joint
    "arcface clamp": fm.ArcFace(0.5, "clamp"),
    "combined continuous": fm.CombinedMargin(1.4, 0.3, 0.1),
    "sphereface 1.7": fm.SphereFace(1.7),
    "sphereface 2": fm.SphereFace(2),
    "sphereface 4": fm.SphereFace(4),
    "cosface": fm.CosFace(0.35),
}


@pytest.mark.parametrize("name", FALLING)
def test_monotone(name):
    margin = FALLING[name]
    t = margin.target(torch.linspace(0, math.pi, 20_001, dtype=torch.float64).cos())
    assert float(t.diff().max()) <= 1e-12
    assert bool((t <= COSINES.new_tensor(1.0)).all())


def test_continuous_tail_is_continuous():
    fine = torch.linspace(0, math.pi, 20_001, dtype=torch.float64).cos()
    for margin in (fm.ArcFace(0.5, "continuous"), fm.CombinedMargin(1.4, 0.3, 0.1), fm.SphereFace(2.6)):
        assert float(margin.target(fine).diff().abs().max()) < 1e-3
    assert float(fm.ArcFace(0.5).target(fine).diff().abs().max()) == pytest.approx(
        -1 - (math.cos(math.pi - 0.5) - 0.5 * math.sin(0.5)), abs=1e-3
    )  # the linear tail jumps from -1 to -1.117


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_safe_angle_and_sine(dtype):
    c = torch.tensor([-1.0, -0.9999999, -0.5, 0.0, 0.3, 0.9999999, 1.0], dtype=dtype)
    sine = ((1 - c.double()) * (1 + c.double())).sqrt()
    floored = sine.clamp_min(1e-3)
    for fn, value, slope in (
        (fm.safe_angle, torch.acos(c.double()), -1 / floored),
        (fm.safe_sine, sine, -c.double() / floored),
    ):
        got, d_got = value_and_slope(fn, c)
        torch.testing.assert_close(got.double(), value, rtol=0, atol=4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(d_got.double(), slope, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_ends_are_finite_and_right(name, dtype):
    case = MARGINS[name]
    value, slope = value_and_slope(case.make(case.params).transform, ENDS.to(dtype))
    expected = case.target(ENDS, case.params)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=30 * torch.finfo(dtype).eps)
    assert slope.isfinite().all()
    assert float(slope.abs().max()) <= 1000 * 1.7, "the sine is floored at 1e-3"


def test_zero_margins_are_normface():
    for margin in (fm.CosFace(0.0), fm.ArcFace(0.0), fm.SphereFace(1), fm.CombinedMargin(1.0, 0.0, 0.0)):
        value, slope = value_and_slope(margin.target, COSINES)
        torch.testing.assert_close(value, COSINES, rtol=0, atol=1e-14)
        torch.testing.assert_close(slope, torch.ones_like(COSINES), rtol=0, atol=1e-10)


def test_sv_threshold_and_rule():
    base = fm.ArcFace(0.5)
    sv = fm.SVSoftmax(1.2, base)
    torch.testing.assert_close(sv.threshold(COSINES), oracle.arcface(COSINES, 0.5))  # f in mask and numerator, eq. 13
    torch.testing.assert_close(sv.target(COSINES), oracle.arcface(COSINES, 0.5))
    torch.testing.assert_close(fm.SVSoftmax(1.2).threshold(COSINES), COSINES)
    assert sv.rule().name == "hard"
    assert sv.rule().args == pytest.approx((1.2, 0.2))


def test_sv_takes_its_gradient_from_the_base():
    assert fm.SVSoftmax(1.2, fm.ArcFace(0.5, gradient="detached")).gradient == "detached"
    assert fm.SVSoftmax(1.2, fm.ArcFace(0.5, gradient="detached"), gradient="exact").gradient == "exact"
    assert fm.SVSoftmax(1.2).gradient == "exact"


@pytest.mark.parametrize("wrap", [lambda t: t, fm.PerClass], ids=["bare", "wrapped"])
def test_per_class(wrap):
    per_class = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, 3, -100, 1])
    c = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
    t = fm.CosFace(wrap(per_class)).at(labels, 4, torch.float64).target(c)
    torch.testing.assert_close(t[[0, 1, 2, 4]], (c - per_class[labels.clamp(0)])[[0, 1, 2, 4]])
    t[[0, 1, 2, 4]].sum().backward()
    torch.testing.assert_close(per_class.grad, torch.tensor([-1.0, -1.0, 0.0, -2.0], dtype=torch.float64))


def test_per_sample_and_scalar_tensors():
    labels = torch.tensor([2, 0, 1])
    c = torch.tensor([0.1, 0.5, 0.9])
    for m in (torch.tensor([0.1, 0.2, 0.3]), fm.PerSample(torch.tensor([0.1, 0.2, 0.3]))):
        torch.testing.assert_close(fm.CosFace(m).at(labels, 4, torch.float32).target(c), torch.tensor([0.0, 0.3, 0.6]))
    torch.testing.assert_close(fm.CosFace(torch.tensor(0.2)).at(labels, 4, torch.float32).target(c), c - 0.2)
    mixed = (
        fm.CombinedMargin(1.3, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.05)).at(labels, 4, torch.float32).target(c)
    )
    expected = oracle.combined(c.double(), 1.3, torch.tensor([0.1, 0.2, 0.3]).double(), 0.05, "continuous")
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=1e-6)


def test_as_many_rows_as_classes_is_ambiguous():
    m, labels = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2, 0, 1])
    with pytest.raises(ValueError, match=r"3 values could be per class or per sample.*fm\.PerClass\(m\)"):
        fm.CosFace(m).at(labels, 3, m.dtype)
    c = torch.zeros(3)
    torch.testing.assert_close(fm.CosFace(fm.PerClass(m)).at(labels, 3, m.dtype).target(c), -m[labels])
    torch.testing.assert_close(fm.CosFace(fm.PerSample(m)).at(labels, 3, m.dtype).target(c), -m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_take_the_dtype_of_the_cosines(dtype):
    """A 16-bit margin, of any kind, leaves the precision of the target's cosine alone; numpy's numbers are numbers."""
    labels, c = torch.tensor([2, 0, 1]), torch.tensor([0.1, 0.5, 0.9], dtype=dtype)
    m = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.bfloat16)
    for given, rows in ((fm.PerClass(m), m[labels]), (fm.PerSample(m[:3]), m[:3]), (m[1].clone(), m[1])):
        t = fm.ArcFace(given).at(labels, 4, dtype).target(c)
        assert t.dtype == dtype
        expected = oracle.arcface(c.double(), rows.double())
        torch.testing.assert_close(t.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(fm.CosFace(np.float32(0.25)).at(labels, 4, dtype).target(c), c - 0.25)


def test_tensors_are_named_and_replaced():
    m = torch.tensor([0.1, 0.2])
    sv = fm.SVSoftmax(torch.tensor(1.1), fm.CosFace(fm.PerClass(m)))
    assert {k: v.tolist() for k, v in sv.tensors().items()} == {
        "t": pytest.approx(1.1),
        "base.m": pytest.approx([0.1, 0.2]),
    }
    other = sv.with_tensors({"base.m": m + 1})
    assert isinstance(other.base.m, fm.PerClass)
    torch.testing.assert_close(other.base.m.values, m + 1)
    torch.testing.assert_close(sv.base.m.values, m)


BAD = {  # what is given, and what the message must name
    "nan": (lambda: fm.CosFace(math.nan), ValueError, "m = nan; expected a finite number"),
    "inf": (lambda: fm.ArcFace(math.inf), ValueError, r"m = inf; expected a finite number in \[0, 3.14"),
    "negative angle": (lambda: fm.ArcFace(-0.1), ValueError, r"m = -0.1; expected a finite number in \[0"),
    "degrees": (lambda: fm.ArcFace(28.6), ValueError, "m = 28.6"),
    "m below 1": (lambda: fm.SphereFace(0.5), ValueError, r"m = 0.5; expected .* in \[1"),
    "m1 below 1": (lambda: fm.CombinedMargin(0.9), ValueError, "m1 = 0.9"),
    "string": (lambda: fm.CosFace("0.3"), TypeError, "m: got '0.3'; expected a number"),
    "bool": (lambda: fm.CosFace(True), TypeError, "m: got True"),
    "tail": (lambda: fm.ArcFace(0.5, "hard"), ValueError, "tail = 'hard'; expected one of 'raw', 'linear'"),
    "gradient": (
        lambda: fm.NormFace(gradient="no"),
        ValueError,
        "gradient = 'no'; expected one of 'exact', 'detached'",
    ),
    "linear with m1": (lambda: fm.CombinedMargin(1.2, 0.3, 0.2, "linear"), ValueError, "defined for m1 = 1"),
    "t below 1": (lambda: fm.SVSoftmax(0.9), ValueError, "t = 0.9"),
    "learnable t": (
        lambda: fm.SVSoftmax(torch.tensor(1.2, requires_grad=True)),
        TypeError,
        r"t asks for a gradient.*expected t\.detach\(\)",
    ),
    "t of many": (lambda: fm.SVSoftmax(torch.tensor([1.1, 1.2])), TypeError, "t is one number"),
    "nested rule": (lambda: fm.SVSoftmax(1.2, fm.SVSoftmax(1.1)), TypeError, "has a rival rule of its own"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_a_class_is_no_margin():
    x, w, y = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    for margin, message in ((fm.ArcFace, r"pass an instance, as in ArcFace\(\)"), (0.5, "margin: got float")):
        with pytest.raises(TypeError, match=message):
            fm.functional.margin_cross_entropy(x, w, y, margin, backend="reference")
