"""From tensors to launches: buffers, strides, grids. No value of a tensor is read here and no shape depends on one, so
that nothing waits for the device.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import RULES
from ..spec import Aux, Need, Spec, Want
from . import backward, forward, rows
from .configs import Cut, Device, Tile, device_for

_SCAN = 1024  # rows whose targets are compared at a time
_ROWS, _ROW_ELEMENTS = 16, 2048  # of a program that works on single rows, at most
_FINISH = 8192  # elements of a tile of finish_weights
_COEFFICIENTS = 7
_CHUNK_CLASSES = 4096, 131072  # of a chunk, at least and at most
_MOST_SPLITS = 256


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def _step(t: Tensor | None) -> int:
    return 0 if t is None or not t.dim() else t.stride(0)


class _Plan(NamedTuple):
    """What the shapes, the spec and the architecture decide."""

    device: Device
    cut: Cut
    batch: int
    dim: int
    classes: int
    width: int  # dim, to a power of two
    operand: torch.dtype
    operand_row: int  # dim, to whole steps of depth
    group: int  # slots of a class

    @property
    def row_width(self) -> int:  # a power of two for a row with its padding
        return _power_of_two(self.operand_row, 16)

    @property
    def rows(self) -> int:  # of x, in a program that works on single rows
        return max(1, min(_ROWS, _ROW_ELEMENTS // self.row_width))

    @property
    def half(self) -> bool:
        return self.operand == torch.float16

    def padded(self, tile: Tile) -> int:
        return max(_up(self.batch, tile.rows), tile.rows)

    def tile_classes(self, tile: Tile) -> int:
        return tile.slots // self.group


def _plan(x: Tensor, w: Tensor, index: Tensor | None, spec: Spec) -> _Plan:
    device = device_for(x)
    operand = spec.compute_dtype
    cut = device.half if operand.itemsize == 2 else device.full
    batch, dim = x.shape
    classes = (w if index is None else index).shape[0] // spec.sub_centers
    return _Plan(
        device, cut, batch, dim, classes, _power_of_two(dim, 16), operand, _up(dim, cut.depth),
        _power_of_two(spec.sub_centers),
    )  # fmt: skip


def saves_o(x: Tensor, spec: Spec) -> bool:
    """Whether the forward finishes what the gradient of x needs (flash form), or the backward's chunks do."""
    device = device_for(x)
    cut = device.half if spec.compute_dtype.itemsize == 2 else device.full
    wanted = spec.want & Want.DX and not spec.want & Want.SUM
    return bool(wanted) and _power_of_two(x.shape[1], 16) <= cut.flash_width


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _run(kernel, programs: int, *args, **meta) -> None:
    """One launch; the grid is one axis, as the others end at 65,535.

    No contraction to fma: across a warp's shuffles each lane contracts its own product, and copies of one sum differ.
    """
    if programs:
        kernel[(programs,)](*args, enable_fp_fusion=False, **meta)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a b, summed and stored in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


class _Operands(NamedTuple):
    """Inputs as the sweeping kernels take them, and x_hat as they multiply it."""

    x_hat: Tensor  # [padded, operand_row] of the operands' dtype
    target: Tensor  # [padded] int32
    constants: Tensor  # [4, padded]: scale * log2(e) in two parts, tau, scale


