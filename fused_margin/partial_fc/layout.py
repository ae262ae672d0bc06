"""Which rank has which classes: ceil(C / world) each in order, as DTensor and torch.distributed.checkpoint split them.

10 classes on 4 ranks: 3, 3, 3, 1 (InsightFace: 3, 3, 2, 2). The last ranks may have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .ranks import Ranks


class Layout(NamedTuple):
    """The part of `num_classes` classes that one rank of `world` has."""

    num_classes: int
    world: int
    rank: int

    @property
    def most(self) -> int:
        return -(-self.num_classes // self.world)

    @property
    def first(self) -> int:
        return min(self.rank * self.most, self.num_classes)

    @property
    def last(self) -> int:
        return min((self.rank + 1) * self.most, self.num_classes)

    @property
    def count(self) -> int:
        return self.last - self.first

    def of(self, rank: int) -> Layout:
        return self._replace(rank=rank)

    def part(self, full: Tensor) -> Tensor:
        """The rows of a tensor [C, ...] that this rank has."""
        return full[self.first : self.last]


def sharded(local: Tensor, layout: Layout, ranks: Ranks) -> Tensor:
    """This rank's rows as the part of a DTensor [C, ...]; on one rank the tensor as it is. No copy."""
    if ranks.world == 1 or isinstance(local, DTensor):
        return local
    mesh = DeviceMesh.from_group(ranks.group, local.device.type)
    shape = torch.Size([layout.num_classes, *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def local_part(t: Tensor, layout: Layout) -> Tensor:
    """This rank's rows of a DTensor, of a tensor [C, ...] that is whole, or of what has these rows only."""
    if isinstance(t, DTensor):
        with torch.no_grad():
            return t.to_local()
    return layout.part(t) if t.shape[0] == layout.num_classes and layout.world > 1 else t


class LocalRows(torch.autograd.Function):
    """The rows [C_local * K, D] of a parameter [C, K * D], as they lie in memory; gradients go back in its own kind."""

    @staticmethod
    def forward(ctx, weight: Tensor, dim: int) -> Tensor:
        ctx.like, ctx.columns = weight, weight.shape[1]
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        return local.detach().view(-1, dim)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        like, columns = ctx.like, ctx.columns
        if g.shape[1] != columns and g.layout == torch.sparse_coo:  # K rows make one of a class
            k = columns // g.shape[1]
            classes = g._indices()[:, ::k] // k
            g = torch.sparse_coo_tensor(
                classes, g._values().view(-1, columns), (g.shape[0] // k, columns), is_coalesced=True,
                check_invariants=False,
            )  # fmt: skip
        elif g.shape[1] != columns:
            g = g.view(-1, columns)
        if isinstance(like, DTensor):
            g = DTensor.from_local(
                g, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return g, None


def all_equal(values: list) -> bool:
    return all(value == values[0] for value in values[1:])


def check_agreement(ranks: Ranks, described: dict[str, object]) -> None:
    """Raises on every rank if they were not built alike: wrong numbers would come out, or a wait without end."""
    everyone = ranks.objects(described)
    wrong = []
    for name in dict.fromkeys(name for found in everyone for name in found):
        values = [found.get(name, "not given") for found in everyone]
        if not all_equal(values):
            by_value: dict[str, list[int]] = {}
            for rank, value in enumerate(values):
                by_value.setdefault(repr(value), []).append(rank)
            wrong.append(f"{name}: " + ", ".join(f"{value} on rank {_some(on)}" for value, on in by_value.items()))
    if wrong:
        raise ValueError(f"the ranks of a PartialFC must be built alike, and differ in {'; '.join(wrong)}")


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
