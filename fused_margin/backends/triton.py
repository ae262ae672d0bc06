"""The Triton backend: NVIDIA and AMD GPUs; with TRITON_INTERPRET=1 also CPU tensors, for tests.

Triton is imported when a sweep first runs.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..spec import Spec
from .reference import check_labels

MAX_DIM = 8192  # a row of w is finished in registers
MAX_SUB_CENTERS = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(x: Tensor | None, w: Tensor | None, spec: Spec) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed (pip install triton)")
    if x is None and not torch.cuda.is_available() and not _interpreted():
        reasons.append("torch sees no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)")
    for name, t in (("embeddings", x), ("weight", w)):
        if t is None:
            continue
        if t.device.type != "cuda" and not (t.device.type == "cpu" and _interpreted()):
            reasons.append(f"{name} are on {t.device}, not on a GPU")
        if t.dtype not in _DTYPES:
            reasons.append(f"{name} are {t.dtype}; the kernels take float32, bfloat16 and float16")
    if x is not None and x.shape[1] > MAX_DIM:
        reasons.append(f"the dimension is {x.shape[1]}; the kernels take at most {MAX_DIM}")
    if x is not None and spec.compute_dtype not in _DTYPES:
        reasons.append(f"compute_dtype is {spec.compute_dtype}")
    if spec.sub_centers > MAX_SUB_CENTERS:
        reasons.append(f"sub_centers is {spec.sub_centers}; the kernels take at most {MAX_SUB_CENTERS}")
    return reasons


def path() -> str:
    """The path in use, for people."""
    import triton

    where = "interpreter" if _interpreted() else torch.cuda.get_device_name()
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
    out = launch.sweep(x, w, labels, scale, tau, bias, index, rule_args, spec)
    return *out, out[0].new_empty(0)


def sweep_loss(x, w, labels, scale, rule_args, spec: Spec, forms, loss_reduction) -> tuple[Tensor, ...]:
    from ..kernels import launch

    check_labels(labels, spec)
    out = launch.sweep_loss(x, w, labels, scale, rule_args, spec, forms, loss_reduction)
    return *out, out[0].new_empty(0)


def sweep_backward(*args) -> tuple[Tensor, ...]:
    from ..kernels import gradients

    *given, _, spec, need = args  # products are made again: on a GPU that takes less time than to keep them
    return gradients.sweep_backward(*given, spec, need)
