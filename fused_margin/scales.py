"""Scales that a training sets by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .margins import RowStats
from .margins.checks import count
from .state import KeepsPrecision, recomputing


class ScaleRule(KeepsPrecision):
    """A scale with a state: `prepare` gives that of one batch, 0-dim and without gradient, and moves the state.

    The state moves and stays float32 as that of a `fm.StatefulMargin` does.
    """

    needs: tuple[str, ...] = ()  # of RowStats

    def prepare(self, rows: RowStats, rivals: Callable[[Tensor], Tensor]) -> Tensor:
        """s; `rivals(s)` is each row's log-sum-exp of the rivals' s c_j, [B], for one more forward sweep."""
        raise NotImplementedError(f"{type(self).__name__} must define prepare(self, rows, rivals)")

    def value(self) -> Tensor:
        """The scale as it stands, for logits."""
        raise NotImplementedError(f"{type(self).__name__} must define value(self)")


class AdaCos(ScaleRule):
    """A scale that follows the training, for any margin (the paper's has none: NormFace).

    Equivalent to: `s = sqrt(2) log(C - 1)` where not dynamic; else, in training mode and before use,
    `s = log(mean_i sum_j exp(s_old c_ij)) / cos(min(pi / 4, median_i theta_iy))`, which takes one more forward sweep.
    Args: num_classes, at least 3, that of the head. State: `s`, at first that of the fixed scale.
    Use: `fm.MarginHead(..., scale=fm.AdaCos(num_classes))`.
    Source: Zhang et al. 2019, AdaCos (arXiv 1905.00292).
    """

    needs = ("cos_y",)

    def __init__(self, num_classes: int, dynamic: bool = True) -> None:
        super().__init__()
        num_classes = count("num_classes", num_classes, 3, "log(C - 1) must be positive")
        self.num_classes, self.dynamic = num_classes, dynamic
        self.register_buffer("s", torch.tensor(math.sqrt(2) * math.log(num_classes - 1)))

    @torch.no_grad()
    def prepare(self, rows: RowStats, rivals: Callable[[Tensor], Tensor]) -> Tensor:
        if self.num_classes != rows.num_classes:
            raise ValueError(f"AdaCos was made for {self.num_classes} classes, and the head has {rows.num_classes}")
        s = self.s.to(rows.dtype, copy=True)
        if not (self.dynamic and self.training) or recomputing():
            return s
        count = rows.valid.sum()
        lse = torch.where(rows.valid, rivals(s), -torch.inf)
        mean = lse.logsumexp(0) - count.clamp_min(1).to(rows.dtype).log()
        angle = torch.where(rows.valid, torch.acos(rows.cos_y.clamp(-1, 1)), torch.nan).nanmedian()
        new = mean / torch.cos(angle.clamp_max(math.pi / 4))
        new = torch.where((count > 0) & new.isfinite(), new, s)
        self.s.copy_(new)
        return new

    def value(self) -> Tensor:
        return self.s

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, dynamic={self.dynamic}"
