"""Checks of what a call or a head is given: an error says what was got, what is expected, what to do."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .labels import check_labels
from .margins import CosFace, Margin, PerClass, PerSample, RowParameter
from .margins.checks import count, flag, parameter, tensor
from .scales import ScaleRule
from .shard import ALL_CLASSES, Shard

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_options(ignore_index: int, normalize_x: bool, normalize_w: bool) -> None:
    """Raises for what these can never be, whatever the tensors."""
    whole = isinstance(ignore_index, int) and not isinstance(ignore_index, bool)
    if not whole or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"ignore_index = {ignore_index!r}; expected an integer of 64 bits, as -100")
    flag("normalize_embeddings", normalize_x)
    flag("normalize_weight", normalize_w)


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"compute_dtype = {dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16")


def check_fit(margin: Margin, normalize_x: bool, normalize_w: bool, bias: Tensor | None, sub_centers: int) -> None:
    """Raises where a margin has no meaning for the products, or brings what was given."""
    name = type(margin).__name__
    if not (normalize_x and normalize_w) and not margin.additive:
        raise ValueError(
            f"{name} is a margin on angles: it needs normalize_embeddings and normalize_weight; "
            "without them, NormFace (plain softmax) and CosFace are defined"
        )
    if margin.products and (normalize_x or normalize_w or sub_centers > 1):
        raise ValueError(
            f"{name} works on products of raw rows: pass normalize_embeddings=False, normalize_weight=False, scale=1, "
            "sub_centers=1"
        )
    if isinstance(margin, CosFace) and normalize_x and normalize_w:
        parameter("m", margin.m, -2, 2, "two cosines differ by 2 at most")
    if bias is not None and (margin.reduction != "logsumexp" or margin.bias() is not None):
        raise ValueError(f"{name} has a bias of its own; expected bias=None")


def check_tensors(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    sub_centers: int = 1,
    shard: Shard = ALL_CLASSES,
) -> None:
    """Raises for what is no input of a sweep. labels: None for a call that takes none."""
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: got {type(bias).__name__}; expected a tensor or None")
    for name, t, shape in (("embeddings", embeddings, "[B, D]"), ("weight", weight, "[C, D]")):
        tensor(name, t)
        if t.is_nested or t.layout != torch.strided:
            kind = "nested" if t.is_nested else str(t.layout)
            raise TypeError(f"{name} are a {kind} tensor; expected a dense one, as {name}.to_dense() gives")
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{name} are {t.dtype}; expected float32, bfloat16, float16 or float64, as in {name}.float()"
            )
        if t.dim() != 2:
            raise ValueError(f"{name} have shape {list(t.shape)}; expected two dimensions, {shape}")
    if embeddings.shape[1] != weight.shape[1]:
        hint = ""
        if embeddings.shape[1] == weight.shape[0]:
            hint = "; weight seems to be [D, C]: pass weight.T, or to a head first embedding_size, then num_classes"
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and weight {list(weight.shape)} differ in their last dimension; "
            f"expected [B, D] and [C, D]{hint}"
        )
    if not (weight.shape[0] or shard.may_be_empty) or not weight.shape[1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected at least one class and one dimension")
    if (embeddings.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"embeddings are {embeddings.dtype} and weight is {weight.dtype}; float64 goes with float64 only: "
            "convert one of them"
        )
    if labels is not None:
        tensor("labels", labels)
        check_labels(labels, embeddings.shape[0])
    for name, t in (("weight", weight), ("labels", labels), ("bias", bias)):
        if t is not None and t.device != embeddings.device:
            raise ValueError(
                f"{name} on {t.device}, embeddings on {embeddings.device}; expected one device: "
                f"use {name}.to(embeddings.device)"
            )
    if isinstance(sub_centers, bool) or not isinstance(sub_centers, int) or sub_centers < 1:
        raise ValueError(f"sub_centers = {sub_centers!r}; expected a positive integer")
    classes, rest = divmod(weight.shape[0], sub_centers)
    if rest:
        raise ValueError(f"weight has {weight.shape[0]} rows, no multiple of sub_centers = {sub_centers}")
    if bias is not None and (bias.shape != (classes,) or bias.dtype not in FLOATS):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; expected floats [{classes}], one a class")


def checked_k(k: int, classes: int) -> int:
    """Of the k nearest classes, as an int."""
    k = count("k", k)
    if k > classes:
        raise ValueError(f"k = {k}; expected 1 <= k <= {classes}, the number of classes")
    return k


def check_weights(name: str, weights: Tensor | None, count: int, of: str) -> None:
    """Raises for what are no weights of the rows or of the classes."""
    if weights is None:
        return
    tensor(name, weights)
    if weights.is_complex():
        raise TypeError(f"{name} are {weights.dtype}; expected real numbers")
    if weights.shape != (count,):
        raise ValueError(f"{name}: got a tensor of shape {list(weights.shape)}; expected [{count}], one a {of}")


def check_scale(scale: RowParameter | str | ScaleRule | None) -> None:
    """Raises for what can never be a scale; the values of tensors are not read."""
    if scale is None or isinstance(scale, (Tensor, PerClass, PerSample, ScaleRule)):
        return
    if isinstance(scale, type) and issubclass(scale, ScaleRule):
        raise TypeError(f"scale is the class {scale.__name__}; pass an instance, as in {scale.__name__}(num_classes)")
    if isinstance(scale, bool) or not isinstance(scale, (Real, str)):
        raise TypeError(
            f"scale = {scale!r}; expected a positive number, a tensor, 'norm', or None for the margin's own"
        )
    if scale != "norm" and (isinstance(scale, str) or not 0 < scale < math.inf):  # torch.compile may have a symbol here
        raise ValueError(f"scale = {scale!r}; expected a positive finite number, a tensor, or 'norm'")


def scale_of(
    scale: RowParameter | str | ScaleRule | None, margin: Margin, normalize_x: bool, normalize_w: bool
) -> RowParameter | str | ScaleRule:
    """The scale as given, or the margin's own: 1 for products that are no cosines. Raises where the two do not fit."""
    check_scale(scale)
    if scale is None:
        scale = margin.default_scale if normalize_x and normalize_w else 1.0
    name, by_norm = type(margin).__name__, isinstance(scale, str)
    if isinstance(scale, ScaleRule) and "cos_y" in scale.needs and not (normalize_x and normalize_w):
        raise ValueError(
            f"scale = {type(scale).__name__} takes the angles of the targets, and without normalize_embeddings and "
            "normalize_weight products are no cosines; expected both, or a number"
        )
    if margin.products and (by_norm or (isinstance(scale, Real) and scale != 1)):
        raise ValueError(f"scale = {scale!r} with {name}, which works on raw products; expected scale=1 or None")
    if by_norm and not normalize_x:
        raise ValueError(
            "scale = 'norm' with normalize_embeddings=False: the products have the norm of x in them already; "
            "expected normalize_embeddings=True, or scale=1"
        )
    if margin.norm_as_scale is True and not by_norm:
        raise ValueError(f"scale = {scale!r} with {name}, whose scale is the norm of x; expected scale='norm' or None")
    if margin.norm_as_scale is False and by_norm:
        raise ValueError(f"scale = 'norm' with {name}, whose scale is fixed; expected a number or norm='none'")
    return scale


def checked_target(target: Tensor, cos_y: Tensor) -> Tensor:
    if not isinstance(target, Tensor) or target.shape != cos_y.shape:
        got = f"a tensor of shape {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"the margin's target() gave {got}; expected a tensor [{cos_y.shape[0]}], one value a row")
    return target
