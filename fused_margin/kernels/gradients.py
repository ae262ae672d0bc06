"""The backward: two launches on rows, then a chunk of classes at a time at most four, then dX.

An optimizer's step: the same for each call of the sweep, but that the end of the last call's dW updates the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..deferred import Call
from ..spec import Aux, Need, Spec
from ..update_rules import State, Update
from . import backward, row_gradients
from .configs import Tile
from .launch import Operands, prologue
from .plan import Inputs, Plan, ceil_div, multiply, on, plan, power_of_two, row_constants, run, step, sweep_constants
from .steps import Step, begin, no_step
from .tune import tuned

_SCAN = 1024  # rows whose targets are compared at a time
_FINISH, _FINISH_STEP = 8192, 4096  # numbers in a tile of finish_weights; of a step, which has more of them at once
_OF_WARP = 512  # of them
_COEFFICIENTS = 7
_CHUNK_ROWS = 4096, 131072  # of w in a chunk, at least and at most


class _RowGradients(NamedTuple):
    """What `backward_rows` leaves for the kernels after it."""

    operand: Tensor  # [padded, operand_row] f_i x_hat_i
    coefficients: Tensor  # [7, padded]
    unit: Tensor  # [1]
    inverse_x: Tensor  # [padded]
    target_row: Tensor  # [padded]
    order: Tensor  # [B] rows by the class of their targets
    sorted_class: Tensor  # [B]


class _Upstream(NamedTuple):
    """What came out of the forward, and the gradients that reach it."""

    g_red: Tensor
    g_cos_y: Tensor
    g_sum_u: Tensor
    red: Tensor
    aux: Tensor
    o_red: Tensor


def _rows(p: Plan, padded: int, given: Inputs, up: _Upstream, d_scale: Tensor, to_scale: bool) -> _RowGradients:
    x, w, labels = given[:3]
    i32 = torch.int32
    r = _RowGradients(
        given.new(padded, p.operand_row, dtype=p.operand), given.new(_COEFFICIENTS, padded), given.new(1),
        given.new(padded), given.new(padded, dtype=i32), given.new(p.batch, dtype=i32), given.new(p.batch, dtype=i32),
    )  # fmt: skip
    low = Aux(*up.aux).red_low
    run(
        row_gradients.backward_rows, ceil_div(padded, p.rows),
        x, w, given.index_pointer, labels, given.scale, up.g_red, up.g_sum_u, up.red, low, *r, up.aux, d_scale, p.batch,
        p.dim, *x.stride(), *w.stride(), step(labels), step(given.scale), step(up.g_red), step(up.g_sum_u),
        step(up.red), step(low), p.operand_row, p.classes, p.spec.first_class, p.spec.ignore_index, padded,
        SOFTPLUS=p.spec.reduction == "softplus", CENTERS=p.spec.sub_centers if p.classes else 0, TO_SCALE=to_scale,
        WIDTH=p.row_width, SCAN=min(max(_SCAN // p.rows, 16), power_of_two(p.batch, 16)), **row_constants(p, given),
    )  # fmt: skip
    return r


def sweep_backward(
    g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum, spec: Spec, need
) -> tuple[Tensor, ...]:
    given = Inputs(x, w, labels, scale, tau, bias, index, rule_args)
    up = _Upstream(g_red, g_cos_y, g_sum_u, red, aux, o_red)
    with on(x):
        return tuned("gradient", plan(given, spec), given, lambda p: _backward(p, given, up, need))


def _backward(p: Plan, given: Inputs, up: _Upstream, need: int) -> tuple[Tensor, ...]:
    x, w, labels = given[:3]
    padded, nothing, flash = p.padded(p.backward_tile), given.new(0), up.o_red.dim() == 2
    d_x = x.new_empty(x.shape) if need & Need.X else nothing
    d_w = w.new_empty(p.classes * p.spec.sub_centers, p.dim) if need & Need.W else nothing
    d_scale = given.scale.new_empty(p.batch) if need & Need.SCALE else nothing
    d_bias = given.bias.new_empty(p.classes) if need & Need.BIAS else nothing
    r = _rows(p, padded, given, up, d_scale, bool(need & Need.SCALE))
    o = given.new(*x.shape) if need & Need.X and not flash else None
    if o is not None and not p.classes:
        o.zero_()
    if p.classes and (need & (Need.W | Need.BIAS) or o is not None):
        results = _Results(d_w, d_bias, o, bool(need & Need.W), bool(need & Need.BIAS))
        _sweep_chunks([_Swept(p, given, up, r, prologue(p, padded, given, cosine=False)[1])], results)
    if need & Need.X:
        run(
            row_gradients.finish_x, ceil_div(p.batch, p.rows),
            x, w, given.index_pointer, labels, up.o_red if flash else o, r.coefficients[6 if flash else 4], up.g_cos_y,
            r.target_row, d_x, p.batch, p.dim, *x.stride(), *w.stride(), step(labels), step(up.g_cos_y),
            p.spec.ignore_index, HALF=p.half and not flash, WIDTH=p.width, **row_constants(p, given),
        )  # fmt: skip
    return d_x, d_w, d_scale, d_bias


def sweep_step(
    w: Tensor, state: State, index: Tensor | None, calls: Sequence[Call], spec: Spec, update: Update
) -> None:
    """A step on the rows `index` of w with the gradient of all calls. Tiles are not tuned: to time is to update."""
    with on(w):
        swept = []
        for c in calls:
            given = Inputs(c.x, w, c.labels, c.scale, c.tau, c.bias, index, c.rule_args)
            p, up = plan(given, spec), _Upstream(*c[:3], c.red, c.aux, given.new(0))
            padded = p.padded(p.backward_tile)
            r = _rows(p, padded, given, up, given.new(0), False)  # which reads targets' rows: before any is updated
            swept.append(_Swept(p, given, up, r, prologue(p, padded, given, cosine=False)[1]))
        if swept[0].plan.classes:
            nothing = swept[0].given.new(0)
            _sweep_chunks(swept, _Results(nothing, nothing, None, True, False, begin(w, state, index, update)))


class _Swept(NamedTuple):
    """One call of the sweep, ready for its chunks."""

    plan: Plan
    given: Inputs
    up: _Upstream
    rows: _RowGradients
    operands: Operands


class _Results(NamedTuple):
    """What the chunks are swept for."""

    d_w: Tensor
    d_bias: Tensor
    o: Tensor | None  # [B, D] sum_j G_ij w_hat_j
    to_w: bool
    to_bias: bool
    step: Step | None = None  # in the place of d_w


def _chunk_classes(p: Plan, tile: Tile, updates: bool) -> int:
    """So many that G stays in the L2 cache, and what a step reads again at once, the products; in whole tiles."""
    least, most = (max(rows // p.spec.sub_centers, 1) for rows in _CHUNK_ROWS)
    products = 4 * p.spec.sub_centers * p.dim if updates else 0
    fits = p.device.chunk_bytes // max(p.batch * p.spec.sub_centers * p.operand.itemsize, products, 1)
    classes = min(max(fits, least), most, p.classes)
    return ceil_div(classes, p.tile_classes(tile)) * p.tile_classes(tile)


class _Chunk(NamedTuple):
    first: int  # class
    classes: int
    most: int  # rows of w that a chunk can have


class _Buffers(NamedTuple):
    gradient: Tensor  # [B, rows of a chunk] G
    w_hat: Tensor  # [rows of a chunk, D] in the operands' dtype
    bias_parts: Tensor  # [blocks of rows of x, classes of a chunk]
    products: Tensor  # [rows of a chunk, D] float32, unless d_w can hold them
    total: Tensor  # the same, for the gradient of all calls but the last of a step


def _sweep_chunks(calls: list[_Swept], to: _Results) -> None:
    """G of a chunk of classes at a time, and the products with it; o is added up over the chunks in their order.

    Several calls only for a step: of each chunk their gradients are added up in their order, and used up by the last.
    """
    p = max((call.plan for call in calls), key=lambda p: p.batch)
    tile, centers, of_g, new = p.backward_tile, p.spec.sub_centers, to.to_w or to.o is not None, calls[0].given.new
    chunk = _chunk_classes(p, tile, to.step is not None)
    most = chunk * centers
    in_place = to.step is None and to.d_w.dtype == torch.float32
    buffers = _Buffers(
        new(p.batch, most if of_g else 0, dtype=p.operand),
        new(most if to.o is not None else 0, p.dim, dtype=p.operand),
        new(p.padded(tile) // tile.rows, chunk if to.to_bias else 0),
        new(0 if in_place or not to.to_w else most, p.dim),
        new(most if len(calls) > 1 else 0, p.dim),
    )
    for first in range(0, p.classes, chunk):
        part = _Chunk(first, min(chunk, p.classes - first), most)
        n, start = part.classes * centers, first * centers
        here = to.d_w[start : start + n] if to.step is None and to.to_w else buffers.total[:n]
        products = here if in_place else buffers.products[:n]
        for number, call in enumerate(calls):
            g = buffers.gradient[: call.plan.batch, :n]
            _gradient(call, tile, part, buffers, to)
            if to.to_w:
                multiply(g.t(), call.rows.operand[: call.plan.batch, : p.dim], products, add=False)
            if to.o is not None:
                multiply(g, buffers.w_hat[:n], to.o, add=first > 0)
            if to.to_w or to.to_bias:
                last = to.step is not None and call is calls[-1]
                _finish(call, part, buffers, products, here, to, number > 0, to.step if last else no_step(products))


def _gradient(call: _Swept, tile: Tile, part: _Chunk, b: _Buffers, to: _Results) -> None:
    p, given, operands = call.plan, call.given, call.operands
    padded = p.padded(tile)
    run(
        backward.gradient_kernel, ceil_div(part.classes, p.tile_classes(tile)) * (padded // tile.rows),
        operands.x_hat, given.w, given.index_pointer, given.or_any(given.bias), given.rule_args, operands.target,
        operands.constants, call.rows.coefficients, b.gradient, b.w_hat, b.bias_parts, p.batch, padded, p.dim,
        p.operand_row, p.classes, *given.w.stride(), step(given.bias), part.first // p.tile_classes(tile), part.most,
        TO_GRADIENT=to.to_w or to.o is not None, TO_W_HAT=to.o is not None, TO_BIAS=to.to_bias,
        **sweep_constants(p, tile, given),
    )  # fmt: skip


def _finish(
    call: _Swept, part: _Chunk, b: _Buffers, products: Tensor, d_w: Tensor, to: _Results, add: bool, tail: Step
) -> None:
    p, given, r = call.plan, call.given, call.rows
    slots = max(p.group, (_FINISH_STEP if tail.constants["OPTIMIZER"] else _FINISH) // p.width, 1)
    run(
        backward.finish_weights, ceil_div(part.classes, slots // p.group),
        products, given.x, given.w, given.index_pointer, r.inverse_x, r.order, r.sorted_class, r.target_row,
        call.up.g_cos_y, r.unit, b.bias_parts, d_w, to.d_bias, p.batch, p.dim, *given.x.stride(),
        part.first + part.classes, *given.w.stride(), step(call.up.g_cos_y), part.first, part.most,
        b.bias_parts.shape[0], *tail.args, HALF=p.half, INDEXED=given.index is not None, CENTERS=p.spec.sub_centers,
        GROUP=p.group, NORMALIZE=p.spec.normalize_w, TO_W=to.to_w, TO_BIAS=to.to_bias, ADD=add, SLOTS=slots,
        WIDTH=p.width, SCAN=min(_SCAN, power_of_two(p.batch, 16)), num_warps=min(slots * p.width // _OF_WARP, 16),
        **tail.constants,
    )  # fmt: skip
