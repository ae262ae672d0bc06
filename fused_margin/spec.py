"""What a sweep is asked to do, apart from its tensors: one record, passed as it stands through every layer."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch


class Want(IntEnum):  # bits; no IntFlag, whose & runs Python code for 0.6 us, ten times a step
    """Outputs of a sweep beyond `red` and `cos_y`, each computed only on request."""

    NONE = 0
    DX = 1  # o_red (and o_sum): what the gradient of x needs, finished in the forward
    SUM = 2  # sum_u
    STATS = 4  # aux: best rival cosine, count and sum of masked cosines
    DSCALE = 8  # aux: the gradient of red with respect to the scale
    DW = 16  # kept: what may spare the gradient of w a part of its work


class Need(IntEnum):  # bits
    """Gradients asked of `sweep_backward`."""

    NONE = 0
    X = 1
    W = 2
    SCALE = 4
    BIAS = 8


class Aux(NamedTuple):
    """Rows of the sweep's `aux` [6, B]; no gradient."""

    best: torch.Tensor  # the largest rival cosine (+ bias / scale), -inf where there is no rival
    masked_count: torch.Tensor  # rivals with c > tau
    masked_sum: torch.Tensor  # the sum of their cosines
    mean_v: torch.Tensor  # sum_j A_ij N(c_ij), the derivative of red by the scale
    sum_v: torch.Tensor  # sum_j N(c_ij), the derivative of sum_u by the scale
    red_low: torch.Tensor  # what rounding took from red, for A = exp(u - red - red_low) in the backward


class Rows(NamedTuple):
    """Rows of `sweep_loss`'s `rows` [6, B]; no gradient. Slopes are those of the loss as it was reduced."""

    by_red: torch.Tensor
    by_cos_y: torch.Tensor
    by_scale: torch.Tensor  # by way of the target's logit
    red: torch.Tensor
    cos_y: torch.Tensor
    tau: torch.Tensor  # 0 for a rule that needs none


class Spec(NamedTuple):
    """The static part of a sweep; its fields stand in the operator's schema in this order."""

    rule: str = "identity"  # a name of rules.RULES
    unit_slope: bool = False  # take N' = 1 in the backward
    reduction: str = "logsumexp"  # or "softplus": red = sum_j log(1 + exp(u_j))
    sub_centers: int = 1  # consecutive rows of w that make one class, by their maximum
    normalize_x: bool = True
    normalize_w: bool = True
    compute_dtype: torch.dtype = torch.float32  # operands of the products; sums are float32 (float64 for float64)
    num_classes: int = 0  # labels must lie in [0, num_classes) or be ignore_index
    first_class: int = 0  # the class of row 0: a label outside [first_class, first_class + C) has no target here
    ignore_index: int = -100
    want: int = Want.NONE
    backend: str = "reference"


SPEC_SCHEMA = (
    "str rule, bool unit_slope, str reduction, int sub_centers, bool normalize_x, bool normalize_w, "
    "ScalarType compute_dtype, int num_classes, int first_class, int ignore_index, int want, str backend"
)
EPS = 1e-12  # norms are clamped from below, as in torch.nn.functional.normalize


def acc_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of cosines, sums and losses: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
