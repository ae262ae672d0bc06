"""Labels of what is no operator: their checks, and the rows that are not ignored.

Apart from `inputs`, as margins use it, and `inputs` uses margins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.reference import check_labels as check_range
from .spec import Spec


def check_labels(labels: Tensor, rows: int) -> None:
    """Raises for what are no class numbers [B]; their range is the operator's to check."""
    if labels.dim() == 2 and labels.is_floating_point():
        raise TypeError(
            f"labels are a matrix {list(labels.shape)} of {labels.dtype}; expected class numbers [B]. For mixup, call "
            "the loss once for each of the two label vectors and add: lam * loss(e, a) + (1 - lam) * loss(e, b)"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}; expected integers, as in labels.long()")
    if labels.shape != (rows,):
        hint = ""
        if labels.dim() == 2:
            hint = "; use labels.squeeze(1)" if labels.shape[1] == 1 else "; for one-hot rows use labels.argmax(1)"
        raise ValueError(f"labels have shape {list(labels.shape)}; expected [{rows}], one a row{hint}")


def classes_of(labels: Tensor, rows: int, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The class of each row, 0 where it is ignored, and whether it is not, both [B]. Raises for bad labels."""
    check_labels(labels, rows)
    labels = labels.long()
    check_range(labels, Spec(num_classes=num_classes, ignore_index=ignore_index))
    valid = labels != ignore_index
    return torch.where(valid, labels, 0), valid
