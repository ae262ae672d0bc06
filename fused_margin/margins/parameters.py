"""Parameters of the rows: one value for all, for each class or for each sample, and how a batch reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PerClass:
    """A row parameter given for each class: `values` [C]. Needed only where batch size and class count are equal."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class PerSample:
    """A row parameter given for each row of the batch: `values` [B]; see `PerClass`."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor in a record that is not read at the rows' labels."""

    values: Tensor


RowParameter = float | Tensor | PerClass | PerSample


def gather_rows(value: RowParameter, labels: Tensor, num_classes: int, dtype: torch.dtype, name: str) -> float | Tensor:
    """A row parameter as a float, a 0-dim tensor or a [B] tensor of `dtype`; per-class values at each row's label.

    Labels outside [0, num_classes) (ignored rows) read class 0; their loss is dropped later.
    """
    batch = labels.shape[0]
    if isinstance(value, PerClass):
        value, axis = value.values, "class"
    elif isinstance(value, PerSample):
        value, axis = value.values, "sample"
    elif not isinstance(value, Tensor):
        return value
    elif value.dim() == 0:
        return value.to(dtype)
    elif value.shape == (batch,) and batch == num_classes:
        raise ValueError(
            f"{name}: a tensor of {batch} values could be per class or per sample, as both counts are {batch}; "
            f"wrap it: fm.PerClass({name}) or fm.PerSample({name})"
        )
    else:
        axis = "sample" if value.shape == (batch,) else "class"
    expected = batch if axis == "sample" else num_classes
    if value.shape != (expected,):
        raise ValueError(
            f"{name}: got a tensor of shape {list(value.shape)}; expected a float, a 0-dim tensor, "
            f"[{num_classes}] values (one a class) or [{batch}] values (one a sample)"
        )
    value = value.to(dtype)  # a cosine of a 16-bit margin would be a 16-bit cosine
    if axis == "sample":
        return value
    inside = (labels >= 0) & (labels < num_classes)
    return value[torch.where(inside, labels, 0)] if num_classes else value.new_zeros(batch)
