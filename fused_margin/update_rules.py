"""What an optimizer does to rows of the weights and of its state, given their gradient: one record, one rule a name.

sgd    g += decay w    m = momentum m + (1 - dampening) g    w -= lr (nesterov ? g + momentum m : m)
adamw  w -= lr decay w    m += (1 - beta1) (g - m)    v = beta2 v + (1 - beta2) g^2
       w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)        t: the steps that the row has seen
csrc/update.h has the same for the C++ and CUDA kernels, kernels/update.py for Triton's; tests hold them together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OPTIMIZERS = {"sgd": 0, "adamw": 1}  # the codes in csrc/hyper.h
_CHUNK = 2**22  # numbers of the weights that are in work at one time


class Update(NamedTuple):
    """The numbers of one step; its fields stand in the operators' schema in this order."""

    optimizer: str
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


UPDATE_SCHEMA = (
    "str optimizer, float lr, float weight_decay, float momentum, float dampening, bool nesterov, float beta1, "
    "float beta2, float eps"
)


class State(NamedTuple):
    """An optimizer's state of one weight [R, D], float32 (float64 for float64 weights); what is not needed is None."""

    m: Tensor | None = None  # [R, D] momentum, or the mean of the gradients
    v: Tensor | None = None  # [R, D] the mean of their squares
    step: Tensor | None = None  # [R / k] float32: steps that k consecutive rows have seen


def check_rising(index: Tensor | None) -> None:
    """Raises for rows that do not rise, where a look at them makes nobody wait."""
    if index is not None and index.device.type == "cpu" and not (index[1:] > index[:-1]).all():
        raise RuntimeError("rows to update must rise: one that comes twice would be updated once")


def update_rows(w: Tensor, state: State, index: Tensor | None, grad: Tensor, update: Update) -> None:
    """One step on the rows `index` of w (None: all) in plain PyTorch, with temporaries of a bounded size.

    grad: [rows, D], of any float dtype; index must not repeat a row.
    """
    check_rising(index)
    count = w.shape[0] if index is None else index.shape[0]
    share = 1 if state.step is None else w.shape[0] // max(1, state.step.shape[0])
    size = max(1, _CHUNK // max(1, w.shape[1]) // share) * share
    for first in range(0, count, size):
        last = min(first + size, count)
        rows = slice(first, last) if index is None else index[first:last]
        _update_chunk(w, state, rows, share, grad[first:last], update)


def _update_chunk(w: Tensor, state: State, rows: slice | Tensor, share: int, grad: Tensor, update: Update) -> None:
    """Of rows that come in whole groups of `share`, which have a step in common."""
    acc = torch.float64 if w.dtype == torch.float64 else torch.float32
    at, g = w[rows].to(acc), grad.to(acc)
    m, v = (None if t is None else t[rows] for t in (state.m, state.v))
    t = None
    if state.step is not None:
        own = slice(rows.start // share, rows.stop // share) if isinstance(rows, slice) else rows[::share] // share
        t = state.step[own] + 1
        state.step[own] = t
        t = t.repeat_interleave(share)[:, None].double()  # [rows, 1]
    if update.optimizer == "sgd":
        at, m = _sgd(at, g, m, t, update)
    else:
        at, m, v = _adamw(at, g, m, v, t, update)
    w[rows] = at.to(w.dtype)
    for whole, part in ((state.m, m), (state.v, v)):
        if whole is not None:
            whole[rows] = part


def _sgd(w: Tensor, g: Tensor, m: Tensor | None, t: Tensor | None, u: Update) -> tuple[Tensor, Tensor | None]:
    g = g + u.weight_decay * w
    if m is not None:
        own = 1 - u.dampening if t is None else torch.where(t == 1, g.new_ones(()), g.new_full((), 1 - u.dampening))
        m = u.momentum * m + own * g
        g = g + u.momentum * m if u.nesterov else m
    return w - u.lr * g, m


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, u: Update) -> tuple[Tensor, Tensor, Tensor]:
    w = w * (1 - u.lr * u.weight_decay)
    m = m + (1 - u.beta1) * (g - m)
    v = u.beta2 * v + (1 - u.beta2) * g * g
    size, root = u.lr / (1 - u.beta1**t), 1 / (1 - u.beta2**t).sqrt()
    return w - size.to(w.dtype) * m / (v.sqrt() * root.to(w.dtype) + u.eps), m, v
