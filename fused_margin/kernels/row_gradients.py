"""Work on rows of x, a few rows a program, around the sweep of the backward.

backward_rows  the coefficients of G, x_hat times what G leaves out, the rows in the order of their targets
finish_x       dX = (h - (h . x_hat) x_hat) / |x|,  h = f O + g_cos_y w_hat_y
"""

import triton
import triton.language as tl

from .rows import LOG2E, closest_centers, load_rows, source_row, targets, unit_rows
from .tile import HALF_UNIT, ROW_VECTORS, inverse_norm, power_of_two

NOWHERE = tl.constexpr(2147483647)  # sorts a row without target behind all classes


@triton.jit
def _order(labels, label_step, i, y, batch, first_class, classes, ignore_index, ROWS: tl.constexpr, SCAN: tl.constexpr):
    """Each row's place when rows are sorted by their target's class, and by number where it is the same."""
    own = tl.where(y >= 0, y, NOWHERE)
    rank = tl.zeros((ROWS,), tl.int32)
    for first in range(0, batch, SCAN):
        k = first + tl.arange(0, SCAN).to(tl.int64)
        other, _ = targets(labels, k, label_step, batch, first_class, classes, ignore_index)
        other = tl.where(other >= 0, other, NOWHERE)
        before = (other[None, :] < own[:, None]) | ((other[None, :] == own[:, None]) & (k[None, :] < i[:, None]))
        rank += tl.sum((before & (k < batch)[None, :]).to(tl.int32), 1)
    return own, rank


@triton.jit
def _largest_factor(scale, g_red, g_sum, scale_step, g_red_step, g_sum_step, batch, SCAN: tl.constexpr):
    """The power of two next below the largest f of the batch."""
    top = tl.zeros((SCAN,), tl.float32)
    for first in range(0, batch, SCAN):
        k = first + tl.arange(0, SCAN).to(tl.int64)
        g = tl.abs(tl.load(g_red + k * g_red_step, mask=k < batch, other=0.0).to(tl.float32))
        h = tl.abs(tl.load(g_sum + k * g_sum_step, mask=k < batch, other=0.0).to(tl.float32))
        s = tl.load(scale + k * scale_step, mask=k < batch, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.maximum(g, h) * tl.abs(s))
    return power_of_two(tl.max(top, 0))


