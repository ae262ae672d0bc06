"""The rows of all ranks: one collective brings embeddings, labels and sample weights, packed as bytes, to every rank.

Ranks may have different numbers of rows. Shorter ones are filled up to the longest, and what was filled is cut off
again; where the number is not exchanged (`capacity`), it stays, as rows that are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ranks import Ranks

_WORD = 8  # bytes to which everything in a packed row is aligned
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Batch:
    """What the ranks bring to one step."""

    ranks: Ranks
    sizes: list[int]  # rows of each rank in the tensors of all
    count: int  # of this rank
    x: Tensor  # [B, D], no gradient
    labels: Tensor  # [B] int64
    sample_weight: Tensor | None  # [B]
    learns: bool  # whether any rank's embeddings want a gradient: then every rank takes part in its sum

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.ranks.rank])

    def own(self, t: Tensor) -> Tensor:
        """This rank's rows of a tensor [B, ...]."""
        return t[self.start : self.start + self.count]

    def all_of(self, t: Tensor) -> Tensor:
        """[B, ...] from this rank's rows of it."""
        return _joined(self.ranks.gather(_filled(t, max(self.sizes))), self.sizes)

    def own_sum(self, t: Tensor) -> Callable[[], Tensor]:
        """Starts the sum of [B, ...] over the ranks; what is returned waits, and gives this rank's rows."""
        most = max(self.sizes)
        if min(self.sizes) == most:
            parts = t.view(len(self.sizes), most, *t.shape[1:])
        else:
            parts = torch.stack([_filled(part, most) for part in t.split(self.sizes)])
        finish = self.ranks.scatter_sum(parts)
        return lambda: finish()[: self.count]


def _filled(t: Tensor, rows: int, value: int = 0) -> Tensor:
    """Padded at the end of dim 0."""
    missing = rows - t.shape[0]
    return t if not missing else F.pad(t, (0, 0) * (t.dim() - 1) + (0, missing), value=value)


def _joined(parts: Tensor, sizes: list[int]) -> Tensor:
    """[B, ...] of [world, most, ...]."""
    if min(sizes) == parts.shape[1]:
        return parts.flatten(0, 1)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def gather_batch(
    ranks: Ranks, x: Tensor, labels: Tensor, sample_weight: Tensor | None, capacity: int | None, ignore_index: int
) -> Batch:
    """The rows of all ranks. Two collectives, one if `capacity` says how many rows a rank has at most."""
    count, learns, x = x.shape[0], torch.is_grad_enabled() and x.requires_grad, x.detach()
    if ranks.world == 1:
        return Batch(ranks, [count], count, x, labels, sample_weight, learns)
    if capacity is None:
        sizes, learns = _exchange(ranks, x, sample_weight, learns)
    else:  # nothing says what the others want
        sizes, learns = [capacity] * ranks.world, torch.is_grad_enabled()
    most = max(sizes)
    columns = [_filled(labels, most, ignore_index)]
    if sample_weight is not None:
        columns.append(_filled(sample_weight.detach().double(), most))
    packed = [column[:, None].contiguous().view(torch.uint8) for column in columns]
    body = _filled(x, most).contiguous().view(torch.uint8)
    packed.append(F.pad(body, (0, -body.shape[1] % _WORD)))
    everyone = _joined(ranks.gather(torch.cat(packed, 1)), sizes)
    end = _WORD * len(columns)
    x_all = everyone[:, end : end + body.shape[1]].view(x.dtype)
    weights = everyone[:, _WORD:end].contiguous().view(torch.float64)[:, 0].to(sample_weight) if end > _WORD else None
    labels_all = everyone[:, :_WORD].contiguous().view(torch.int64)[:, 0]
    return Batch(ranks, sizes, count, x_all, labels_all, weights, learns)


_FACTS = 5  # that ranks exchange before a batch
_REFUSED = -1  # in the place of each, from a rank that has raised


def refuse(ranks: Ranks, capacity: int | None, device: torch.device) -> None:
    """Lets the other ranks, which wait in `gather_batch`, know that this one raises."""
    if ranks.world > 1 and capacity is None:
        ranks.gather(torch.full((_FACTS,), _REFUSED, dtype=torch.int64, device=device))


def _exchange(ranks: Ranks, x: Tensor, sample_weight: Tensor | None, learns: bool) -> tuple[list[int], bool]:
    """Rows of each rank, and whether any wants a gradient; raises on all if they bring not the same kind of thing."""
    mine = [x.shape[0], _DTYPES.index(x.dtype), sample_weight is not None, torch.is_grad_enabled(), learns]
    everyone = ranks.gather(torch.tensor(mine, dtype=torch.int64, device=x.device)).tolist()
    refused = [rank for rank, row in enumerate(everyone) if row[0] == _REFUSED]
    if refused:
        raise ValueError(
            f"rank {refused[0]} was given what the head does not take, and says there what is wrong with it"
        )
    for column, name in enumerate(("dtype of the embeddings", "sample_weight", "grad mode"), 1):
        values = [row[column] for row in everyone]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[v]) if name.startswith("dtype") else bool(v) for v in values]
            raise ValueError(f"the ranks differ in the {name}: {shown}; expected the same on all")
    return [int(row[0]) for row in everyone], any(row[-1] for row in everyone)
