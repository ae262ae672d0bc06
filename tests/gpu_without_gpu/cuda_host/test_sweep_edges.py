"""Edges of the CUDA C++ kernels on the simulator: those of sweep_edges.py, and sums that float32 alone would round."""

import math

import pytest
import torch

from fused_margin import ops
from fused_margin.spec import Aux, Spec, Want

from .. import sweep_edges
from .backend import simulated

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_the_host")


@pytest.fixture
def on_the_host():
    with simulated(seed=3, programs=1):
        yield


@pytest.fixture
def backend():
    return "cuda"


@pytest.fixture
def form():
    return "chunk"


@pytest.fixture
def chunks(on_the_host):
    with simulated(seed=3, programs=2, chunk=128):
        yield


class TestEdges(sweep_edges.Edges):
    pass


def swept(x, w, scale, bias=None):
    """log-sum-exps in double, from their two parts, and the call's tensors; no row has its target here."""
    spec = Spec(num_classes=10**6, first_class=len(w) + 1, want=int(Want.DX), backend="cuda", compute_dtype=x.dtype)
    labels = torch.zeros(len(x), dtype=torch.long)
    red, _, _, aux = ops.sweep(x, w, labels, scale, None, bias, None, torch.zeros(0), spec)
    return red.double() + Aux(*aux).red_low.double(), red


def test_sums_over_many_tiles():
    """Of 16 tiles, 15 add to a sum of 1 what float32 would drop each time."""
    x, w, scale = torch.eye(8)[:1], torch.zeros(16 * 128, 8), torch.full((1,), 19.5)
    w[:128, 0] = -1
    w[0, 0] = 1
    w[128:, 1] = 1  # cosine 0
    red, _ = swept(x, w, scale)
    exact = torch.logsumexp(scale.double() * w[:, 0].double(), 0)
    assert abs(float(red - exact)) < 2e-7


def test_large_scales():
    """log2(e) s and the log-sum-exp are held in two parts: its absolute error, and the sum of the probabilities."""
    scale = torch.arange(900.0, 919.0)
    x, w = torch.eye(8)[:1].expand(19, 8), torch.eye(8)[[0, 0, *range(6)]]  # three rivals of cosine 1
    bias = torch.zeros(8, requires_grad=True)
    red, rounded = swept(x, w, scale, bias)
    assert (red - scale.double() - math.log(3)).abs().max() < 1e-6
    (d_bias,) = torch.autograd.grad(rounded.sum(), bias)
    assert abs(float(d_bias.double().sum()) - 19) < 19e-7
