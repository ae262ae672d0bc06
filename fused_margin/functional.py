"""The head as a function: checks the input once, builds T and tau, calls the sweep, reduces."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .backends import choose
from .margins import Margin, PerClass, PerSample, RowParameter, as_margin, gather_rows
from .rules import RULES
from .spec import EPS, Aux, Spec, Want, acc_dtype

_REDUCTIONS = ("mean", "sum", "none")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TOPK_CHUNK = 16_384  # classes whose cosines exist at one time in `topk`


class Stats(NamedTuple):
    """What one sweep knows beside the loss; no gradient."""

    target_cosine: Tensor  # [B]; 0 where the row is ignored
    best_rival_cosine: Tensor  # [B], with bias / scale where there is a bias; -inf where there is no rival
    lse: Tensor  # [B]: log-sum-exp of all logits, the target's with its margin
    correct: Tensor  # 0-dim int64: rows whose target has the largest logit, without margin; ignored rows do not count


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin | Callable[[Tensor], Tensor],
    *,
    scale: RowParameter | str = 64.0,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Softmax cross-entropy with a margin on the target, without a tensor of batch x classes.

    Equivalent to (for a margin without rival rule; T is `margin.target`)::

        cos = F.linear(F.normalize(embeddings), F.normalize(weight))
        cos_y = cos[range(B), labels]
        logits = scale * cos.index_put((range(B), labels), T(cos_y)) + bias
        loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)

    but for two cases where `F.cross_entropy` gives nan: the mean over no valid row (an empty batch, all rows ignored)
    is 0, with gradient 0.

    Args:
        embeddings: [B, D], float32, bfloat16, float16 or float64. Not normalised: that is part of the sweep.
        weight: [C, D], one row a class; keep it float32 in mixed precision. float64 goes with float64 only.
        labels: [B], int64 (or another integer type): class numbers, or `ignore_index`. On the CPU a label outside
            [0, C) is an error; on a GPU it is not looked at (that would wait for the device).
        margin: a margin of the library, or a function that maps the target cosines [B] to [B].
        scale: s, the inverse temperature: a positive number; a tensor [B] per sample, [C] per class or 0-dim, with
            gradient if it asks for one; or "norm", the norm of each embedding (A-Softmax).
        bias: [C], added to the logits (plain softmax).
        reduction: "mean" over the rows that are not ignored, "sum", or "none": [B], with 0 in ignored rows.
        normalize_embeddings, normalize_weight: False takes raw rows, so that "cosines" are products. With a margin
            of angles both must be True.
        compute_dtype: dtype of the operands of the matrix products; by default the autocast dtype, else the
            embeddings'. Sums, cosines, logits and the loss are float32 in any case (float64 for float64). The CPU
            backend computes float16 operands in float32.
        backend: "cpu", "reference", or None: the first one that can run this input.
        return_stats: also return `Stats`, from the same sweep.

    Returns:
        The loss, float32 (float64 for float64 embeddings): 0-dim, or [B] with reduction "none"; with `return_stats`
        the pair (loss, Stats).

    Raises:
        TypeError, ValueError: what was got, what is expected, what to do. RuntimeError: a label out of range.
    """
    margin = as_margin(margin)
    _check(embeddings, weight, labels, bias, reduction)
    if not (normalize_embeddings and normalize_weight) and not margin.additive:
        raise ValueError(
            f"{type(margin).__name__} is a margin on angles: it needs normalize_embeddings and normalize_weight; "
            "without them, NormFace (plain softmax) and CosFace are defined"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index = {ignore_index!r}; expected an integer, as -100")
    num_classes = weight.shape[0]
    labels = labels.long()
    scale = row_scale(scale, embeddings, labels, num_classes)
    rule = margin.rule()
    spec = Spec(
        rule=rule.name,
        unit_slope=margin.gradient == "detached",
        normalize_x=normalize_embeddings,
        normalize_w=normalize_weight,
        compute_dtype=_compute_dtype(compute_dtype, embeddings),
        num_classes=num_classes,
        ignore_index=ignore_index,
        want=_want(embeddings, scale, return_stats),
    )
    spec = spec._replace(backend=choose(backend, embeddings, weight, spec))

    acc = acc_dtype(embeddings)
    at_rows = margin.at(labels, num_classes, acc)
    tau = None
    if RULES[rule.name].needs_tau:
        with torch.no_grad():
            tau = at_rows.threshold(ops.target_cosine(embeddings, weight, labels, None, spec))
    rule_args = rule.tensor(embeddings)
    lse, cos_y, _, aux = ops.sweep(embeddings, weight, labels, scale, tau, bias, None, rule_args, spec)

    valid = labels != ignore_index
    own = 0.0 if bias is None else bias.to(acc)[torch.where(valid, labels, 0)]
    c = cos_y.clone() if return_stats else cos_y  # T may be a user's, and work in place
    z = scale * _checked_target(at_rows.transform(c), cos_y).to(acc) + own
    loss = torch.where(valid, -F.logsigmoid(z - lse), 0)
    if reduction == "mean":
        loss = loss.sum() / valid.sum().clamp_min(1)
    elif reduction == "sum":
        loss = loss.sum()
    if not return_stats:
        return loss
    with torch.no_grad():
        best = Aux(*aux).best
        correct = (valid & (cos_y + own / scale >= best)).sum()
        return loss, Stats(cos_y.detach(), best, torch.logaddexp(lse, z).detach(), correct)


def topk(
    embeddings: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The k classes with the largest cosines, in one sweep over the weights and without a tensor of B x C.

    Equivalent to: `torch.topk(F.linear(F.normalize(embeddings), F.normalize(weight), bias), k)`, with operands rounded
    to `compute_dtype`, and products in float32 (float64 for float64).
    Returns: cosines [B, k] in falling order, and class numbers [B, k] (int64). No gradient.
    """
    labels = torch.zeros(len(embeddings), dtype=torch.long, device=embeddings.device)
    _check(embeddings, weight, labels, bias, "none")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k = {k}; expected 1 <= k <= {weight.shape[0]}, the number of classes")
    dtype, acc = _compute_dtype(compute_dtype, embeddings), acc_dtype(embeddings)

    def operand(rows: Tensor, normalize: bool) -> Tensor:
        rows = F.normalize(rows.to(acc), dim=1, eps=EPS) if normalize else rows
        return rows.to(dtype).to(acc)

    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
        x_hat = operand(embeddings, normalize_embeddings)
        best, ids = x_hat.new_empty(len(x_hat), 0), labels.new_empty(len(x_hat), 0)
        for first in range(0, weight.shape[0], _TOPK_CHUNK):
            chunk = slice(first, first + _TOPK_CHUNK)
            b = None if bias is None else bias[chunk].to(acc)
            cos = F.linear(x_hat, operand(weight[chunk], normalize_weight), b)
            here, place = cos.topk(min(k, cos.shape[1]))
            best, ids = torch.cat([best, here], 1), torch.cat([ids, place + first], 1)
            best, place = best.topk(min(k, best.shape[1]))
            ids = ids.gather(1, place)
    return best, ids


def _check(embeddings: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, reduction: str) -> None:
    for name, t in (("embeddings", embeddings), ("weight", weight), ("labels", labels)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}; expected a tensor, as torch.as_tensor({name}) gives")
    for name, t, shape in (("embeddings", embeddings, "[B, D]"), ("weight", weight, "[C, D]")):
        if t.dtype not in _FLOATS:
            raise TypeError(
                f"{name} are {t.dtype}; expected float32, bfloat16, float16 or float64, as in {name}.float()"
            )
        if t.dim() != 2:
            raise ValueError(f"{name} have shape {list(t.shape)}; expected two dimensions, {shape}")
    if embeddings.shape[1] != weight.shape[1]:
        hint = "; weight seems to be [D, C]: pass weight.T" if embeddings.shape[1] == weight.shape[0] else ""
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and weight {list(weight.shape)} differ in their last dimension; "
            f"expected [B, D] and [C, D]{hint}"
        )
    if not weight.shape[0] or not weight.shape[1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected at least one class and one dimension")
    if (embeddings.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"embeddings are {embeddings.dtype} and weight is {weight.dtype}; float64 goes with float64 only: "
            "convert one of them"
        )
    if labels.dim() == 2 and labels.is_floating_point():
        raise TypeError(
            f"labels are a matrix {list(labels.shape)} of {labels.dtype}; expected class numbers [B]. For mixup, call "
            "the loss once for each of the two label vectors and add: lam * loss(e, a) + (1 - lam) * loss(e, b)"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}; expected integers, as in labels.long()")
    if labels.shape != embeddings.shape[:1]:
        hint = ""
        if labels.dim() == 2:
            hint = "; use labels.squeeze(1)" if labels.shape[1] == 1 else "; for one-hot rows use labels.argmax(1)"
        raise ValueError(f"labels have shape {list(labels.shape)}; expected [{embeddings.shape[0]}], one a row{hint}")
    for name, t in (("weight", weight), ("labels", labels), ("bias", bias)):
        if t is not None and t.device != embeddings.device:
            raise ValueError(
                f"{name} on {t.device}, embeddings on {embeddings.device}; expected one device: "
                f"use {name}.to(embeddings.device)"
            )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in _FLOATS):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; expected floats [{weight.shape[0]}], one a class")
    check_reduction(reduction)


def check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction = {reduction!r}; expected one of {', '.join(map(repr, _REDUCTIONS))}")


def check_scale(scale: RowParameter | str) -> None:
    """Raises for what can never be a scale; the values of tensors are not read."""
    if isinstance(scale, (Tensor, PerClass, PerSample)) or scale == "norm":
        return
    if isinstance(scale, bool) or not isinstance(scale, (Real, str)):
        raise TypeError(f"scale = {scale!r}; expected a positive number, a tensor, or 'norm'")
    if isinstance(scale, str) or not 0 < scale < math.inf:  # not isfinite: under torch.compile this may be a symbol
        raise ValueError(f"scale = {scale!r}; expected a positive finite number, a tensor, or 'norm'")


def row_scale(scale: RowParameter | str, embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """s as a tensor [B] of the accumulation dtype."""
    check_scale(scale)
    acc = acc_dtype(embeddings)
    if isinstance(scale, str):
        return torch.linalg.vector_norm(embeddings, dim=1, dtype=acc)
    if isinstance(scale, Real):
        return embeddings.new_full(embeddings.shape[:1], float(scale), dtype=acc)
    return gather_rows(scale, labels, num_classes, acc, "scale").expand(embeddings.shape[0])


def _compute_dtype(asked: torch.dtype | None, embeddings: Tensor) -> torch.dtype:
    device = embeddings.device.type
    if embeddings.dtype == torch.float64:
        if asked not in (None, torch.float64):
            raise ValueError(f"compute_dtype = {asked} with float64 embeddings; expected None or torch.float64")
        return torch.float64
    if asked is None:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeddings.dtype
    if asked not in _FLOATS[:1] + _FLOATS[2:]:
        raise ValueError(f"compute_dtype = {asked}; expected torch.float32, torch.bfloat16 or torch.float16")
    return asked


def _want(embeddings: Tensor, scale: Tensor, stats: bool) -> int:
    grad = torch.is_grad_enabled()
    wanted = {
        Want.STATS: stats,
        Want.DX: grad and embeddings.requires_grad,
        Want.DSCALE: grad and scale.requires_grad,
    }
    return sum(int(flag) for flag, asked in wanted.items() if asked)


def _checked_target(target: Tensor, cos_y: Tensor) -> Tensor:
    if not isinstance(target, Tensor) or target.shape != cos_y.shape:
        got = f"a tensor of shape {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"the margin's target() gave {got}; expected a tensor [{cos_y.shape[0]}], one value a row")
    return target
