"""Optimizers for class weights: row-sparse ones, and ones that run the dW sweep themselves. See docs/optim.md."""

from ..deferred import DeferredGradient
from .rows import RowAdamW, RowSGD
from .sweep import SweepAdamW, SweepSGD

__all__ = ["DeferredGradient", "RowAdamW", "RowSGD", "SweepAdamW", "SweepSGD"]
