"""What sub-centres find: one row of a class gathers its clean samples, the others what is mislabelled."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .margins.base import number


class Outliers(NamedTuple):
    """What `find_outliers` knows; no gradient."""

    main: Tensor  # [C] the place of each class's main centre, 0 to K - 1: the nearest one to most of its samples
    counts: Tensor  # [C, K] samples by their nearest centre
    angle: Tensor  # [N] of each sample to the main centre of its class, in degrees
    outlier: Tensor  # [N] bool: that angle is at least the limit

    def main_rows(self, weight: Tensor) -> Tensor:
        """The main centres [C, D] of `weight` [C * K, D]: to train on with one centre a class."""
        classes, k = self.counts.shape
        return weight.unflatten(0, (classes, k))[torch.arange(classes, device=weight.device), self.main]


@torch.no_grad()
def find_outliers(
    embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int, angle: float = 75.0
) -> Outliers:
    """Samples that are far from the main centre of their class: train again without them.

    Equivalent to: `cos = F.normalize(x) @ F.normalize(centres of the label)`; the main centre of a class is the one
    that is nearest to most of its samples (the first of equals); outlier: `acos(cos to the main centre) >= angle`.
    Args: embeddings [N, D] of the training set, weight [C * K, D], labels [N] in [0, C), sub_centers K, angle in
        degrees, in [0, 180] (default 75).
    Source: Deng et al. 2020, Sub-center ArcFace (ECCV 2020); K = 3 there.
    """
    number("angle", angle, 0, 180)
    if sub_centers < 1 or weight.shape[0] % sub_centers:
        raise ValueError(f"weight has {weight.shape[0]} rows, no multiple of sub_centers = {sub_centers}")
    centres = F.normalize(weight.float(), dim=1).unflatten(0, (-1, sub_centers))  # [C, K, D]
    cos = torch.einsum("nd,nkd->nk", F.normalize(embeddings.float(), dim=1), centres[labels])
    counts = torch.zeros(centres.shape[:2], dtype=torch.long, device=weight.device)
    counts.index_put_((labels, cos.argmax(1)), torch.ones_like(labels), accumulate=True)
    main = counts.argmax(1)
    degrees = torch.rad2deg(torch.acos(cos.gather(1, main[labels][:, None])[:, 0].clamp(-1, 1)))
    return Outliers(main, counts, degrees, degrees >= angle)
