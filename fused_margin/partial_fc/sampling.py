"""Which classes of a shard take part in a step: all that are a row's target, and others drawn or found among the rest.

    stratified   one row of each of `count` blocks of the shard: sorted as it comes, no sort of random numbers
    uniform      any subset of `count` rows is as likely as any other
    hard         the `count` rows with the largest cosine to any embedding of the batch

The number of rows is fixed by shapes alone, and nothing here asks the device for a value: a step does not wait for a
GPU. So it must hold the worst case, all B rows of the batch having targets of their own in this shard.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import EPS, acc_dtype

SAMPLINGS = ("stratified", "uniform", "hard")
_CHUNK = 16_384  # classes whose cosines exist at one time in `hard`


def sample_size(rows: int, rate: float, batch: int) -> int:
    """Rows of a shard that are swept: `rate` of them, and never fewer than the targets that there may be."""
    return min(rows, max(math.ceil(rate * rows), batch))


def mixed(seed: int, *numbers: int) -> int:
    """One 63-bit seed of several numbers (SplitMix64's finaliser over each)."""
    mask = (1 << 64) - 1
    state = seed & mask
    for number in numbers:
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def distinct(targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Targets [B] in rising order, and which are the first of their kind and not `rows`, which stands for none."""
    targets = targets.sort().values
    first = torch.ones_like(targets, dtype=torch.bool)
    first[1:] = targets[1:] != targets[:-1]
    return targets, first & (targets < rows)


def stratified(targets: Tensor, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `rows` rows in rising order, all of `targets` [B] among them (`rows` stands for no target).

    Each block gives a random row. Targets that are not among these take the place of other draws, evenly spread from a
    random one on, so that every other row of the shard is as likely, the neighbours of a target too.
    """
    device = targets.device
    starts = torch.arange(count + 1, device=device) * rows // count
    draw = torch.rand(count + 1, generator=generator, device=device, dtype=torch.float64)
    length = starts[1:] - starts[:-1]
    picked = starts[:-1] + torch.minimum((draw[:-1] * length).long(), length - 1)

    targets, is_first = distinct(targets, rows)
    next_target = torch.searchsorted(targets, picked)
    rival = F.pad(targets, (0, 1), value=rows)[next_target] != picked
    rivals = rival.sum()
    surplus = is_first.sum() - (count - rivals)  # targets that no draw is
    turn = (rival.cumsum(0) - 1 + (draw[-1] * rivals).long()) % rivals.clamp_min(1)
    gives_up = (turn + 1) * surplus // rivals.clamp_min(1) != turn * surplus // rivals.clamp_min(1)
    kept = rival & ~gives_up

    kept_before = F.pad(kept.cumsum(0), (1, 0))
    out = torch.empty(count + 1, dtype=torch.int64, device=device)  # the last place is for what takes no part
    targets_before = F.pad(is_first.cumsum(0), (1, 0))[next_target]
    out[torch.where(kept, kept_before[:-1] + targets_before, count)] = picked
    place = is_first.cumsum(0) - 1 + kept_before[torch.searchsorted(picked, targets)]
    out[torch.where(is_first, place, count)] = targets
    return out[:-1]


def _best(score: Tensor, targets: Tensor, count: int) -> Tensor:
    """Rows of the `count` largest of score [rows + 1], targets first."""
    score[targets] = torch.inf
    return score[:-1].topk(count, sorted=False).indices.sort().values


def uniform(targets: Tensor, rows: int, count: int, generator: torch.Generator) -> Tensor:
    return _best(torch.rand(rows + 1, generator=generator, device=targets.device), targets, count)


@torch.no_grad()
def hard(targets: Tensor, count: int, x: Tensor, w: Tensor, sub_centers: int) -> Tensor:
    """By cosines of x [B, D] with w [rows * K, D]; one sweep of products, without a tensor of B x C."""
    acc, rows = acc_dtype(x), w.shape[0] // sub_centers
    x_hat = F.normalize(x.to(acc), dim=1, eps=EPS)
    score = x_hat.new_full((rows + 1,), -torch.inf)
    for first in range(0, rows if len(x) else 0, _CHUNK):  # without rows none is nearer than another
        part = w[first * sub_centers : (first + _CHUNK) * sub_centers].to(acc)
        cos = F.linear(F.normalize(part, dim=1, eps=EPS), x_hat)  # [n K, B]
        score[first : first + len(part) // sub_centers] = cos.amax(1).view(-1, sub_centers).amax(1)
    return _best(score, targets, count)
