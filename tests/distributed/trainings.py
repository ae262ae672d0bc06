"""A small training on any number of ranks, for tests that interrupt it, save it or carry it elsewhere."""

from pathlib import Path

import pytest
import torch

import fused_margin as fm
from fused_margin import partial_fc

from .sharded import one_at_a_time, part, plain
from .threads import run_threads

C, D, B = 23, 8, 12
SPLITS = {1: [12], 2: [7, 5], 3: [4, 5, 3], 5: [3, 2, 3, 3, 1]}
ROOT = Path(__file__).parent.parent.parent


def training(rate=1.0, seed=0, classes=C, **options):
    """A head with everything that has rows or a state, its optimizer, and a network that all ranks have."""
    head = fm.PartialFC(
        D, classes, fm.CurricularFace(), 16.0, rate, seed=seed, class_weight=torch.arange(classes) + 1.0, **options
    )
    with one_at_a_time:
        torch.manual_seed(0)
        network = torch.nn.Linear(D, D)
    momentum = 0.0 if head.sparse_grad else 0.9
    groups = [{"params": head.parameters()}, {"params": network.parameters(), "lr": 0.01}]
    return head, torch.optim.SGD(groups, lr=0.1, momentum=momentum), network


def steps(head, optimizer, network, first, last):
    """Losses of some steps; each step's batch is the same for any number of ranks."""
    losses, mine = [], part(SPLITS[head.ranks.world])
    for k in range(first, last):
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(B, D, generator=g), torch.randint(head.num_classes, (B,), generator=g)
        optimizer.zero_grad()
        loss = head(network(x[mine]), y[mine])
        loss.backward()
        for p in network.parameters():
            head.ranks.reduce_(p.grad)
            p.grad /= head.ranks.world
        optimizer.step()
        losses.append(loss.item())
    return losses


def on(world, fn):
    return run_threads(world, fn) if world > 1 else [fn()]


def of_head(optimizer, head):
    """The head's part of an optimizer."""
    own = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for p in head.parameters():
        own.state[p] = optimizer.state[p]
    return own


def refuses(match, load, head, optimizer):
    """`load` raises, and has changed neither."""
    before = {k: plain(v).clone() for k, v in head.state_dict().items()}
    with pytest.raises(partial_fc.CheckpointError, match=match):
        load()
    assert all(torch.equal(plain(v), before[k]) for k, v in head.state_dict().items())
    assert not optimizer.state
