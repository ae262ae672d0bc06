"""What sub-centres find: one row of a class gathers its clean samples, the others what is mislabelled."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import classes_of
from .margins.checks import count, number, tensor

_CHUNK = 4096  # samples whose K centres, [chunk, K, D], exist at one time


class Outliers(NamedTuple):
    """What `find_outliers` knows; no gradient."""

    main: Tensor  # [C] the place of each class's main centre, 0 to K - 1: the nearest one to most of its samples
    counts: Tensor  # [C, K] samples by their nearest centre
    angle: Tensor  # [N] of each sample to the main centre of its class, in degrees; nan where it is ignored
    outlier: Tensor  # [N] bool: that angle is at least the limit; False where the sample is ignored

    def main_rows(self, weight: Tensor) -> Tensor:
        """The main centres [C, D] of `weight`, in any of its layouts: to train on with one centre a class."""
        classes, k = self.counts.shape
        return weight.reshape(classes, k, -1)[torch.arange(classes, device=weight.device), self.main]


@torch.no_grad()
def find_outliers(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    sub_centers: int,
    angle: float = 75.0,
    *,
    ignore_index: int = -100,
) -> Outliers:
    """Samples that are far from the main centre of their class: train again without them.

    Equivalent to: `cos = F.normalize(x) @ F.normalize(centres of the label)`; the main centre of a class is the one
    that is nearest to most of its samples (the first of equals); outlier: `acos(cos to the main centre) >= angle`.
    Args: embeddings [N, D] of the training set; weight of C classes and K centres, [C * K, D] as a MarginHead has it,
        [C, K * D] as a PartialFC, or [C, K, D]; labels [N] in [0, C) or `ignore_index`, whose samples count nowhere;
        sub_centers K; angle in degrees, in [0, 180] (default 75). Any float dtype, computed in float32, or in float64
        where one of the two is float64. No tensor of N x K x D is made.
    Source: Deng et al. 2020, Sub-center ArcFace (ECCV 2020); K = 3 there.
    """
    number("angle", angle, 0, 180)
    sub_centers = count("sub_centers", sub_centers)
    for name, value in (("embeddings", embeddings), ("weight", weight), ("labels", labels)):
        tensor(name, value)
    centres = _centres(embeddings, weight, sub_centers)  # [C, K, D]
    at, valid = classes_of(labels, len(embeddings), len(centres), ignore_index)
    x = F.normalize(torch.where(valid[:, None], embeddings, 0).to(centres.dtype), dim=1)
    parts = zip(x.split(_CHUNK), at.split(_CHUNK), strict=True)
    cos = torch.cat([x.new_zeros(0, sub_centers), *(torch.einsum("nd,nkd->nk", p, centres[y]) for p, y in parts)])
    counts = torch.zeros(centres.shape[:2], dtype=torch.long, device=weight.device)
    counts.index_put_((at, cos.argmax(1)), valid.long(), accumulate=True)
    main = counts.argmax(1)
    degrees = torch.rad2deg(torch.acos(cos.gather(1, main[at][:, None])[:, 0].clamp(-1, 1)))
    degrees = torch.where(valid, degrees, torch.nan)
    return Outliers(main, counts, degrees, degrees >= angle)


def _centres(embeddings: Tensor, weight: Tensor, k: int) -> Tensor:
    """Unit centres [C, K, D]."""
    dtype = torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings have shape {list(embeddings.shape)}; expected two dimensions, [N, D]")
    dim, shape = embeddings.shape[1], weight.shape
    if weight.dim() == 2 and shape[1] == dim and shape[0] % k:
        raise ValueError(f"weight has {shape[0]} rows, no multiple of sub_centers = {k}")
    if not (weight.dim() == 2 and shape[1] in (dim, k * dim)) and not (weight.dim() == 3 and shape[1:] == (k, dim)):
        raise ValueError(
            f"weight has shape {list(shape)}; expected [C * {k}, {dim}], [C, {k * dim}] or [C, {k}, {dim}] for "
            f"embeddings of {dim} and sub_centers = {k}"
        )
    return F.normalize(weight.reshape(-1, k, dim).to(dtype), dim=2)
