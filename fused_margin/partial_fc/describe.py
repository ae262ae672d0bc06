"""What ranks compare when they build a head: every option, in words and numbers that are equal where these are."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from ..margins import Margin, PerClass, PerSample


def of_value(value: object) -> object:
    """Numbers and names as they are; a tensor by dtype, shape and sum; margins and modules by what they hold."""
    if isinstance(value, (PerClass, PerSample)):
        return type(value).__name__, of_value(value.values)
    if isinstance(value, Tensor):
        total = None if value.is_meta else float(value.detach().double().sum())
        return str(value.dtype), tuple(value.shape), total
    if isinstance(value, nn.Module):  # parameters may be drawn; the ranks get those of the first one
        shapes = [(n, tuple(p.shape)) for n, p in value.named_parameters()]
        buffers = [(n, of_value(b)) for n, b in value.named_buffers()]
        return type(value).__name__, value.extra_repr(), shapes, buffers
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [(f.name, of_value(getattr(value, f.name, None))) for f in fields(value)]
    if isinstance(value, Margin):
        return type(value).__name__, [(n, of_value(t)) for n, t in value.tensors().items()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def described(head: nn.Module) -> dict[str, object]:
    """The options of a PartialFC by name."""
    names = (
        "embedding_size",
        "num_classes",
        "sample_rate",
        "sampling",
        "sparse_grad",
        "embedding_grad",
        "seed",
        "step",
    )
    found = {name: getattr(head, name) for name in (*names, "max_local_batch")}
    found |= {name: of_value(value) for name, value in head.options.items()}
    margin = head.margin_module if head._margin is None else head._margin
    found |= {"margin": of_value(margin), "scale": of_value(head.scale), "dtype": str(head.weight.dtype)}
    found |= {"bias": head.bias is not None, "class_weight": head.class_weight is not None}
    return found
