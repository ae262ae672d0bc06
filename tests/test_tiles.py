"""Float32 as three bfloat16 pieces, as the AMX build multiplies it (csrc/cpu/tiles.h).

The error rule holds it to what plain PyTorch does; here it is held to the build that multiplies float32 itself.
"""

import contextlib

import pytest
import torch

import fused_margin as fm
from fused_margin.backends import cpu

from .conftest import require

MARGIN = fm.ArcFace(0.5)


@pytest.fixture
def amx():
    require("cpu")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(cpu.capability("amx"))
        except ValueError as error:
            pytest.skip(str(error))
        yield


def draw(batch: int, classes: int, dim: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(classes, dim, generator=g)
    labels = torch.randint(classes, (batch,), generator=g)
    return torch.randn(batch, dim, generator=g) + 0.3 * w[labels], w, labels


def run(x, w, labels):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = fm.functional.margin_cross_entropy(x, w, labels, MARGIN)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def distance(got, exact) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("shape", [(128, 3000, 512), (70, 1001, 200), (300, 700, 1100)], ids=["512", "200", "1100"])
def test_not_further_from_float64_than_float32_itself(amx, shape):
    """One of the six products left out would be 2^-16 of the whole, a hundred times the error of float32."""
    inputs = draw(*shape)
    x, w, labels = inputs
    exact = run(x.double(), w.double(), labels)
    mine = distance(run(*inputs), exact)
    with cpu.capability("avx2"):
        plain = distance(run(*inputs), exact)
    assert all(a < max(1.5 * b, 1e-7) for a, b in zip(mine, plain, strict=True)), (mine, plain)


def test_tiles_of_a_long_sweep(amx):
    """A task has several tiles, each begun beside the products of the one before it; some of the products are kept."""
    inputs = draw(520, 33_000, 8)
    exact = run(*(t.double() if t.is_floating_point() else t for t in inputs))
    with cpu.capability("avx2"):
        plain = distance(run(*inputs), exact)
    mine = distance(run(*inputs), exact)
    assert 0 < cpu.kept_rows(520, 8, 33_000, 4) < 33_000
    assert all(a < max(1.5 * b, 1e-7) for a, b in zip(mine, plain, strict=True)), (mine, plain)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_moves_rows_while_the_next_ones_are_read(amx, passes):
    inputs = [draw(40, 33_000, 8, seed) for seed in range(passes)]
    weights = []
    for optimizer in (fm.optim.SweepSGD, torch.optim.SGD):
        w = inputs[0][1].clone().requires_grad_()
        made = optimizer([w], lr=0.5, momentum=0.9)
        for _ in range(2):
            for x, _, labels in inputs:
                fm.functional.margin_cross_entropy(x, w, labels, MARGIN).backward()
            made.step()
            made.zero_grad()
        weights.append(w.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_rows_of_any_size(amx):
    """The pieces are relative to their number: rows from 1e-9 to 1e18 have the cosines of those between."""
    x, w, labels = draw(40, 300, 64)
    size = 10.0 ** torch.linspace(-9, 18, 300)
    expected, got = run(x, w, labels), run(x, w * size[:, None], labels)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2] * size[:, None], expected[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stays_in_its_row(amx, bad):
    """As in the other builds: an ignored row may hold it, and with it a class's row makes every loss NaN."""
    x, w, labels = draw(40, 300, 64)
    ignored = labels.clone()
    ignored[7] = -100
    clean = run(x, w, ignored)
    x[7, 3] = bad
    for a, b in zip(run(x, w, ignored), clean, strict=True):
        assert torch.equal(a, b)
    x[7, 3] = 0
    w[200, 5] = bad
    loss, d_x, _ = run(x, w, labels)
    assert loss.isnan()
    assert d_x.isnan().all()


def test_beside_products_of_torch(amx):
    """They use the unit too, before, between and after."""
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, 96).bfloat16()
    expected = a @ b
    inputs = draw(64, 500, 96)
    first = run(*inputs)
    assert torch.equal(a @ b, expected)
    for got, want in zip(run(*inputs), first, strict=True):
        assert torch.equal(got, want)
