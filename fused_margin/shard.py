"""The classes that a sweep goes over: all of a head's, here; those of one rank of many, in partial_fc.

What stands between the [B] work of `functional` and the operators: a shard sweeps its rows of `weight`, and gives the
result for all classes of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .spec import Spec


class Shard:
    """All classes in one place: the sweep's result as it is."""

    may_be_empty = False  # `weight` may have no row
    whole = True  # `weight` has all classes, and all are swept: what a sweep finds needs no more work

    def count(self, w: Tensor, sub_centers: int) -> int:
        """C, the classes of the head."""
        return w.shape[0] // sub_centers

    def swept(self, spec: Spec) -> int:
        """How many classes take part in the softmax: fewer than C where they are sampled."""
        return spec.num_classes

    def target_cosine(self, x: Tensor, w: Tensor, labels: Tensor, spec: Spec) -> Tensor:
        """cos_y [B], without gradient."""
        return ops.target_cosine(x, w, labels, None, spec)

    def sweep(
        self,
        x: Tensor,
        w: Tensor,
        labels: Tensor,
        scale: Tensor,
        tau: Tensor | None,
        bias: Tensor | None,
        rule_args: Tensor,
        spec: Spec,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(red, cos_y, sum_u [B], aux [6, B]), as `ops.sweep`, over all classes of the head."""
        return ops.sweep(x, w, labels, scale, tau, bias, None, rule_args, spec)

    def weight_norm(self, w: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """|w_y| [B], with its gradient."""
        return torch.linalg.vector_norm(w[torch.where(valid, labels, 0)], dim=1, dtype=dtype)

    def at_rows(self, values: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """A tensor of one value for each class of `weight`, at the rows' labels; what ignored rows read is dropped."""
        return values[torch.where(valid, labels, 0)]

    def part(self, values: Tensor, num_classes: int) -> Tensor:
        """Of a tensor [C], or 0-dim for all classes, the values of the classes of `weight`."""
        return values.expand(num_classes).contiguous()


ALL_CLASSES = Shard()
