"""What the GPU backends have in common: the inputs that their kernels take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec import Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tensors and operands, as csrc/cuda/problem.h numbers them
MAX_SUB_CENTERS = 16


def why_not_input(x: Tensor | None, w: Tensor | None, spec: Spec, at_home: Callable[[torch.device], bool]) -> list[str]:
    """Why kernels on devices that are `at_home` cannot take the input, in words."""
    reasons = []
    for name, t in (("embeddings", x), ("weight", w)):
        if t is None:
            continue
        if not at_home(t.device):
            reasons.append(f"{name} are on {t.device}, not on a GPU")
        if t.dtype not in DTYPES:
            reasons.append(f"{name} are {t.dtype}; the kernels take float32, bfloat16 and float16")
    if x is not None and spec.compute_dtype not in DTYPES:
        reasons.append(f"compute_dtype is {spec.compute_dtype}")
    if spec.sub_centers > MAX_SUB_CENTERS:
        reasons.append(f"sub_centers is {spec.sub_centers}; the kernels take at most {MAX_SUB_CENTERS}")
    return reasons
