"""The forward: three launches (rows, sweep, merge), and a fourth for the losses of a built-in margin."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..margins.angular import TAILS
from ..margins.forms import KINDS
from ..spec import Aux, Rows, Spec, Want
from . import forward, margins, rows
from .plan import (
    Inputs,
    Plan,
    ceil_div,
    on,
    plan,
    power_of_two,
    row_constants,
    run,
    splits_of,
    step,
    sweep_constants,
)
from .tune import tuned

_PARTIAL_SUMS = 4096  # of a kind in a program of the epilogue, at most
_LOSS_ROWS = 1024
_NO_FORM = ((0.0,) * 6, "", "")


def saves_o(x: Tensor, spec: Spec) -> bool:
    """Whether the forward finishes what the gradient of x needs (flash form), or the backward's chunks do."""
    return plan(Inputs(x, x, x), spec).flash


class Operands(NamedTuple):
    """What the sweeping kernels read of x."""

    x_hat: Tensor  # [padded, operand_row] of the operands' dtype
    target: Tensor  # [padded] int32
    constants: Tensor  # [4, padded]: scale * log2(e) in two parts, tau, scale


def prologue(p: Plan, padded: int, given: Inputs, threshold=_NO_FORM, cosine: bool = True) -> tuple[Tensor, Operands]:
    """The targets' cosines, and for `padded` > 0 what the sweep needs; `threshold`: tau is this form of the cosine."""
    x, w = given.x, given.w
    operands = Operands(
        given.new(padded, p.operand_row, dtype=p.operand),
        given.new(padded, dtype=torch.int32),
        given.new(4, padded),
    )
    cos_y = given.new(p.batch if cosine else 0)
    numbers, kind, tail = threshold
    run(
        rows.prologue, ceil_div(padded or p.batch, p.rows),
        x, w, given.index_pointer, given.labels, given.or_any(given.scale), given.or_any(given.tau), *operands, cos_y,
        p.batch, p.dim, *x.stride(), *w.stride(), step(given.labels), step(given.scale), step(given.tau), p.operand_row,
        p.classes, p.spec.first_class, p.spec.ignore_index, padded, *numbers, KIND=kind, TAIL=tail,
        HAS_TAU=given.tau is not None, CENTERS=p.spec.sub_centers if p.classes else 0, TO_COSINE=cosine,
        TO_OPERAND=padded > 0, WIDTH=p.row_width, **row_constants(p, given),
    )  # fmt: skip
    return cos_y, operands


def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    with on(x):
        given = Inputs(x, w, labels, index=index)
        return prologue(plan(given, spec), 0, given)[0]


class _Swept(NamedTuple):
    red: Tensor
    cos_y: Tensor
    sum_u: Tensor
    aux: Tensor
    o_red: Tensor
    tau: Tensor


def _sweep(p: Plan, given: Inputs, threshold=_NO_FORM) -> _Swept:
    return tuned("flash" if p.flash else "sweep", p, given, lambda chosen: _sweep_as_planned(chosen, given, threshold))


def _sweep_as_planned(p: Plan, given: Inputs, threshold) -> _Swept:
    tile = p.forward_tile
    padded = p.padded(tile)
    cos_y, operands = prologue(p, padded, given, threshold)
    tiles = ceil_div(p.classes, p.tile_classes(tile))
    blocks = padded // tile.rows
    splits = splits_of(tiles, blocks, p.device.programs, p.flash)
    want = p.spec.want
    flags = {
        "STATS": bool(want & Want.STATS),
        "MEAN": bool(want & Want.DSCALE),
        "SUM": bool(want & (Want.SUM | Want.DSCALE)),
        "FLASH": p.flash,
        "WIDTH": p.width,
    }
    state = given.new(splits, int(forward.STATES), padded)
    o = given.new(splits, padded, p.dim) if p.flash else state
    masks = given.tau is not None or threshold is not _NO_FORM
    run(
        forward.sweep_kernel, blocks * splits,
        operands.x_hat, given.w, given.index_pointer, given.or_any(given.bias), given.rule_args, operands.target,
        operands.constants, state, o, padded, p.dim, p.operand_row, p.classes, *given.w.stride(), step(given.bias),
        tiles, splits, MASKS=masks, **flags, **sweep_constants(p, tile, given),
    )  # fmt: skip
    red, sum_u, aux = given.new(p.batch), given.new(p.batch), given.new(len(Aux._fields), p.batch)
    o_red = given.new(p.batch, p.dim) if p.flash else given.new(0)
    merged = min(p.rows, _PARTIAL_SUMS // power_of_two(splits))
    run(
        rows.epilogue, ceil_div(p.batch, merged),
        state, o, given.scale, red, aux, sum_u, o_red, p.batch, padded, p.dim, step(given.scale), splits,
        SOFTPLUS=p.spec.reduction == "softplus", HALF=p.half, SPLITS=power_of_two(splits), ROWS=merged, **flags,
    )  # fmt: skip
    return _Swept(red, cos_y, sum_u, aux, o_red, operands.constants[2])


def sweep(x, w, labels, scale, tau, bias, index, rule_args, spec: Spec) -> tuple[Tensor, ...]:
    with on(x):
        given = Inputs(x, w, labels, scale, tau, bias, index, rule_args)
        found = _sweep(plan(given, spec), given)
        return *found[:5], given.new(0)


def sweep_loss(x, w, labels, scale, rule_args, spec: Spec, forms: list[float], loss_reduction: str):
    with on(x):
        given = Inputs(x, w, labels, scale, rule_args=rule_args)
        p = plan(given, spec)
        found = _sweep(p, given, _form(forms[5:]) if len(forms) > 5 else _NO_FORM)
        of_rows = loss_reduction == "none"
        loss = given.new(p.batch) if of_rows else given.new()
        out = given.new(len(Rows._fields), p.batch)
        numbers, kind, tail = _form(forms[:5])
        run(
            margins.row_loss, ceil_div(p.batch, _LOSS_ROWS) if of_rows else 1,
            labels, scale, found.cos_y, found.red, Aux(*found.aux).red_low, found.tau, loss, out, p.batch, step(labels),
            step(scale), spec.ignore_index, *numbers, KIND=kind, TAIL=tail, UNIT_SLOPE=spec.unit_slope,
            REDUCTION=loss_reduction, ROWS=min(_LOSS_ROWS, power_of_two(p.batch, 16)),
        )  # fmt: skip
        return loss, out, found.aux, found.o_red


def _form(packed: list[float]) -> tuple[tuple[float, ...], str, str]:
    """Of a packed form: m1, m2, m3 and what follows from them; its kind and tail as `margins.transform` has them."""
    kind, tail, (m1, m2, m3) = KINDS[int(packed[0])], TAILS[int(packed[1])], packed[2:]
    if kind == "multiple":
        return (
            (m1, m2, m3, 0.0, 0.0, 0.0),
            "whole multiple" if m1 in range(1, int(margins.LARGEST_POLYNOMIAL) + 1) else kind,
            "",
        )
    if kind == "cosine":
        return (m1, m2, m3, 0.0, 0.0, 0.0), kind, ""
    past = math.cos((math.pi - m2) / m1) + 1 if tail == "continuous" else m2 * math.sin(m2)
    return (m1, m2, m3, math.cos(m2), math.sin(m2), past), "turned" if m1 == 1 else kind, tail
