"""The ranks that share a head, their collectives by whatever name this torch has, and how those look to autograd.

what is replicated enters a shard    identity forward, sum backward
what a shard found leaves it         combined forward, identity backward
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

GATHERED_BYTES = 1 << 26  # up to here the shards' results are gathered, one collective; beyond, two all-reduces


def _by_name(new: str, old: str) -> Callable:
    return getattr(dist, new) if hasattr(dist, new) else getattr(dist, old)


class Ranks:
    """A process group, or none at all: then there is one rank, and nothing is sent."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        if group is not None and not there:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        self.group = (group if group is not None else dist.group.WORLD) if there else None
        self.world = dist.get_world_size(self.group) if there else 1
        self.rank = dist.get_rank(self.group) if there else 0
        if self.rank < 0:
            raise ValueError("this process is not in process_group; build the head on its ranks only")

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self  # a process group cannot be copied, and is shared

    def gather(self, t: Tensor) -> Tensor:
        """[world, *shape] of tensors of one shape."""
        t = t.contiguous()
        if self.world == 1:
            return t[None]
        if not t.numel():
            return t.new_empty(self.world, *t.shape)
        flat = t.new_empty(self.world * t.numel())
        _by_name("all_gather_single", "all_gather_into_tensor")(flat, t.flatten(), group=self.group)
        return flat.view(self.world, *t.shape)

    def reduce_(self, t: Tensor, op: str = "SUM", wait: bool = True) -> Callable[[], Tensor]:
        """All-reduces in place; what is returned waits, and gives the tensor."""
        work = None
        if self.world > 1:
            work = dist.all_reduce(t, getattr(dist.ReduceOp, op), group=self.group, async_op=not wait)
        return lambda: _after(work, t)

    def scatter_sum(self, t: Tensor) -> Callable[[], Tensor]:
        """Starts the sum of [world, ...] over the ranks, of which each keeps its own part."""
        if self.world == 1 or not t.numel():
            return lambda: t[0]
        out = t.new_empty(t.shape[1:])
        scatter = _by_name("reduce_scatter_single", "reduce_scatter_tensor")
        work = scatter(out.flatten(), t.contiguous().flatten(), group=self.group, async_op=True)
        return lambda: _after(work, out)

    def objects(self, value: object) -> list:
        """A small Python object of each rank."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, t: Tensor) -> None:
        """Overwrites a tensor with that of the first rank."""
        if self.world > 1:
            dist.broadcast(t, dist.get_global_rank(self.group, 0), group=self.group)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)


def _after(work: dist.Work | None, t: Tensor) -> Tensor:
    if work is not None:
        work.wait()
    return t


class Enter(torch.autograd.Function):
    """Identity; the backward sums over the ranks."""

    @staticmethod
    def forward(ctx, t: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return t.view_as(t)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.reduce_(g.clone(memory_format=torch.contiguous_format))(), None


class Leave(torch.autograd.Function):
    """The sum over the ranks; the backward is the identity."""

    @staticmethod
    def forward(ctx, t: Tensor, ranks: Ranks) -> Tensor:
        return ranks.reduce_(t.clone(memory_format=torch.contiguous_format))()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class Amplify(torch.autograd.Function):
    """Identity; the backward multiplies by a number."""

    @staticmethod
    def forward(ctx, t: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


class Replicate(torch.autograd.Function):
    """A tensor of all ranks' rows in the place of this rank's; the backward takes this rank's.

    For what every rank computes alike: the gradient is the same on all of them, and counts once.
    """

    @staticmethod
    def forward(ctx, own: Tensor, everyone: Tensor, start: int) -> Tensor:
        ctx.start, ctx.shape, ctx.dtype = start, own.shape, own.dtype
        return everyone.view_as(everyone)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        return g[ctx.start : ctx.start + ctx.shape[0]].to(ctx.dtype), None, None


class Own(torch.autograd.Function):
    """This rank's rows of a vector that all ranks have; the backward gathers the gradients of all rows."""

    @staticmethod
    def forward(ctx, t: Tensor, rows: object) -> Tensor:
        ctx.rows = rows
        return rows.own(t).clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.all_of(g), None


class Merge(torch.autograd.Function):
    """Results of the shards -> those of the head: red by log-sum-exp (or sum), cos_y and sum_u by sum, best by maximum.

    Takes and gives float64, so that the merge adds no rounding of its own to `red`.
    """

    @staticmethod
    def forward(
        ctx, red: Tensor, cos_y: Tensor, sum_u: Tensor, best: Tensor, sums: Tensor, softmax: bool, ranks: Ranks
    ):
        parts = torch.cat([torch.stack([red, best, cos_y, sum_u]), sums])  # [4 + n, B]
        if ranks.world * parts.numel() * parts.element_size() <= GATHERED_BYTES:
            parts = ranks.gather(parts)  # [world, 4 + n, B]
            top = parts[:, :2].amax(0)
            tail = parts[:, 2:].sum(0)
            total = parts[:, 0].logsumexp(0) if softmax else parts[:, 0].sum(0)
        else:
            top = ranks.reduce_(parts[:2].clone(), "MAX")()
            floor = torch.where(top[0] == -torch.inf, 0, top[0])
            parts[1] = torch.exp(red - floor) if softmax else red
            tail = ranks.reduce_(parts[1:])()
            total = tail[0].log() + floor if softmax else tail[0]
            tail = tail[1:]
        ctx.share = torch.where(total == -torch.inf, 0, torch.exp(red - total)) if softmax else None
        found = tail[0].clone(), tail[1].clone(), top[1].clone(), tail[2:].clone()
        ctx.mark_non_differentiable(*found[2:])
        return total, *found

    @staticmethod
    def backward(ctx, g_red: Tensor, g_cos_y: Tensor, g_sum_u: Tensor, *_):
        g_red = g_red if ctx.share is None else g_red * ctx.share
        return g_red, g_cos_y, g_sum_u, None, None, None, None
