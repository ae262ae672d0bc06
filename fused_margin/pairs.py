"""Losses without class weights' logits: the centre loss, and pairs and triplets through pytorch-metric-learning.

total = head(x, y) + lam / 2 * center_loss(x, y)          contrastive(pos, neg)(x, y)          triplet(alpha)(x, y)
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from .labels import check_labels, classes_of
from .margins.checks import choice, count, number
from .state import KeepsPrecision


class CenterLoss(KeepsPrecision):
    """The squared distance of each embedding from the centre of its class; centres move by their own rule.

    Equivalent to: `((x - centers[labels]) ** 2).sum(1).mean()` (halved: `mean / 2` is the paper's L_C / B), with the
    gradient `2 (x - c_y)` by x and none by the centres. In training mode, after the loss is computed,
    `centers[j] -= alpha * sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)`, n_j the rows of class j; rows that are
    not finite have no part in it.
    Use: `loss = head(x, labels) + lam / 2 * center_loss(x, labels)`; the paper has lam = 0.003, alpha = 0.5.
    Args: embedding_size, num_classes; alpha in [0, 1] (0.5); reduction "mean", "sum" or "none"; ignore_index.
    Labels as those of a head: an integer type, in [0, C) or `ignore_index`. 16-bit embeddings are read as float32.
    State: `centers` [C, D], 0 at first, float32 (float64 after `.double()`) also in a 16-bit model. Call it outside of
    what `torch.utils.checkpoint` wraps: it moves the centres after use, so that a second forward sees others.
    jxgu1016's code counts from 1 too but divides by the batch size once more; facenet's moves by each row without a
    count.
    Source: Wen et al. 2016, A Discriminative Feature Learning Approach (ECCV 2016) eqs. 2-5.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        alpha: float = 0.5,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        number("alpha", alpha, 0, 1)
        choice("reduction", reduction, ("mean", "sum", "none"))
        embedding_size = count("embedding_size", embedding_size)
        num_classes = count("num_classes", num_classes)
        self.alpha, self.reduction, self.ignore_index = alpha, reduction, ignore_index
        self.register_buffer("centers", torch.zeros(num_classes, embedding_size))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if embeddings.dim() != 2 or embeddings.shape[1] != self.centers.shape[1]:
            raise ValueError(
                f"embeddings have shape {list(embeddings.shape)}; expected [B, {self.centers.shape[1]}] of raw rows"
            )
        rows, valid = classes_of(labels, len(embeddings), len(self.centers), self.ignore_index)
        x = torch.where(valid[:, None], embeddings, 0).to(self.centers.dtype)
        apart = torch.where(valid[:, None], x - self.centers[rows], 0)
        loss = (apart * apart).sum(1)
        if self.training:
            self._move(apart.detach(), rows, valid)
        if self.reduction == "none":
            return loss
        return loss.sum() / (valid.sum().clamp_min(1) if self.reduction == "mean" else 1)

    @torch.no_grad()
    def _move(self, apart: Tensor, rows: Tensor, valid: Tensor) -> None:
        valid = valid & apart.isfinite().all(1)  # a step that GradScaler skips must not stay in the centres
        apart = torch.where(valid[:, None], apart, 0)
        counts = torch.ones_like(self.centers[:, 0]).index_add_(0, rows, valid.to(self.centers.dtype))
        share = self.alpha * apart / counts[rows][:, None]
        self.centers.index_add_(0, rows, share)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.centers)}, alpha={self.alpha}"


def _library() -> ModuleType:
    try:
        import pytorch_metric_learning
        import pytorch_metric_learning.distances
        import pytorch_metric_learning.losses
        import pytorch_metric_learning.miners
        import pytorch_metric_learning.reducers
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"pair losses are those of pytorch-metric-learning, and {missing.name} is not installed: "
            "pip install 'fused_margin[pairs]'"
        ) from None
    return pytorch_metric_learning


class _Pair(nn.Module):
    """A loss of pytorch-metric-learning, with its miner where it has one, of the rows that are not ignored.

    That library waits for the device to find its pairs, and so may what is here.
    """

    def __init__(self, loss: nn.Module, ignore_index: int, miner: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.ignore_index, self.miner = loss, ignore_index, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings have shape {list(embeddings.shape)}; expected two dimensions, [B, D]")
        check_labels(labels, len(embeddings))
        labels = labels.long()
        valid = labels != self.ignore_index
        negative = valid & (labels < 0)
        if negative.any():
            row = int(negative.nonzero()[0])
            raise RuntimeError(
                f"labels[{row}] = {int(labels[row])} is below 0 and is not ignore_index = {self.ignore_index}"
            )
        embeddings, labels = embeddings[valid], labels[valid]
        if not len(labels):
            return embeddings.sum()  # 0, with a gradient of 0
        return self.loss(embeddings, labels, None if self.miner is None else self.miner(embeddings, labels))


def contrastive(margin: float = 1.0, *, ignore_index: int = -100) -> nn.Module:
    """The contrastive loss over all pairs of a batch, on unit vectors.

    Equivalent to: `mean of D^2 over pairs of one class + mean of relu(margin - D^2) over the others`, D^2 = 2 - 2 cos,
    the means over the pairs that are not 0.
    Args: margin in [0, 4] (default 1), in squared distances; ignore_index: rows of this label are in no pair. Returns:
        a module, (embeddings [B, D], labels [B]) -> loss. Labels are integers, from 0 on or `ignore_index`.
    Source: the form of metric-learning reviews. Hadsell et al. 2006 (CVPR 2006) has a factor 1/2, and the square of a
    hinge of D in place of the hinge of D^2. Needs pytorch-metric-learning.
    """
    number("margin", margin, 0, 4, "squared distances of unit vectors")
    pml = _library()
    return _Pair(pml.losses.ContrastiveLoss(0.0, margin, distance=pml.distances.LpDistance(power=2)), ignore_index)


def triplet(margin: float = 0.2, mining: str = "semihard", *, ignore_index: int = -100) -> nn.Module:
    """The triplet loss on unit vectors, with the triplets that `mining` names.

    Equivalent to: `mean of relu(D^2(a, p) - D^2(a, n) + margin)`, D^2 = 2 - 2 cos, over the triplets with
    semihard: `D^2(a, p) < D^2(a, n) < D^2(a, p) + margin` | hard: `D^2(a, n) < D^2(a, p)` | all: those with a loss; the
    mean is over the triplets whose loss is not 0.
    Args: margin > 0 (default 0.2), in squared distances; ignore_index: rows of this label are in no triplet. Returns:
        a module, (embeddings [B, D], labels [B]) -> loss. Labels are integers, from 0 on or `ignore_index`.
    Source: Schroff et al. 2015, FaceNet (arXiv 1503.03832) eqs. 1-4; needs pytorch-metric-learning.
    """
    number("margin", margin, 1e-9, 4, "squared distances of unit vectors")
    choice("mining", mining, ("semihard", "hard", "all"))
    pml = _library()
    distance = pml.distances.LpDistance(power=2)
    loss = pml.losses.TripletMarginLoss(margin, distance=distance)
    return _Pair(loss, ignore_index, pml.miners.TripletMarginMiner(margin, mining, distance=distance))
