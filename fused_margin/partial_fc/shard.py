"""The classes of one rank: sweeps them, all or those of `index`, and combines what the ranks found.

    x, scale -> sweep of this rank's rows -> red, cos_y, sum_u -> Merge -> those of the head, on every rank

The gradient of x is summed over the ranks while the sweep for the weights' gradient runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..shard import Shard
from ..spec import Aux, Spec, Want, acc_dtype
from .batch import Batch
from .layout import Layout
from .ranks import Enter, Leave, Merge, Ranks


@dataclass(frozen=True, eq=False)
class RankShard(Shard):
    """What one rank sweeps in one step."""

    layout: Layout
    ranks: Ranks
    batch: Batch
    own_rows: Tensor  # [b, D], this rank's embeddings: what gets the gradient of x
    position: (
        Tensor  # [B] the row's target among the classes that are swept; their count if it is not here; -1: ignored
    )
    index: Tensor | None  # [M] classes of this rank that are swept, in rising order; None: all
    swept_classes: int  # by all ranks
    sub_centers: int
    sparse: bool

    may_be_empty = True

    @property
    def whole(self) -> bool:
        return self.ranks.world == 1 and self.index is None

    def count(self, w: Tensor, sub_centers: int) -> int:
        return self.layout.num_classes

    def swept(self, spec: Spec) -> int:
        return self.swept_classes

    @property
    def _classes(self) -> int:
        return self.layout.count if self.index is None else len(self.index)

    def _rows(self) -> Tensor | None:
        if self.index is None or self.sub_centers == 1:
            return self.index
        k = self.sub_centers
        return (self.index[:, None] * k + torch.arange(k, device=self.index.device)).flatten()

    def _local(self, spec: Spec) -> Spec:
        return spec._replace(num_classes=self._classes + 1, first_class=0, ignore_index=-1)

    def target_cosine(self, x: Tensor, w: Tensor, labels: Tensor, spec: Spec) -> Tensor:
        found = ops.target_cosine(x, w, self.position, self._rows(), self._local(spec))
        return self.ranks.reduce_(found)()

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
        spec, delivery = self._local(spec), ops.Delivery(self.sparse)
        if self.ranks.world > 1:
            x = x.detach().to(acc_dtype(x))  # so that the sum of its gradient over the ranks is one of float32
            rows = self.own_rows if spec.want & Want.DX else None
            delivery = ops.Delivery(self.sparse, rows, self._reduce)
        if bias is not None and self.index is not None:
            bias = bias[self.index]
        out = ops.sweep(x, w, self.position, scale, tau, bias, self._rows(), rule_args, spec, delivery)
        return out if self.ranks.world == 1 else self._merged(*out, spec)

    def _reduce(self, d_x: Tensor | None, d_scale: Tensor | None) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        started_x = None if d_x is None else self.batch.own_sum(d_x)
        started_scale = None if d_scale is None else self.ranks.reduce_(d_scale.clone(), wait=False)
        return lambda: (None if started_x is None else started_x(), None if started_scale is None else started_scale())

    def _merged(
        self, red: Tensor, cos_y: Tensor, sum_u: Tensor, aux: Tensor, spec: Spec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        known, dtype, softmax = Aux(*aux), red.dtype, spec.reduction == "logsumexp"
        low = torch.where(known.red_low.isfinite(), known.red_low, 0) if softmax else 0
        stats = bool(spec.want & Want.STATS)
        best = known.best.double() if stats else torch.zeros_like(red, dtype=torch.float64)
        sums = torch.stack([known.masked_count, known.masked_sum])[: 2 * stats].double()
        found = Merge.apply(red.double() + low, cos_y.double(), sum_u.double(), best, sums, softmax, self.ranks)
        red, cos_y, sum_u, best, sums = (t.to(dtype) for t in found)
        nothing = torch.zeros_like(best)
        count, total = sums if stats else (nothing, nothing)
        return red, cos_y, sum_u, torch.stack([best, count, total, nothing, nothing, nothing])

    def _at_target(self, values: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """values [C_local, ...] at the targets that are here (the first ones elsewhere), and which these are."""
        here = valid & (labels >= self.layout.first) & (labels < self.layout.last)
        if not self.layout.count:
            return values.sum() + values.new_zeros(labels.shape[0], *values.shape[1:]), here
        return values[torch.where(here, labels - self.layout.first, 0)], here

    def weight_norm(self, w: Tensor, labels: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
        rows, here = self._at_target(w.unflatten(0, (-1, self.sub_centers))[:, 0], labels, valid)
        norms = torch.linalg.vector_norm(torch.where(here[:, None], rows, 1), dim=1, dtype=dtype)
        return Leave.apply(torch.where(here, norms, 0), self.ranks)

    def fetch(self, values: list[Tensor], labels: Tensor, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Tensors [C_local] at the rows' labels, [B] each, from the ranks that have them: one collective."""
        found = [self._at_target(v, labels, valid) for v in values]
        return tuple(Leave.apply(torch.stack([torch.where(here, v.to(dtype), 0) for v, here in found]), self.ranks))

    def at_rows(self, values: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return self.fetch([values], labels, valid, acc_dtype(values))[0]

    def part(self, values: Tensor, num_classes: int) -> Tensor:
        values = Enter.apply(values, self.ranks) if self.ranks.world > 1 else values
        return self.layout.part(values.expand(num_classes)).contiguous()
