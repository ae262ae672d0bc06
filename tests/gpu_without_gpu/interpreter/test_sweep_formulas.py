"""The formulas in the Triton kernels are those of the Python definitions: rules, transforms, softplus, sums."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fused_margin.functional import margin_cross_entropy
from fused_margin.kernels import forward, margins, rival
from fused_margin.kernels.configs import use
from fused_margin.kernels.launch import _form
from fused_margin.margins.forms import forms_of
from fused_margin.rules import CODES, RULES

from ...test_forms import MARGINS, by_torch
from ...test_primitive import ARGS
from .test_sweep_edges import ring
from .test_sweep_numbers import device

COUNT = 512


def cosines() -> torch.Tensor:
    ends = torch.tensor([-1.0, 1.0, 0.0, 0.5, -0.5])
    return torch.cat([torch.linspace(-1, 1, COUNT - len(ends)), ends])


@triton.jit
def rival_kernel(C, TAU, ARGS, VALUE, SLOPE, RULE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value, slope = rival.rival(tl.load(C + i), tl.load(TAU + i), tl.load(ARGS), tl.load(ARGS + 1), RULE)
    tl.store(VALUE + i, value)
    tl.store(SLOPE + i, slope)


RULE_ARGS = [*((rule, (*ARGS[rule], 0.0, 0.0)) for rule in CODES), *(("power", (t, 0.2)) for t in (1.0, 2.0, 4.7))]


@pytest.mark.parametrize("rule, args", RULE_ARGS)
def test_rules(rule, args):
    c, tau = cosines(), 0.6 * cosines().flip(0).roll(7)
    value, slope = torch.full((COUNT,), torch.nan), torch.full((COUNT,), torch.nan)
    rival_kernel[(1,)](c, tau, torch.tensor(args), value, slope, rule, COUNT)
    leaf = c.double().requires_grad_()
    exact = RULES[rule].value(leaf, tau.double(), torch.tensor(args).double())
    (by_autograd,) = torch.autograd.grad(exact.sum(), leaf)
    torch.testing.assert_close(value.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), by_autograd, rtol=2e-6, atol=2e-6)


@triton.jit
def transform_kernel(
    C, VALUE, SLOPE, m1, m2, m3, cos_m2, sin_m2, past, KIND: tl.constexpr, TAIL: tl.constexpr, N: tl.constexpr
):
    i = tl.arange(0, N)
    value, slope = margins.transform(tl.load(C + i), m1, m2, m3, cos_m2, sin_m2, past, KIND, TAIL)
    tl.store(VALUE + i, value)
    tl.store(SLOPE + i, slope)


@pytest.mark.parametrize("name", MARGINS)
def test_transforms(name):
    margin = MARGINS[name]
    c = cosines()
    value, slope = torch.full((COUNT,), torch.nan), torch.full((COUNT,), torch.nan)
    numbers, kind, tail = _form(forms_of(margin).packed()[:5])
    transform_kernel[(1,)](c, value, slope, *numbers, kind, tail, COUNT)
    leaf = c.double().requires_grad_()
    exact = margin.target(leaf)
    (by_autograd,) = torch.autograd.grad(exact.sum(), leaf)
    many = max(1.0, numbers[0] ** 2)  # cos(m theta) magnifies what theta loses
    torch.testing.assert_close(value.double(), exact.detach(), rtol=0, atol=1e-6 * many)
    off_ends = c.abs() < 0.999  # a sine near 0 is lost to rounding in float32, and where it has a floor in its slope
    torch.testing.assert_close(slope.double()[off_ends], by_autograd[off_ends], rtol=2e-5 * many, atol=2e-5 * many)
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", ["arcface_linear", "sphereface_3", "combined", "sv_arcface", "arcneg"])
@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_row_kernels_and_pytorch_agree(name, gradient):
    """The same loss with T, tau and the losses of rows in the kernels and in PyTorch."""
    margin, found = MARGINS[name].replaced(gradient=gradient), []
    for m in (margin, by_torch(margin)):
        x, w, labels = ring()
        labels[4] = -100
        scale = torch.full((len(labels),), 20.0, requires_grad=True)
        for reduction in ("mean", "none"):
            with use(device()):
                loss = margin_cross_entropy(x, w, labels, m, scale=scale, reduction=reduction, backend="triton")
            found.append([loss, *torch.autograd.grad(loss.sum(), (x, w, scale))])
    for kernel, python in zip(found[:2], found[2:], strict=True):
        for a, b in zip(kernel, python, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@triton.jit
def scalar_kernel(U, VALUE, SLOPE, ANGLE, TOTAL, N: tl.constexpr):
    i = tl.arange(0, N)
    u = tl.load(U + i)
    value, slope = rival.softplus(u)
    tl.store(VALUE + i, value)
    tl.store(SLOPE + i, slope)
    tl.store(ANGLE + i, margins.arccosine(u / 80))
    total, low = tl.zeros((N,), tl.float32) + 1e8, tl.zeros((N,), tl.float32)
    for _ in range(100):
        total, low = forward.two_sum(total, low, tl.zeros((N,), tl.float32) + 1)
    tl.store(TOTAL + i, (total - 1e8) + low)


def test_softplus_arccosine_and_compensated_sums():
    u = torch.linspace(-80, 80, COUNT)
    value, slope, angle, total = torch.full((4, COUNT), torch.nan)
    scalar_kernel[(1,)](u, value, slope, angle, total, COUNT)
    exact = u.double()
    torch.testing.assert_close(value.double(), -torch.nn.functional.logsigmoid(-exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope.double(), exact.sigmoid(), rtol=1e-5, atol=0)
    torch.testing.assert_close(angle.double(), torch.acos(exact / 80), rtol=0, atol=4e-7)
    assert math.isclose(float(angle[-1]), 0.0, abs_tol=1e-7)
    assert torch.equal(total, torch.full((COUNT,), 100.0))
