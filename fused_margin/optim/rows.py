"""Row-sparse training: rows that a sparse gradient names get a step, all others and their state stay as they are.

The lazy rule: a row lives in its own time. Let t_r count the steps in which row r had a gradient; then r and its state
are what torch.optim would make of this row alone in t_r steps. Between them neither momentum nor decay moves it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import step_ops
from ..deferred import DeferredGradient
from .base import AdamWRule, RowOptimizer, SGDRule


class _Rows(RowOptimizer):
    def _step_one(self, parameter: Tensor, w: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if isinstance(grad, DeferredGradient):
            raise RuntimeError(
                f"a weight of {list(w.shape)} belongs to a sweep optimizer too (SweepSGD, SweepAdamW); expected one "
                "optimizer for each parameter"
            )
        if not w.numel():
            return
        rows = w.shape[0] if w.dim() else 1
        state = self._local_state(parameter, group, w.numel() // rows)
        index = None
        if grad.layout == torch.sparse_coo:
            if grad.sparse_dim() != 1:
                raise RuntimeError(
                    f"a sparse gradient has {grad.sparse_dim()} sparse dimensions; expected 1: whole rows, as "
                    "nn.Embedding(sparse=True) gives them"
                )
            grad = grad.coalesce()
            index, grad = grad.indices()[0], grad.values()
            if not index.numel():
                return
        elif grad.layout != torch.strided:
            raise RuntimeError(f"a gradient has the layout {grad.layout}; expected a dense or a sparse COO tensor")
        grad = grad.reshape(len(index) if index is not None else rows, -1)
        w = w.view(1, 1) if not w.dim() else w if w.dim() == 2 else w.view(rows, -1)
        step_ops.take_step(w, state, index, grad, self._update(group))


class RowSGD(_Rows, SGDRule):
    """SGD that updates only the rows of a sparse gradient, in place; dense gradients move every row.

    Equivalent to, for each row r that the gradient names (g = grad[r], w = weight[r], m its momentum)::

        g = g + weight_decay * w
        m = g if this is the row's first step else momentum * m + (1 - dampening) * g
        w = w - lr * (g + momentum * m if nesterov else m)

    With every row in every gradient it is `torch.optim.SGD`. One pass over the rows, no temporary of the weight's size.

    Args: as `torch.optim.SGD`'s. Parameters may be float32, float64, bfloat16 or float16, plain or DTensors; momentum
        is float32 (float64 for float64), and 16-bit weights are rounded to nearest, ties to even.
    Source: the rule of InsightFace's Partial-FC, version 1, and PLSC; torch.optim.SparseAdam does the same for Adam.
    """


class RowAdamW(_Rows, AdamWRule):
    """AdamW that updates only the rows of a sparse gradient, in place; dense gradients move every row.

    Equivalent to, for each row r that the gradient names (t: how many did so far, this one included)::

        w = w - lr * weight_decay * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)

    With every row in every gradient it is `torch.optim.AdamW`. `torch.optim.SparseAdam` takes one t for all rows, so
    that a row which comes first in a late step moves (1 - beta1) / sqrt(1 - beta2) = 3.2 times as far.

    Args: as `torch.optim.AdamW`'s; dtypes as in `RowSGD`.
    """
