"""What happens to the losses of the rows, all on [B]: smoothing, mining by the cross-entropy, weights, reduction.

loss_i -> (1 - eps) loss_i + eps * (mean over the classes) -> times a factor of the cross-entropy -> + the margin's
penalty -> weights -> mean, sum or none
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .margins import GRADIENTS, Margin, Outcome, PerClass, PerSample
from .margins.checks import choice, number
from .margins.parameters import gather_rows

REDUCTIONS = ("mean", "sum", "none")


class Extras(NamedTuple):
    """What a call asks for beside the losses of its rows."""

    reduction: str
    smoothing: float
    mining: Mining | None
    by_sample: Tensor | None  # weights [B]
    by_class: Tensor | None  # weights [C]

    @property
    def weigh(self) -> bool:
        """Whether rows count by more than being there."""
        return any(part is not None for part in (self.mining, self.by_sample, self.by_class))


class Mining:
    """A weight for each row that its own loss decides; works with every margin."""

    def factor(self, loss: Tensor, valid: Tensor) -> Tensor:
        """[B], multiplied with the losses; gradients flow through it unless it is detached.

        loss: the rows' cross-entropy -log p_y, without smoothing, penalty or weight; of a loss without softmax, itself.
        """
        raise NotImplementedError(f"{type(self).__name__} must define factor(self, loss, valid)")

    def counts(self, factor: Tensor) -> Tensor:
        """[B]: how much each row counts in a mean."""
        return torch.ones_like(factor)


@dataclass(frozen=True, eq=False)
class Focal(Mining):
    """Focal loss: rows that are classified well count less.

    Equivalent to: `loss * alpha * (1 - p) ** gamma` for each row by itself, p the softmax probability of its class,
    margin included. What a margin adds as a penalty is added after.
    Args: gamma >= 1 (default 2; below 1 the slope at p = 1 is infinite), alpha > 0 (1). gradient "exact" differentiates
        the factor too, so that the cross-entropy's gradient of the whole row is multiplied with
        `(1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p`; "detached" takes the factor as a constant.
    Source: Lin et al. 2017, Focal loss (arXiv 1708.02002) eq. 4; with a margin it is eq. 4 of SV-Softmax (1812.11317).
        xiaoboCASIA/SV-X-Softmax is exact, clcarwin's detached; face.evoLVe applies it to the mean, another loss.
    """

    gamma: float = 2.0
    alpha: float = 1.0
    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        number("gamma", self.gamma, 1, 1e3, "below 1 the slope at p = 1 is infinite")
        number("alpha", self.alpha, 1e-9)
        choice("gradient", self.gradient, GRADIENTS)

    def factor(self, loss: Tensor, valid: Tensor) -> Tensor:
        miss = -torch.expm1(-(loss.detach() if self.gradient == "detached" else loss))  # 1 - p
        return self.alpha * miss**self.gamma


@dataclass(frozen=True, eq=False)
class HardRows(Mining):
    """Hard-row mining (HM-Softmax, OHEM): only the rows with the largest losses count.

    Equivalent to: `loss.topk(max(1, int(keep * B))).values`, B without the ignored rows; the others weigh 0, with a
    margin's penalty, and the mean is over the kept ones. Among equal losses the first rows are kept. With smoothing or
    a penalty it is the cross-entropy alone that ranks the rows.
    Args: keep in (0, 1] (default 0.9).
    Source: Shrivastava et al. 2016, OHEM (arXiv 1604.03540), as in xiaoboCASIA/SV-X-Softmax.
    """

    keep: float = 0.9

    def __post_init__(self) -> None:
        number("keep", self.keep, 1e-9, 1)

    def factor(self, loss: Tensor, valid: Tensor) -> Tensor:
        hardness = torch.where(valid, loss.detach(), -torch.inf)
        rank = hardness.argsort(descending=True, stable=True).argsort()
        kept = (self.keep * valid.sum() + 1e-6).floor().clamp_min(1)  # 0.9 * 10 is 8.999... in some dtypes
        return ((rank < kept) & valid).to(loss.dtype)

    def counts(self, factor: Tensor) -> Tensor:
        return factor


def check_reduction(reduction: str) -> None:
    choice("reduction", reduction, REDUCTIONS)


def check_extras(smoothing: float, mining: Mining | None, softmax: bool) -> None:
    """Raises for what the row work cannot take."""
    number("label_smoothing", smoothing, 0, 1 - 1e-6)
    if smoothing and not softmax:
        raise ValueError("label_smoothing is defined for a softmax; this loss has none: expected label_smoothing=0")
    if mining is not None and not isinstance(mining, Mining):
        raise TypeError(f"mining: got {mining!r}; expected fm.Focal(), fm.HardRows() or None")
    if isinstance(mining, Focal) and not softmax:
        raise ValueError("fm.Focal takes p of a softmax, and this loss has none: expected fm.HardRows or None")


def smoothed(loss: Tensor, out: Outcome, margin: Margin, smoothing: float, num_classes: int) -> Tensor:
    """The cross-entropy against (1 - eps) one-hot + eps / C, times the margin's factor, from the plain one times it."""
    if not smoothing:
        return loss
    if not margin.smoothable():
        raise ValueError(
            f"label_smoothing = {smoothing} with {type(margin).__name__}, which has a row_loss of its own; expected "
            "label_smoothing=0, or beside row_loss a row_factor(self, out), what it multiplies the cross-entropy "
            "with"
        )
    return loss + margin.row_factor(out) * smoothing * (out.z - (out.z + out.sum_u) / num_classes)


def _weights(labels: Tensor, valid: Tensor, num_classes: int, dtype: torch.dtype, extras: Extras) -> Tensor | float:
    """The product of sample and class weights at the rows, [B], or 1.0; what ignored rows bring (NaN) is dropped."""
    weights = 1.0
    if extras.by_sample is not None:
        weights = weights * gather_rows(PerSample(extras.by_sample), labels, num_classes, dtype, "sample_weight")
    if extras.by_class is not None:
        weights = weights * gather_rows(PerClass(extras.by_class), labels, num_classes, dtype, "class_weight")
    return torch.where(valid, weights, 0) if isinstance(weights, Tensor) else weights


def reduced(
    loss: Tensor,
    labels: Tensor,
    valid: Tensor,
    num_classes: int,
    extras: Extras,
    by: Tensor,
    penalty: Tensor | float = 0.0,
) -> Tensor:
    """Mining by `by` [B], penalty, weights and reduction.

    The mean divides by the weights of the rows that count, and is 0 without any. A row that mining drops from the mean
    has no penalty either.
    """
    weights = _weights(labels, valid, num_classes, loss.dtype, extras)
    counts = weights * valid.to(loss.dtype)
    loss = torch.where(valid, loss, 0)
    if extras.mining is not None:
        factor = extras.mining.factor(torch.where(valid, by, 0), valid)
        counted = extras.mining.counts(factor)
        loss, penalty, counts = loss * factor, penalty * counted, counts * counted
    if isinstance(penalty, Tensor):
        loss = loss + torch.where(valid, penalty, 0)
    loss = loss * weights if isinstance(weights, Tensor) else loss
    if extras.reduction == "none":
        return loss
    total = loss.sum()
    if extras.reduction == "sum":
        return total
    count = counts.sum()
    return total / torch.where(count > 0, count, 1)
