"""Centre loss by hand; contrastive and triplet losses against loops over all pairs and triplets."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm


def batch(rows=12, classes=4, dim=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, dim, generator=g).requires_grad_(), torch.arange(rows) % classes


def test_center_loss():
    """Wen et al. 2016 eqs. 2-4: the gradient by x, and the centres' own step."""
    x, labels = batch()
    labels[5] = -100
    loss = fm.CenterLoss(5, 4, alpha=0.5)
    loss.centers.copy_(torch.linspace(-1, 1, 20).reshape(4, 5))
    before, valid = loss.centers.clone(), labels >= 0
    value = loss(x, labels)
    apart = (x - before[labels.clamp_min(0)])[valid]
    torch.testing.assert_close(value, (apart**2).sum() / 11)
    (grad,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(grad[valid], 2 * apart.detach() / 11)
    assert not grad[5].any()
    for j in range(4):
        mine = x.detach()[labels == j]
        step = (before[j] - mine).sum(0) / (1 + len(mine))
        torch.testing.assert_close(loss.centers[j], before[j] - 0.5 * step)
    kept = loss.centers.clone()
    rows = fm.CenterLoss(5, 4, reduction="none")
    rows.load_state_dict(loss.state_dict())
    assert rows.eval()(x, labels).shape == (12,)
    assert torch.equal(rows.centers, kept)


BAD_LABELS = {
    "too large": (torch.tensor([0, 4, 1]), RuntimeError, r"labels\[1\] = 4 is outside \[0, 4\)"),
    "negative": (
        torch.tensor([0, 1, -1]),
        RuntimeError,
        r"labels\[2\] = -1 is (outside|below 0) .* not ignore_index",
    ),
    "floats": (torch.tensor([0.0, 1.0, 2.0]), TypeError, r"labels are torch\.float32; expected integers"),
    "bool": (torch.tensor([True, False, True]), TypeError, r"labels are torch\.bool; expected integers"),
    "few": (torch.tensor([0, 1]), ValueError, r"labels have shape \[2\]; expected \[3\]"),
    "column": (torch.tensor([[0], [1], [2]]), ValueError, r"use labels\.squeeze\(1\)"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_center_loss_refuses_labels(name):
    labels, error, message = BAD_LABELS[name]
    loss = fm.CenterLoss(5, 4)
    with pytest.raises(error, match=message):
        loss(torch.zeros(3, 5), labels)
    assert not loss.centers.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
@pytest.mark.parametrize("floats", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_center_loss_of_other_dtypes(dtype, floats):
    """16-bit features meet float32 centres, which move in float32; gradients have the features' dtype."""
    x, labels = batch()
    labels[5] = 255 if dtype == torch.uint8 else -100
    given = x.detach().to(floats).requires_grad_()
    one, two = (fm.CenterLoss(5, 4, ignore_index=int(labels[5])) for _ in range(2))
    for loss in (one, two):
        loss.centers.copy_(torch.linspace(-1, 1, 20).reshape(4, 5))
    got, expected = one(given, labels.to(dtype)), two(given.detach().float().requires_grad_(), labels)
    assert got.dtype == one.centers.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(one.centers, two.centers)
    (grad,) = torch.autograd.grad(got, given)
    assert grad.dtype == floats
    assert one(given.detach(), labels.to(dtype)).item() < got.item(), "the centres have come nearer"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_centres_take_in_finite_rows_only(bad):
    """The loss says that something is wrong; the centres move as if that row were not there."""
    x, labels = batch()
    one, two = (fm.CenterLoss(5, 4) for _ in range(2))
    broken = x.detach().clone()
    broken[5, 2] = bad
    assert not one(broken, labels).isfinite()
    rest = torch.arange(12) != 5
    two(x.detach()[rest], labels[rest])
    torch.testing.assert_close(one.centers, two.centers, rtol=1e-6, atol=1e-7)


def test_center_loss_with_a_head():
    """softmax + lambda / 2 * centre: embeddings of a class draw together."""
    torch.manual_seed(0)
    x, labels = batch(40)
    x = torch.nn.Parameter(x.detach())
    head, centers = fm.MarginHead(5, 4, fm.CosFace(0.2), 16.0), fm.CenterLoss(5, 4)
    spread = []
    optimizer = torch.optim.SGD([x, *head.parameters()], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        loss = head(x, labels) + 2.0 / 2 * centers(x, labels)
        loss.backward()
        optimizer.step()
        spread.append(torch.stack([x[labels == j].var(0).sum() for j in range(4)]).mean().item())
    assert spread[-1] < 0.5 * spread[0]


def distances(x):
    unit = F.normalize(x)
    return ((unit[:, None] - unit[None]) ** 2).sum(2)


def test_contrastive():
    x, labels = batch()
    d2 = distances(x)
    same, other = [], []
    for i, j in itertools.permutations(range(12), 2):
        if labels[i] == labels[j]:
            same.append(d2[i, j])
        elif d2[i, j] < 1.0:
            other.append(1.0 - d2[i, j])
    expected = torch.stack(same).mean() + torch.stack(other).mean()
    got = fm.pairs.contrastive(1.0)(x, labels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(expected, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mining", ["semihard", "hard", "all"])
def test_triplet(mining):
    x, labels = batch()
    d2, found = distances(x), []
    for a, p, n in itertools.permutations(range(12), 3):
        if labels[a] != labels[p] or labels[a] == labels[n]:
            continue
        gap = d2[a, n] - d2[a, p]
        if {"semihard": 0 < gap < 0.2, "hard": gap <= 0, "all": gap < 0.2}[mining]:
            found.append(0.2 - gap)
    assert found
    got = fm.pairs.triplet(0.2, mining)(x, labels)
    torch.testing.assert_close(got, torch.stack(found).mean(), rtol=1e-4, atol=1e-5)


PAIRS = {"contrastive": lambda **o: fm.pairs.contrastive(**o), "triplet": lambda **o: fm.pairs.triplet(1.0, "all", **o)}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_leave_out_ignored_rows(name):
    """Two ignored rows are no pair, nor is one with another row; what is in them, also nan, does not matter."""
    x, labels = batch()
    rest = torch.ones(12, dtype=torch.bool).index_fill_(0, torch.tensor([2, 5, 9]), False)
    with torch.no_grad():
        x[2] = torch.nan
    for ignored in (-100, 7):
        loss = PAIRS[name](ignore_index=ignored)
        got, expected = loss(x, torch.where(rest, labels, ignored).int()), loss(x[rest], labels[rest])
        assert expected > 0
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got, x)
        assert not grad[~rest].any()
        assert grad[rest].any()
        none = loss(x, torch.full_like(labels, ignored))
        assert none.item() == 0
        assert not torch.autograd.grad(none, x)[0].any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("bad", [name for name in BAD_LABELS if name != "too large"])  # no number of classes is known
def test_pairs_refuse_labels(name, bad):
    labels, error, message = BAD_LABELS[bad]
    with pytest.raises(error, match=message):
        PAIRS[name]()(torch.ones(3, 5), labels)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"expected \[B, 5\] of raw rows"):
        fm.CenterLoss(5, 4)(torch.zeros(3, 6), torch.zeros(3).long())
    for make, message in (
        (lambda: fm.CenterLoss(5, 4, alpha=2), "alpha = 2"),
        (lambda: fm.CenterLoss(5.0, 4), "embedding_size = 5.0; expected an integer"),
        (lambda: fm.CenterLoss(5, 0), "num_classes = 0; expected an integer, at least 1"),
        (lambda: fm.pairs.triplet(0), "margin = 0"),
        (lambda: fm.pairs.triplet(0.2, "soft"), "mining = 'soft'; expected one of 'semihard'"),
        (lambda: fm.pairs.contrastive(5), "margin = 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fused_margin\[pairs\]'"):
        fm.pairs.triplet()
