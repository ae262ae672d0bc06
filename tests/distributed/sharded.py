"""A loss of the table on ranks: each builds the head, has its part of the batch, and gives what it got."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import fused_margin as fm

from ..cases import Mode
from ..loss_table import LOSSES
from ..test_losses import default_dtype, options, upstream

one_at_a_time = threading.Lock()  # torch's random generator is one for all threads


class Outcome(NamedTuple):
    """Of one rank."""

    loss: Tensor  # [b]
    d_x: Tensor  # [b, D]
    d_w: Tensor  # [C_local, K * D], zero in rows that were not swept
    others: dict[str, Tensor]  # gradients of what every rank has
    swept: Tensor  # classes, by their number
    sparse: bool


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def part(splits: Sequence[int]) -> slice:
    """This rank's rows of the batch."""
    first = sum(splits[: rank()])
    return slice(first, first + splits[rank()])


def plain(t: Tensor) -> Tensor:
    t = t.to_local() if isinstance(t, DTensor) else t
    return t.to_dense() if t.is_sparse else t


def build(name: str, mode: Mode, inputs: tuple, gradient: str = "exact", **more) -> fm.PartialFC:
    """The head of a loss of the table, with these weights."""
    loss, (x, w, _) = LOSSES[name], inputs
    classes = len(w) // loss.centres
    with one_at_a_time, default_dtype(mode.acc):
        torch.manual_seed(5)
        margin, given = loss.make(classes, x.shape[1], gradient=gradient), options(loss, classes)
        given.pop("sub_centers", None)
    given = {"reduction": "none", "embedding_grad": "sum", "compute_dtype": mode.compute} | given | more
    head = fm.PartialFC(x.shape[1], classes, margin, sub_centers=loss.centres, dtype=w.dtype, **given)
    fm.partial_fc.load_weight(head, w)
    return head


def step(head: fm.PartialFC, inputs: tuple, splits: Sequence[int], weights: Tensor | None = None) -> Outcome:
    """Forward and backward of this rank's part."""
    swept, mine = [], part(splits)
    take = head._shard

    def watched(*args):
        shard = take(*args)
        places = torch.arange(head.layout.count) if shard.index is None else shard.index
        swept.append(places + head.layout.first)
        return shard

    head._shard = watched
    x, labels = inputs[0][mine].clone().requires_grad_(), inputs[2][mine]
    losses = head(x, labels, sample_weight=None if weights is None else weights[mine])
    losses.backward(upstream(len(inputs[0]))[mine].to(losses.dtype) if losses.dim() else None)
    grad = head.weight.grad
    sparse = not isinstance(grad, DTensor) and grad.is_sparse
    if sparse:
        assert grad.is_coalesced()
        assert bool((grad.indices()[0].diff() > 0).all())
    others = {n: plain(p.grad) for n, p in head.named_parameters() if n != "weight" and p.grad is not None}
    return Outcome(losses.detach(), x.grad, plain(grad), others, swept[0], sparse)


def together(outcomes: list[Outcome], w: Tensor) -> dict[str, Tensor]:
    """What one process would have got; the gradients of replicated parameters must be the same on all ranks."""
    first = outcomes[0]
    for other in outcomes[1:]:
        for name, grad in first.others.items():
            if grad.shape == other.others[name].shape:
                assert torch.equal(grad, other.others[name]) or name.endswith("bias"), name
    one_for_all = first.loss.dim() == 0
    return {
        "loss": first.loss if one_for_all else torch.cat([o.loss for o in outcomes]),
        "d_x": torch.cat([o.d_x for o in outcomes]),
        "d_w": torch.cat([o.d_w for o in outcomes]).view_as(w),
        **{"d_" + name.rpartition(".")[2]: grad for name, grad in first.others.items()},
    }
