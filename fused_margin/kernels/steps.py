"""What the kernels that update weights are told of a step, and the launch for gradients in memory.

The step with the gradient of the sweep: `sweep_step` of gradients.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..update_rules import State, Update, check_rising
from . import update as kernels
from .plan import ceil_div, on, power_of_two, run

_BLOCK = 1024  # numbers of w in a program of update_rows
_NUMBERS = 9  # of `update.advance`


class Step(NamedTuple):
    """Arguments and constants that `update.update_block` has in any kernel."""

    args: tuple[Tensor | int | float, ...]  # m, v, step, together and the numbers of `update.advance`
    constants: dict[str, str | bool]


def no_step(stands_in: Tensor) -> Step:
    """For a kernel that stores a gradient; `stands_in` for pointers that are not read."""
    names = ("MOMENTUM", "NESTEROV", "COUNTED")
    return Step((*[stands_in] * 3, 1, *[0.0] * _NUMBERS), {"OPTIMIZER": "", **dict.fromkeys(names, False)})


def _logarithm(beta: float) -> float:
    return max(math.log(beta), -200.0) if beta > 0 else -200.0  # exp(-200) is 0 beside 1


def _numbers(u: Update) -> tuple[float, ...]:
    """lr, decay, keep, own, keep_square, own_square, log_keep, log_keep_square, eps, each rounded to float32 once."""
    if u.optimizer == "sgd":
        return u.lr, u.weight_decay, u.momentum, 1 - u.dampening, *[0.0] * 5
    decay, logarithms = 1 - u.lr * u.weight_decay, (_logarithm(u.beta1), _logarithm(u.beta2))
    return u.lr, decay, u.beta1, 1 - u.beta1, u.beta2, 1 - u.beta2, *logarithms, u.eps


def begin(w: Tensor, state: State, index: Tensor | None, update: Update) -> Step:
    """Counts the step of the rows `index`, which come in whole groups of those that have it in common.

    Not in the kernel: lanes that hold one row's count would read what others have stored.
    """
    check_rising(index)
    if any(t is not None and t.dtype != torch.float32 for t in state):
        raise RuntimeError("an optimizer's state must be float32")
    complete = None not in state if update.optimizer == "adamw" else state.m is not None or update.momentum == 0
    if not complete:
        raise RuntimeError("the optimizer's state is incomplete")
    together = 1
    if state.step is not None:
        together = w.shape[0] // max(1, state.step.shape[0])
        if index is None:
            state.step.add_(1)
        else:
            own = index if together == 1 else index[::together] // together
            state.step.index_add_(0, own, state.step.new_ones(()).expand(own.shape))
    pointers = (w if t is None else t for t in state)
    constants = {
        "OPTIMIZER": update.optimizer,
        "MOMENTUM": state.m is not None,
        "NESTEROV": update.nesterov,
        "COUNTED": state.step is not None,
    }
    return Step((*pointers, together, *_numbers(update)), constants)


def update_rows(w: Tensor, state: State, index: Tensor | None, grad: Tensor, update: Update) -> None:
    """One launch, and one or two small ones for the steps' count."""
    rows, dim = grad.shape
    if not grad.numel():
        return
    width = power_of_two(min(dim, _BLOCK))
    with on(w):
        step = begin(w, state, index, update)
        run(
            kernels.update_rows, ceil_div(rows, _BLOCK // width) * ceil_div(dim, width),
            w, grad if index is None else index.contiguous(), grad, rows, dim, *w.stride(), *grad.stride(), *step.args,
            INDEXED=index is not None, ROWS=_BLOCK // width, WIDTH=width, **step.constants,
        )  # fmt: skip