@triton.jit(
    do_not_specialize=["batch", "classes", "first_class", "ignore_index"], do_not_specialize_on_alignment=ROW_VECTORS
)
def backward_rows(
    x,
    w,
    index,
    labels,
    scale,
    g_red,
    g_sum,
    red,
    red_low,
    operand,
    coefficients,
    unit,
    inverse_x,
    target_row,
    order,
    sorted_class,
    aux,
    d_scale,
    batch,
    D,
    x_row,
    x_col,
    w_row,
    w_col,
    label_step,
    scale_step,
    g_red_step,
    g_sum_step,
    red_step,
    low_step,
    operand_row,
    classes,
    first_class,
    ignore_index,
    padded,
    SOFTPLUS: tl.constexpr,
    INDEXED: tl.constexpr,
    CENTERS: tl.constexpr,
    NORMALIZE_X: tl.constexpr,
    NORMALIZE_W: tl.constexpr,
    TO_SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """G_ij = f_i (p_i A_ij + q_i) N'_ij with |p|, |q| <= 1; `operand` gets f_i x_hat_i.

    fp16: over a power of two near the largest f of the batch, which a loss scale of 65536 would take out of range.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live, inside = i < batch, i < padded
    y, counts = targets(labels, i, label_step, batch, first_class, classes, ignore_index)
    x_hat, inverse, _ = unit_rows(x, i, counts, D, x_row, x_col, WIDTH, NORMALIZE_X)
    _, y_row = closest_centers(x_hat, y, w, index, D, w_row, w_col, CENTERS, INDEXED, NORMALIZE_W, WIDTH)
    own, rank = _order(labels, label_step, i, y, batch, first_class, classes, ignore_index, ROWS, SCAN)
    tl.store(order + rank, i.to(tl.int32), mask=live)
    tl.store(sorted_class + rank, own, mask=live)
    tl.store(inverse_x + i, inverse, mask=inside)
    tl.store(target_row + i, y_row, mask=inside)

    s = tl.load(scale + i * scale_step, mask=live, other=0.0).to(tl.float32)
    g = tl.load(g_red + i * g_red_step, mask=live, other=0.0).to(tl.float32)
    h = tl.load(g_sum + i * g_sum_step, mask=live, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.abs(g), tl.abs(h))
    over = tl.where(largest > 0, largest, 1.0)
    common = 1.0
    if operand.dtype.element_ty == tl.float16:
        common = _largest_factor(scale, g_red, g_sum, scale_step, g_red_step, g_sum_step, batch, SCAN)
    tl.store(unit + i, tl.zeros((ROWS,), tl.float32) + common, mask=i == 0)
    d = tl.arange(0, WIDTH)
    scaled = x_hat * (s * largest / common)[:, None]
    at = operand + i[:, None] * operand_row + d[None, :]
    tl.store(at, scaled.to(operand.dtype.element_ty), mask=inside[:, None] & (d < operand_row)[None, :])

    power = tl.zeros((ROWS,), tl.float32)
    rest = power
    if not SOFTPLUS:  # a row without rivals: 2^(e - power) must be 0
        value = tl.load(red + i * red_step, mask=live, other=float("-inf"))
        none = value == float("-inf")
        value = tl.where(none, 0.0, value)
        power = tl.floor(value * LOG2E + 0.5)
        low = tl.load(red_low + i * low_step, mask=live, other=0.0)
        rest = ((value - power * 0.693359375) + (power * 2.121944400546905e-4 + low)) * LOG2E
        power = tl.where(none, 1e30, power)
    tl.store(coefficients + i, power, mask=inside)
    tl.store(coefficients + padded + i, rest, mask=inside)
    tl.store(coefficients + 2 * padded + i, g / over, mask=inside)
    tl.store(coefficients + 3 * padded + i, h / over, mask=inside)
    tl.store(coefficients + 4 * padded + i, s * largest, mask=inside)
    tl.store(coefficients + 5 * padded + i, largest, mask=inside)
    tl.store(coefficients + 6 * padded + i, s * g, mask=inside)
    if TO_SCALE:
        d_s = g * tl.load(aux + 3 * batch + i, mask=live, other=0.0)
        d_s += h * tl.load(aux + 4 * batch + i, mask=live, other=0.0)
        tl.store(d_scale + i, d_s.to(d_scale.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["batch", "ignore_index"], do_not_specialize_on_alignment=ROW_VECTORS)
def finish_x(
    x,
    w,
    index,
    labels,
    o,
    factors,
    g_cos_y,
    target_row,
    d_x,
    batch,
    D,
    x_row,
    x_col,
    w_row,
    w_col,
    label_step,
    g_step,
    ignore_index,
    HALF: tl.constexpr,
    INDEXED: tl.constexpr,
    NORMALIZE_X: tl.constexpr,
    NORMALIZE_W: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`o` [B, D]: in the flash form o_red, else sum_j G_ij w_hat_j without f_i; `factors` [B] is f, with its sign."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < batch
    counts = live & (tl.load(labels + i * label_step, mask=live, other=ignore_index) != ignore_index)
    x_hat, inverse, slope = unit_rows(x, i, counts, D, x_row, x_col, WIDTH, NORMALIZE_X)
    factor = tl.load(factors + i, mask=live, other=0.0)
    if HALF:
        factor *= 1 / HALF_UNIT
    h = load_rows(o, i, live, D, D, 1, WIDTH) * factor[:, None]
    y_row = tl.load(target_row + i, mask=live, other=-1)
    b_w = load_rows(w, source_row(y_row, index, INDEXED), y_row >= 0, D, w_row, w_col, WIDTH)
    g = tl.load(g_cos_y + i * g_step, mask=live, other=0.0).to(tl.float32)
    if NORMALIZE_W:
        g *= inverse_norm(tl.sum(b_w * b_w, 1))
    h += g[:, None] * b_w
    along = tl.where(slope, tl.sum(h * x_hat, 1), 0.0)  # a norm that is clamped is a constant
    h = (h - along[:, None] * x_hat) * inverse[:, None]
    h = tl.where(counts[:, None], h, 0.0)
    d = tl.arange(0, WIDTH)
    tl.store(d_x + i[:, None] * D + d[None, :], h.to(d_x.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