def _prologue(p: _Plan, padded: int, x, w, labels, scale, tau, index, spec: Spec, to_cosine: bool, to_operand: bool):
    size = padded if to_operand else p.batch
    buffers = _Operands(
        x.new_empty(size if to_operand else 0, p.operand_row, dtype=p.operand),
        x.new_empty(size if to_operand else 0, dtype=torch.int32),
        x.new_empty(4, size if to_operand else 0, dtype=torch.float32),
    )
    cos_y = x.new_empty(p.batch if to_cosine else 0, dtype=torch.float32)
    _run(
        rows.prologue, -(-size // p.rows), x, w, index if index is not None else labels, labels, scale if scale is not None else x,
        tau if tau is not None else x, *buffers, cos_y,
        p.batch, p.dim, *x.stride(), *w.stride(), _step(labels), _step(scale), _step(tau), p.operand_row, p.classes,
        spec.first_class, spec.ignore_index, size,
        HAS_TAU=tau is not None, INDEXED=index is not None, CENTERS=spec.sub_centers, NORMALIZE_X=spec.normalize_x,
        NORMALIZE_W=spec.normalize_w, TO_COSINE=to_cosine and p.classes > 0, TO_OPERAND=to_operand, WIDTH=p.row_width, ROWS=p.rows,
    )  # fmt: skip
    if to_cosine and not p.classes:
        cos_y.zero_()
    return cos_y, buffers


def _sweep_meta(p: _Plan, tile: Tile, w: Tensor, bias, index, spec: Spec) -> dict:
    """Constants of both sweeping kernels."""
    wide = w.dtype.itemsize == 4
    return {
        "RULE": spec.rule,
        "ARGS": len(RULES[spec.rule].args),
        "SOFTPLUS": spec.reduction == "softplus",
        "UNIT_SLOPE": spec.unit_slope,
        "BIAS": bias is not None,
        "INDEXED": index is not None,
        "CENTERS": spec.sub_centers,
        "GROUP": p.group,
        "NORMALIZE": spec.normalize_w,
        "CLAMP": spec.normalize_x and spec.normalize_w,
        "ROWS": tile.rows,
        "SLOTS": tile.slots,
        "DEPTH": p.cut.depth,
        "WHOLE": p.dim % p.cut.depth == 0,
        "RANGE": p.half and (wide or w.dtype == torch.bfloat16),
        "PRECISION": p.device.precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    with _on(x):
        p = _plan(x, w, index, spec)
        return _prologue(p, 0, x, w, labels, None, None, index, spec, to_cosine=True, to_operand=False)[0]


def sweep(x, w, labels, scale, tau, bias, index, rule_args, spec: Spec) -> tuple[Tensor, ...]:
    with _on(x):
        p = _plan(x, w, index, spec)
        flash = saves_o(x, spec)
        tile = p.cut.flash if flash else p.cut.sweep
        padded = p.padded(tile)
        cos_y, operands = _prologue(p, padded, x, w, labels, scale, tau, index, spec, True, True)
        tiles = -(-p.classes // p.tile_classes(tile))
        splits = max(1, min(tiles, -(-p.device.programs * tile.rows // padded), _MOST_SPLITS))
        flags = {
            "STATS": bool(spec.want & Want.STATS),
            "MEAN": bool(spec.want & Want.DSCALE),
            "SUM": bool(spec.want & (Want.SUM | Want.DSCALE)),
            "FLASH": flash,
        }
        new = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
        state = new(splits, int(forward.STATES), padded)
        o = new(splits, padded, p.dim) if flash else state
        _run(
            forward.sweep_kernel, padded // tile.rows * splits,
            operands.x_hat, w, index if index is not None else labels, bias if bias is not None else x, rule_args,
            operands.target, operands.constants, state, o, padded, p.dim, p.operand_row, p.classes, *w.stride(),
            _step(bias), tiles, splits, MASKS=tau is not None, WIDTH=p.width, **flags,
            **_sweep_meta(p, tile, w, bias, index, spec),
        )  # fmt: skip
        red, sum_u, aux = new(p.batch), new(p.batch), new(len(Aux._fields), p.batch)
        o_red = new(p.batch, p.dim) if flash else new(0)
        _run(
            rows.epilogue, -(-p.batch // p.rows), state, o, scale, red, aux, sum_u, o_red, p.batch, padded, p.dim, _step(scale),
            splits, SOFTPLUS=spec.reduction == "softplus", HALF=p.half, SPLITS=_power_of_two(splits), WIDTH=p.width, ROWS=p.rows,
            **flags,
        )  # fmt: skip
        return red, cos_y, sum_u, aux, o_red, new(0)


class _RowGradients(NamedTuple):
    """What `backward_rows` leaves for the kernels after it."""

    operand: Tensor  # [padded, operand_row] f_i x_hat_i
    coefficients: Tensor  # [7, padded]
    unit: Tensor  # [1]
    inverse_x: Tensor  # [padded]
    target_row: Tensor  # [padded]
    order: Tensor  # [B] rows by the class of their targets
    sorted_class: Tensor  # [B]


def _backward_rows(p, padded, g_red, g_sum, x, w, labels, scale, index, red, aux, d_scale, spec: Spec, to_scale: bool):
    i32, f32 = ({"dtype": d, "device": x.device} for d in (torch.int32, torch.float32))
    r = _RowGradients(
        x.new_empty(padded, p.operand_row, dtype=p.operand), torch.empty(_COEFFICIENTS, padded, **f32),
        torch.empty(1, **f32), torch.empty(padded, **f32), torch.empty(padded, **i32), torch.empty(p.batch, **i32),
        torch.empty(p.batch, **i32),
    )  # fmt: skip
    low = Aux(*aux).red_low
    _run(
        rows.backward_rows, -(-padded // p.rows), x, w, index if index is not None else labels, labels, scale, g_red, g_sum, red, low,
        *r, aux, d_scale, p.batch, p.dim, *x.stride(), *w.stride(), _step(labels), _step(scale), _step(g_red),
        _step(g_sum), _step(red), _step(low), p.operand_row, p.classes, spec.first_class, spec.ignore_index, padded,
        SOFTPLUS=spec.reduction == "softplus", INDEXED=index is not None,
        CENTERS=spec.sub_centers if p.classes else 0, NORMALIZE_X=spec.normalize_x, NORMALIZE_W=spec.normalize_w,
        TO_SCALE=to_scale, WIDTH=p.row_width, ROWS=p.rows, SCAN=min(max(_SCAN // p.rows, 16), _power_of_two(p.batch, 16)),
    )  # fmt: skip
    return r


def _chunk_classes(p: _Plan, tile: Tile) -> int:
    least, most = _CHUNK_CLASSES
    fits = p.device.chunk_bytes // max(p.batch * p.operand.itemsize, 1)
    return min(_up(min(max(fits, least), most), p.tile_classes(tile)), _up(p.classes, p.tile_classes(tile)))


def sweep_backward(
    g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum, spec, need
) -> tuple[Tensor, ...]:
    with _on(x):
        p = _plan(x, w, index, spec)
        need = Need(need)
        tile = p.cut.gradient
        padded = p.padded(tile)
        nothing = x.new_empty(0, dtype=torch.float32)
        w_rows = p.classes * spec.sub_centers
        d_x = x.new_empty(x.shape) if need & Need.X else nothing
        d_w = w.new_empty(w_rows, p.dim) if need & Need.W else nothing
        d_scale = scale.new_empty(p.batch) if need & Need.SCALE else nothing
        d_bias = bias.new_empty(p.classes) if need & Need.BIAS else nothing
        flash = o_red.dim() == 2
        r = _backward_rows(
            p, padded, g_red, g_sum_u, x, w, labels, scale, index, red, aux, d_scale, spec, bool(need & Need.SCALE)
        )
        o = o_red if flash else nothing
        if need & Need.X and not flash:
            o = x.new_empty(x.shape, dtype=torch.float32)
            if not p.classes:
                o.zero_()
        swept_x = bool(need & Need.X) and not flash
        if need & (Need.W | Need.BIAS) or swept_x:
            inputs = x, w, labels, scale, tau, bias, index, rule_args
            _chunks(p, tile, padded, inputs, r, g_cos_y, (o if swept_x else None), d_w, d_bias, spec, need)
        if need & Need.X:
            _run(
                rows.finish_x, -(-p.batch // p.rows), x, w, index if index is not None else labels, labels, o,
                r.coefficients[6 if flash else 4], g_cos_y, r.target_row, d_x, p.batch, p.dim, *x.stride(), *w.stride(),
                _step(labels), _step(g_cos_y), spec.ignore_index, HALF=p.half and not flash,
                INDEXED=index is not None, NORMALIZE_X=spec.normalize_x, NORMALIZE_W=spec.normalize_w, WIDTH=p.width, ROWS=p.rows,
            )  # fmt: skip
        return d_x, d_w, d_scale, d_bias


def _chunks(p: _Plan, tile: Tile, padded: int, inputs, r: _RowGradients, g_cos_y, o, d_w, d_bias, spec: Spec, need):
    """G of a chunk of classes at a time, and the products with it; o (or None) is added up over the chunks."""
    x, w, labels, scale, tau, bias, index, rule_args = inputs
    chunk = _chunk_classes(p, tile)
    chunk_rows, blocks = chunk * spec.sub_centers, padded // tile.rows
    to_w, to_bias = bool(need & Need.W), bool(need & Need.BIAS)
    operands = _prologue(p, padded, x, w, labels, scale, tau, index, spec, to_cosine=False, to_operand=True)[1]
    gradient = x.new_empty(p.batch, chunk_rows if to_w or o is not None else 0, dtype=p.operand)
    w_hat = x.new_empty(chunk_rows if o is not None else 0, p.dim, dtype=p.operand)
    parts = x.new_empty(blocks, chunk if to_bias else 0, dtype=torch.float32)
    in_place = d_w.dtype == torch.float32
    products = x.new_empty(0 if in_place or not to_w else chunk_rows, p.dim, dtype=torch.float32)
    finish_slots = max(p.group, _FINISH // p.width)
    for first in range(0, p.classes, chunk):
        classes = min(chunk, p.classes - first)
        n, start = classes * spec.sub_centers, first * spec.sub_centers
        tiles = -(-classes // p.tile_classes(tile))
        _run(
            backward.gradient_kernel, tiles * blocks,
            operands.x_hat, w, index if index is not None else labels, bias if bias is not None else x, rule_args,
            operands.target, operands.constants, r.coefficients, gradient, w_hat, parts, p.batch, padded, p.dim,
            p.operand_row, p.classes, *w.stride(), _step(bias), first // p.tile_classes(tile), chunk_rows,
            TO_GRADIENT=to_w or o is not None, TO_W_HAT=o is not None, TO_BIAS=to_bias,
            **_sweep_meta(p, tile, w, bias, index, spec),
        )  # fmt: skip
        here = d_w[start : start + n] if to_w else d_w
        summed = here if in_place else products[:n]
        if to_w:
            _multiply(gradient[:, :n].t(), r.operand[: p.batch, : p.dim], summed, add=False)
        if o is not None:
            _multiply(gradient[:, :n], w_hat[:n], o, add=first > 0)
        if to_w or to_bias:
            _run(
                backward.finish_weights, -(-classes // (finish_slots // p.group)), summed, x, w,
                index if index is not None else labels, r.inverse_x, r.order, r.sorted_class, r.target_row, g_cos_y,
                r.unit, parts, here, d_bias, p.batch, p.dim, *x.stride(), first + classes, *w.stride(), _step(g_cos_y), first,
                chunk_rows, blocks, HALF=p.half, INDEXED=index is not None, CENTERS=spec.sub_centers, GROUP=p.group,
                NORMALIZE=spec.normalize_w, TO_W=to_w, TO_BIAS=to_bias, SLOTS=finish_slots, WIDTH=p.width,
                SCAN=min(_SCAN, _power_of_two(p.batch, 16)),
            )  # fmt: skip
