"""Verification as face recognition measures it: do two images, of classes never trained on, show the same class?

    same if cos(embedding, other embedding) > threshold

FAR, the false accept rate: part of the different pairs that are taken for the same. TAR, the true accept rate: part of
the same pairs that are. Every pair of images is tried.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FARS = (1e-2, 1e-3)


@dataclass(frozen=True)
class Verification:
    """How well pairs are told apart."""

    accuracy: float  # mean of TAR and 1 - FAR at the best threshold: same and different pairs weigh alike
    tar_at: dict[float, float]  # TAR at the FARs of FARS
    far: np.ndarray  # the ROC: rising FARs ...
    tar: np.ndarray  # ... and the TAR at each
    same_pairs: int
    different_pairs: int


@torch.no_grad()
def embed(network: nn.Module, images: Tensor, batch: int = 512) -> Tensor:
    """Embeddings of unit length, [N, D], by the network in inference mode."""
    network.eval()
    parts = [F.normalize(network(part)) for part in images.to(memory_format=torch.channels_last).split(batch)]
    network.train()
    return torch.cat(parts)


def verify(network: nn.Module, images: Tensor, labels: Tensor) -> Verification:
    """Verification over all pairs of `images` [N, 1, H, W] with `labels` [N]."""
    embeddings = embed(network, images)
    cosines = embeddings @ embeddings.T
    pairs = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    equal = labels[:, None] == labels
    same = np.sort(cosines[pairs & equal].numpy())
    different = np.sort(cosines[pairs & ~equal].numpy())
    far = np.geomspace(1 / len(different), 1, 300)
    return Verification(
        accuracy=best_accuracy(same, different),
        tar_at={rate: float(tar_at(rate, same, different)) for rate in FARS},
        far=far,
        tar=tar_at(far, same, different),
        same_pairs=len(same),
        different_pairs=len(different),
    )


def tar_at(far: float | np.ndarray, same: np.ndarray, different: np.ndarray) -> np.ndarray:
    """TAR where at most the part `far` of the different pairs is accepted; both arrays of cosines are sorted."""
    accepted = np.floor(np.asarray(far) * len(different)).astype(int)
    threshold = different[np.maximum(len(different) - 1 - accepted, 0)]
    return 1 - np.searchsorted(same, threshold, side="right") / len(same)


def best_accuracy(same: np.ndarray, different: np.ndarray) -> float:
    """The largest mean of TAR and 1 - FAR over all thresholds; both arrays of cosines are sorted."""
    tar = 1 - np.arange(len(same)) / len(same)  # accepting same[i] and all above it
    far = 1 - np.searchsorted(different, same, side="left") / len(different)
    return float(np.max((tar + 1 - far) / 2))
