"""PartialFC with the optimizers of fm.optim: the weights that one process and a dense gradient would have got."""

import pytest
import torch

import fused_margin as fm
from fused_margin import partial_fc

from ..conftest import require
from .sharded import part, plain
from .threads import run_threads
from .trainings import SPLITS, B, C, D

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def batches(first, last):
    for k in range(first, last):
        g = torch.Generator().manual_seed(k)
        yield torch.randn(B, D, generator=g, dtype=torch.float64), torch.randint(C, (B,), generator=g)


def train(head, optimizer, first, last):
    mine = part(SPLITS[head.ranks.world])
    for x, labels in batches(first, last):
        optimizer.zero_grad()
        head(x[mine].requires_grad_(), labels[mine]).backward()
        optimizer.step()
    return plain(head.weight.detach())


def make(**options):
    return fm.PartialFC(D, C, fm.SVSoftmax(1.2, fm.ArcFace(0.3)), 16.0, dtype=torch.float64, **options)


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("kind", ["SweepSGD", "RowSGD"])
def test_all_classes_on_ranks_as_a_dense_optimizer_on_one(kind, sub_centers):
    require("cpu")
    one = make(sub_centers=sub_centers)
    expected = train(one, torch.optim.SGD([one.weight], **OPTIONS), 0, 4)

    def body():
        head = make(sub_centers=sub_centers, sparse_grad=kind == "RowSGD")
        return train(head, getattr(fm.optim, kind)([head.weight], **OPTIONS), 0, 4)

    torch.testing.assert_close(torch.cat(run_threads(3, body)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("kind", ["SweepSGD", "RowSGD"])
def test_a_sample_moves_its_rows_alone(kind, sub_centers):
    """Each row by its own steps: those in which it was swept."""
    require("cpu")
    head = make(sample_rate=0.6, sub_centers=sub_centers)
    twin = make(sample_rate=0.6, sub_centers=sub_centers, sparse_grad=False)
    optimizer = getattr(fm.optim, kind)([head.weight], **OPTIONS)
    rows = [torch.nn.Parameter(row.clone()) for row in twin.weight.detach()]
    by_row = [torch.optim.SGD([row], **OPTIONS) for row in rows]
    swept = []
    for x, labels in batches(0, 6):
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
        twin.weight.grad = None
        twin(x, labels).backward()
        touched = twin.weight.grad.any(1).nonzero()[:, 0].tolist()
        swept.append(len(touched))
        for row in touched:
            rows[row].grad = twin.weight.grad[row]
            by_row[row].step()
            twin.weight.data[row] = rows[row].detach()
    assert max(swept) < C
    torch.testing.assert_close(head.weight.detach(), twin.weight.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["SweepSGD", "SweepAdamW", "RowSGD", "RowAdamW"])
def test_checkpoint_on_another_number_of_ranks(kind, tmp_path):
    require("cpu")
    options = {"lr": 0.05} if kind.endswith("AdamW") else OPTIONS

    def build(seed=0):
        head = make(sparse_grad=kind.startswith("Row"), seed=seed)
        return head, getattr(fm.optim, kind)([head.weight], **options)

    head, optimizer = build()
    train(head, optimizer, 0, 2)
    expected = train(head, optimizer, 2, 5)

    def write():
        head, optimizer = build()
        train(head, optimizer, 0, 2)
        partial_fc.save(tmp_path / "c", head, optimizer)

    def read():
        head, optimizer = build(seed=4)
        partial_fc.load(tmp_path / "c", head, optimizer)
        return train(head, optimizer, 2, 5)

    run_threads(3, write)
    torch.testing.assert_close(torch.cat(run_threads(2, read)), expected, rtol=1e-9, atol=1e-12)
