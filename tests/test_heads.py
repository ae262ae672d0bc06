"""MarginHead: the functional with weights; parameters and buffers, state_dict, logits, topk, repr."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_margin as fm

from . import oracle
from .cases import spread

C, D = 12, 8


def make(margin=None, seed=0, **options):
    torch.manual_seed(seed)
    return fm.MarginHead(D, C, margin, **{"dtype": torch.float64} | options)


def batch(seed=0, rows=10):
    x, _, labels = spread(rows, C, D, seed)
    return x, labels


def expected_loss(head, x, labels, margin=lambda c: oracle.arcface(c, 0.5), scale=64.0):
    scale = torch.full((len(x),), scale, dtype=torch.float64)
    return oracle.rows(x, head.weight, labels, oracle.Head(margin), scale, head.bias)


def test_loss_and_gradients(backend):
    head, (x, labels) = make(backend=backend), batch()
    x.requires_grad_()
    loss = head(x, labels)
    expected = expected_loss(head, x, labels).mean()
    torch.testing.assert_close(loss, expected)
    got, want = (torch.autograd.grad(t, (x, head.weight), retain_graph=True) for t in (loss, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_options_reach_the_functional(backend, reduction):
    head = make(fm.CosFace(0.2), scale=30.0, reduction=reduction, ignore_index=3, backend=backend, bias=True)
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-1, 1, C))
    x, labels = batch()
    labels[2:4] = 3
    loss, stats = head(x, labels, return_stats=True)
    rows = torch.where(labels == 3, 0, expected_loss(head, x, labels, lambda c: oracle.cosface(c, 0.2), 30.0))
    torch.testing.assert_close(loss, oracle.reduce(rows, labels, reduction))
    assert stats.target_cosine.shape == (10,)


def test_norms_off(backend):
    """Plain softmax as a head."""
    head = make(
        fm.NormFace(), scale=1.0, bias=True, normalize_embeddings=False, normalize_weight=False, backend=backend
    )
    x, labels = batch()
    torch.testing.assert_close(head(x, labels), F.cross_entropy(F.linear(x, head.weight, head.bias), labels))


def test_initial_weights():
    torch.manual_seed(0)
    head = fm.MarginHead(256, 1000, bias=True)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert head.weight.mean().item() == pytest.approx(0, abs=1e-4)
    assert not head.bias.any()
    assert head.weight.dtype == torch.float32
    assert {n for n, _ in head.named_parameters()} == {"weight", "bias"}


def test_state_dict_round_trip(backend):
    """Per-class margins, buffers and parameters alike, travel with the head."""
    learned = nn.Parameter(torch.full((C,), 0.3, dtype=torch.float64))
    margins = (
        lambda: fm.CosFace(fm.PerClass(torch.linspace(0.1, 0.4, C, dtype=torch.float64))),
        lambda: fm.ArcFace(fm.PerClass(learned)),
        lambda: fm.SVSoftmax(
            torch.tensor(1.15, dtype=torch.float64), fm.CosFace(torch.tensor(0.3, dtype=torch.float64))
        ),
    )
    keys = ({"margin_m"}, {"margin_m"}, {"margin_t", "margin_base_m"})
    x, labels = batch()
    for margin, expected in zip(margins, keys, strict=True):
        one, other = make(margin(), 0, backend=backend), make(margin(), 1, backend=backend)
        assert set(one.state_dict()) == {"weight"} | expected
        with torch.no_grad():
            for name in expected:
                other_value = other.state_dict()[name]
                other_value.mul_(0).add_(1.0)
        assert other(x, labels).item() != pytest.approx(one(x, labels).item())
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        torch.testing.assert_close(other(x, labels), one(x, labels), rtol=0, atol=0)


def test_a_learnable_margin_learns(backend):
    m = nn.Parameter(torch.full((C,), 0.3, dtype=torch.float64))
    head, (x, labels) = make(fm.CosFace(fm.PerClass(m)), backend=backend), batch()
    assert {n for n, _ in head.named_parameters()} == {"weight", "margin_m"}
    loss = head(x, labels)
    loss.backward()
    expected = expected_loss(head, x, labels, lambda c: c - head.margin_m[labels]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.margin_m.grad, torch.autograd.grad(expected, head.margin_m)[0])
    before = loss.item()
    torch.optim.SGD(head.parameters(), lr=0.05).step()
    assert head(x, labels).item() < before


def test_margins_follow_the_head():
    head = make(fm.CosFace(fm.PerClass(torch.linspace(0.1, 0.4, C)))).to(torch.float64)
    assert head.margin.m.values.dtype == torch.float64
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.margin_m.fill_(0.0)
    assert float(head.margin.m.values.sum()) == pytest.approx(0.25 * C)
    assert float(twin.margin.m.values.sum()) == 0


@pytest.mark.parametrize("normalize", [(True, True), (False, True), (False, False)])
def test_logits(normalize):
    head = make(fm.NormFace(), scale=3.0, bias=True, normalize_embeddings=normalize[0], normalize_weight=normalize[1])
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-1, 1, C))
    x, labels = batch()
    products = oracle.cosines(x, head.weight, labels, normalize=normalize).c
    torch.testing.assert_close(head.logits(x), 3 * products + head.bias)
    torch.testing.assert_close(head(x, labels), F.cross_entropy(head.logits(x), labels))  # no margin: the loss's logits


def test_logits_of_a_softmax():
    head, (x, labels) = make(fm.SphereFace(4), scale="norm"), batch()
    expected = x.norm(dim=1, keepdim=True) * oracle.cosines(x, head.weight, labels).c
    torch.testing.assert_close(head.logits(x), expected)


def test_topk():
    head, (x, labels) = make(), batch()
    cos, ids = head.topk(x, 4)
    expected, expected_ids = oracle.cosines(x, head.weight, labels).c.detach().topk(4)
    torch.testing.assert_close(cos, expected)
    torch.testing.assert_close(ids, expected_ids)


def test_repr():
    text = repr(make(fm.CosFace(0.25), scale=30.0))
    assert text.startswith("MarginHead(embedding_size=8, num_classes=12, margin=CosFace(m=0.25, gradient='exact')")
    assert "scale=30.0" in text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 5), "embedding_size = 0; expected an integer, at least 1"),
        ((8, -1), "num_classes = -1; expected an integer, at least 1"),
        ((8.0, 5), "embedding_size = 8.0"),
        ((8, True), "num_classes = True"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        fm.MarginHead(*sizes)


def test_sizes_of_other_libraries_are_integers():
    head = fm.MarginHead(np.int64(8), np.int32(12), sub_centers=np.int16(2))
    assert [type(n) for n in (head.embedding_size, head.num_classes, head.sub_centers)] == [int] * 3
    assert head.weight.shape == (24, 8)
    assert type(fm.PartialFC(8, np.int64(12), seed=np.int64(1)).num_classes) is int
    assert type(fm.AdaCos(np.int64(12)).num_classes) is int


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (2.0, "k = 2.0; expected an integer, at least 1"),
        (True, "k = True; expected an integer, at least 1"),
        (0, "k = 0; expected an integer, at least 1"),
        (13, "k = 13; expected 1 <= k <= 12, the number of classes"),
    ],
)
@pytest.mark.parametrize("kind", [fm.MarginHead, fm.PartialFC])
def test_bad_k(kind, k, message):
    with pytest.raises(ValueError, match=message):
        kind(8, 12).topk(torch.randn(3, 8), k)


@pytest.mark.parametrize("call", ["topk", "logits", "outliers"])
def test_inference_takes_tensors(call):
    arguments = {"topk": (1,), "logits": (), "outliers": (torch.zeros(1).long(),)}[call]
    with pytest.raises(TypeError, match="embeddings: got list; expected a tensor"):
        getattr(fm.MarginHead(8, 12), call)([[1.0] * 8], *arguments)


def test_swapped_sizes():
    with pytest.raises(ValueError, match="or to a head first embedding_size, then num_classes"):
        fm.MarginHead(12, 8)(torch.randn(3, 8), torch.zeros(3).long())


def test_default_is_arcface(backend):
    head, (x, labels) = make(backend=backend), batch()
    assert isinstance(head.margin, fm.ArcFace)
    torch.testing.assert_close(head(x, labels), expected_loss(head, x, labels).mean())


def test_training_lowers_the_loss(backend):
    """Ten steps of SGD on embeddings and weights, as the oracle does them."""
    losses = []
    for fused in (True, False):
        head, (x, labels) = make(fm.CosFace(0.2), scale=16.0, backend=backend), batch(rows=30)
        x = nn.Parameter(x)
        optimizer = torch.optim.SGD([x, head.weight], lr=0.002, momentum=0.9)
        curve = []
        for _ in range(10):
            optimizer.zero_grad()
            rows = lambda: expected_loss(head, x, labels, lambda c: c - 0.2, 16.0).mean()  # noqa: B023, E731
            loss = head(x, labels) if fused else rows()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    assert float(losses[0][-1]) < float(losses[0][0])
