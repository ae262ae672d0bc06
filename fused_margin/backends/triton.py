"""The Triton backend: NVIDIA and AMD GPUs; with TRITON_INTERPRET=1 also CPU tensors, for tests.

Triton is imported when a sweep first runs.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..deferred import calls_of
from ..kernels.configs import interpreted
from ..spec import Spec
from ..update_rules import State, Update
from . import gpu
from .reference import check_labels

MAX_DIM = 8192  # a row of w is finished in registers
_OLDEST = 8, 0  # compute capability; an older GPU has no product of bfloat16, and the kernels would spill


def why_not(x: Tensor | None, w: Tensor | None, spec: Spec) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed (pip install triton)")
    if x is None and not torch.cuda.is_available() and not interpreted():
        reasons.append("torch sees no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)")
    reasons += gpu.why_not_input(x, w, spec, lambda d: d.type == "cuda" or (d.type == "cpu" and interpreted()))
    if x is not None and x.is_cuda and not torch.version.hip:
        has = torch.cuda.get_device_capability(x.device)
        if has < _OLDEST:
            reasons.append(f"{x.device} has compute capability {has}; the kernels need {_OLDEST}")
    if x is not None and x.shape[1] > MAX_DIM:
        reasons.append(f"the dimension is {x.shape[1]}; the kernels take at most {MAX_DIM}")
    return reasons


def path() -> str:
    """The path in use, for people."""
    import triton

    where = "interpreter" if interpreted() else torch.cuda.get_device_name()
    return f"Triton {triton.__version__}, {where}"


def saves_o(x: Tensor, spec: Spec) -> bool:
    from ..kernels.launch import saves_o

    return saves_o(x, spec)


def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    from ..kernels import launch

    check_labels(labels, spec)
    return launch.target_cosine(x, w, labels, index, spec)


def sweep(x, w, labels, scale, tau, bias, index, rule_args, spec: Spec) -> tuple[Tensor, ...]:
    from ..kernels import launch

    check_labels(labels, spec)
    return launch.sweep(x, w, labels, scale, tau, bias, index, rule_args, spec)


def sweep_loss(x, w, labels, scale, rule_args, spec: Spec, forms, loss_reduction) -> tuple[Tensor, ...]:
    from ..kernels import launch

    check_labels(labels, spec)
    return launch.sweep_loss(x, w, labels, scale, rule_args, spec, forms, loss_reduction)


def sweep_backward(*args) -> tuple[Tensor, ...]:
    from ..kernels import gradients

    return gradients.sweep_backward(*args)


def update_rows(w: Tensor, state: State, index: Tensor | None, grad: Tensor, update: Update) -> None:
    from ..kernels import steps

    steps.update_rows(w, state, index, grad, update)


def sweep_step(w: Tensor, state: State, index: Tensor | None, lists, spec: Spec, update: Update) -> None:
    from ..kernels import gradients

    gradients.sweep_step(w, state, index, calls_of(lists), spec, update)
