"""Work on single rows of x, one program a row: before the sweep, after it, and around the backward.

prologue       x_hat in the operands' dtype, cos_y and the target, the row's constants
epilogue       the splits' sums and O merged in their order: red, aux, sum_u
backward_rows  the coefficients of G, x_hat times what G leaves out, the rows in the order of their targets
finish_x       dX = (h - (h . x_hat) x_hat) / |x|,  h = f O + g_cos_y w_hat_y
"""

import triton
import triton.language as tl

from .forward import NO_POWER, STATES
from .tile import EPS, HALF_UNIT, clamp, inverse_norm

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2147483647)  # sorts a row without target behind all classes


@triton.jit
def _target(label, first_class, classes, ignore_index):
    """The label as a class of this shard, or -1."""
    here = (label != ignore_index) & (label >= first_class) & (label < first_class + classes)
    return tl.where(here, label - first_class, -1).to(tl.int32)


@triton.jit
def _unit_row(x, row, live, D, x_row, x_col, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr):
    """x_hat [WIDTH], 1 / |x|, and whether the norm is a constant."""
    d = tl.arange(0, WIDTH)
    b_x = tl.load(x + row * x_row + d.to(tl.int64) * x_col, mask=d < tl.where(live, D, 0), other=0.0).to(tl.float32)
    if NORMALIZE:
        square = tl.sum(b_x * b_x, 0)
        inverse = inverse_norm(square)
        return b_x * inverse, inverse, tl.sqrt_rn(square) < EPS
    return b_x, tl.full((), 1.0, tl.float32), live | True


@triton.jit
def _closest_center(
    x_hat, y, w, index, D, w_row, w_col, CENTERS: tl.constexpr, INDEXED: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The target's cosine and its row among those read, the first of the class's maxima; 0 and -1 without a target."""
    d = tl.arange(0, WIDTH)
    best = tl.full((), 0.0, tl.float32)
    best_row = y * 0 - 1
    for center in range(0, CENTERS):
        b_row = tl.maximum(y, 0) * CENTERS + center
        source = b_row.to(tl.int64)
        if INDEXED:
            source = tl.load(index + source, mask=y >= 0, other=0)
        b_w = tl.load(w + source * w_row + d.to(tl.int64) * w_col, mask=d < tl.where(y >= 0, D, 0), other=0.0).to(
            tl.float32
        )
        c = tl.sum(x_hat * b_w, 0)
        if NORMALIZE:
            c *= inverse_norm(tl.sum(b_w * b_w, 0))
        better = (y >= 0) & ((best_row < 0) | (c > best))
        best = tl.where(better, c, best)
        best_row = tl.where(better, b_row, best_row)
    return best, best_row


@triton.jit
def prologue(
    x,
    w,
    index,
    labels,
    scale,
    tau,
    operand,
    target,
    constants,
    cos_y,
    batch,
    D,
    x_row,
    x_col,
    w_row,
    w_col,
    label_step,
    scale_step,
    tau_step,
    operand_row,
    classes,
    first_class,
    ignore_index,
    padded,
    HAS_TAU: tl.constexpr,
    INDEXED: tl.constexpr,
    CENTERS: tl.constexpr,
    NORMALIZE_X: tl.constexpr,
    NORMALIZE_W: tl.constexpr,
    TO_COSINE: tl.constexpr,
    TO_OPERAND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows beyond the batch, columns beyond D and ignored rows of `operand` [padded, operand_row] are zero."""
    row = tl.program_id(0).to(tl.int64)
    live = row < batch
    label = tl.load(labels + row * label_step, mask=live, other=ignore_index)
    y = _target(label, first_class, classes, ignore_index)
    x_hat, inverse, constant = _unit_row(x, row, live & (label != ignore_index), D, x_row, x_col, WIDTH, NORMALIZE_X)
    if TO_COSINE:
        c, y_row = _closest_center(x_hat, y, w, index, D, w_row, w_col, CENTERS, INDEXED, NORMALIZE_W, WIDTH)
        if NORMALIZE_X and NORMALIZE_W:
            c = clamp(c)
        tl.store(cos_y + row, c, mask=live)
    if TO_OPERAND:
        d = tl.arange(0, WIDTH)
        tl.store(operand + row * operand_row + d, x_hat.to(operand.dtype.element_ty), mask=d < operand_row)
        tl.store(target + row, y)
        s = tl.load(scale + row * scale_step, mask=live, other=1.0).to(tl.float32)
        hi = s * LOG2E
        tl.store(constants + row, hi)
        tl.store(constants + padded + row, _folded_rest(s, hi))
        if HAS_TAU:
            t = tl.load(tau + row * tau_step, mask=live, other=0.0).to(tl.float32)
            tl.store(constants + 2 * padded + row, t)
        else:
            tl.store(constants + 2 * padded + row, 0.0)
        tl.store(constants + 3 * padded + row, s)


@triton.jit
def _folded_rest(s, hi):
    """s log2(e) - hi: log2(e) in three parts, of which s times the first two is exact."""
    s_hi = (s.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)  # 12 significant bits
    s_lo = s - s_hi
    c_hi: tl.constexpr = 1.4423828125
    c_lo: tl.constexpr = 0.0003122283889634
    return ((s_hi * c_hi - hi) + s_lo * c_hi) + s * c_lo


@triton.jit
def epilogue(
    state,
    o,
    scale,
    red,
    aux,
    sum_u,
    o_red,
    batch,
    padded,
    D,
    scale_step,
    splits,
    SOFTPLUS: tl.constexpr,
    STATS: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    FLASH: tl.constexpr,
    HALF: tl.constexpr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MOST)
    there = split < splits
    at = state + split.to(tl.int64) * STATES * padded + row
    powers = tl.load(at, mask=there, other=NO_POWER)
    power = tl.max(powers, 0)
    factor = tl.exp2(powers - power)
    total = tl.sum(tl.load(at + padded, mask=there, other=0.0) * factor, 0)
    total += tl.sum(tl.load(at + 2 * padded, mask=there, other=0.0) * factor, 0)
    if SOFTPLUS:
        value, low = total, tl.full((), 0.0, tl.float32)
        whole = low + 1
    else:
        value, low = _logarithm(total, power)
        whole = tl.where(total == 0, 1.0, total)
    tl.store(red + row, value)
    tl.store(aux + 5 * batch + row, low)
    best = tl.full((MOST,), float("-inf"), tl.float32)
    count = tl.zeros((MOST,), tl.float32)
    masked = tl.zeros((MOST,), tl.float32)
    mean_v = tl.zeros((MOST,), tl.float32)
    sum_v = tl.zeros((MOST,), tl.float32)
    if STATS:
        best = tl.load(at + 3 * padded, mask=there, other=float("-inf"))
        count = tl.load(at + 4 * padded, mask=there, other=0.0)
        masked = tl.load(at + 5 * padded, mask=there, other=0.0)
    if MEAN:
        mean_v = tl.load(at + 6 * padded, mask=there, other=0.0)
    if SUM:
        sum_v = tl.load(at + 7 * padded, mask=there, other=0.0)
    tl.store(aux + row, tl.max(best, 0))
    tl.store(aux + batch + row, tl.sum(count, 0))
    tl.store(aux + 2 * batch + row, tl.sum(masked, 0))
    tl.store(aux + 3 * batch + row, tl.sum(mean_v * factor, 0) / whole)
    tl.store(aux + 4 * batch + row, tl.sum(sum_v, 0))
    if SUM:
        s = tl.load(scale + row * scale_step).to(tl.float32)
        sum_bias = tl.sum(tl.load(at + 8 * padded, mask=there, other=0.0), 0)
        tl.store(sum_u + row, s * tl.sum(sum_v, 0) + sum_bias)
    else:
        tl.store(sum_u + row, 0.0)
    if FLASH:
        d = tl.arange(0, WIDTH)
        h = tl.zeros((WIDTH,), tl.float32)
        for number in range(0, splits):
            b_power = tl.load(state + tl.cast(number, tl.int64) * STATES * padded + row)
            b_o = tl.load(o + (tl.cast(number, tl.int64) * padded + row) * D + d, mask=d < D, other=0.0)
            h += b_o * tl.exp2(b_power - power)
        if HALF:
            h *= 1 / HALF_UNIT
        tl.store(o_red + row * D + d, h / whole, mask=d < D)


@triton.jit
def _logarithm(total, power):
    """log(total * 2^power) in two parts; -inf and 0 where total is 0."""
    bits = tl.where(total > 0, total, 1.0).to(tl.int32, bitcast=True)
    shift = ((bits >> 23) & 0xFF) - 127
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    whole = tl.where(total > 0, power, 0.0) + shift.to(tl.float32)
    first = whole * 0.693359375  # ln 2 in two parts, of which the first is short
    rest = tl.log(fraction) - whole * 2.121944400546905e-4
    value = first + rest
    low = rest - (value - first)
    nan = total != total
    value = tl.where(total > 0, value, tl.where(nan, total, float("-inf")))
    return value, tl.where(total > 0, low, 0.0)


@triton.jit
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
):
    """G_ij = f_i (p_i A_ij + q_i) N'_ij with |p|, |q| <= 1; `operand` gets f_i x_hat_i.

    fp16: over the power of two next to the largest f of the batch, which a loss scale of 65536 would take out of range.
    """
    row = tl.program_id(0).to(tl.int64)
    live = row < batch
    label = tl.load(labels + row * label_step, mask=live, other=ignore_index)
    y = _target(label, first_class, classes, ignore_index)
    x_hat, inverse, constant = _unit_row(x, row, live & (label != ignore_index), D, x_row, x_col, WIDTH, NORMALIZE_X)
    c, y_row = _closest_center(x_hat, y, w, index, D, w_row, w_col, CENTERS, INDEXED, NORMALIZE_W, WIDTH)

    s = tl.load(scale + row * scale_step, mask=live, other=0.0).to(tl.float32)
    g = tl.load(g_red + row * g_red_step, mask=live, other=0.0).to(tl.float32)
    h = tl.load(g_sum + row * g_sum_step, mask=live, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.abs(g), tl.abs(h))
    over = tl.where(largest > 0, largest, 1.0)
    factor = s * largest
    rank = y * 0
    zero = tl.full((), 0.0, tl.float32)
    top = zero
    own = tl.where(y >= 0, y, NOWHERE)
    for first in range(0, batch, SCAN):
        k = first + tl.arange(0, SCAN)
        here = k < batch
        other = tl.load(labels + k.to(tl.int64) * label_step, mask=here, other=ignore_index)
        other = _target(other, first_class, classes, ignore_index)
        other = tl.where(other >= 0, other, NOWHERE)
        rank += tl.sum((here & ((other < own) | ((other == own) & (k < row)))).to(tl.int32), 0)
        if operand.dtype.element_ty == tl.float16:
            b_g = tl.load(g_red + k.to(tl.int64) * g_red_step, mask=here, other=0.0).to(tl.float32)
            b_h = tl.load(g_sum + k.to(tl.int64) * g_sum_step, mask=here, other=0.0).to(tl.float32)
            b_s = tl.load(scale + k.to(tl.int64) * scale_step, mask=here, other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.max(tl.maximum(tl.abs(b_g), tl.abs(b_h)) * tl.abs(b_s), 0))
    common = zero + 1
    if operand.dtype.element_ty == tl.float16:
        bits = tl.maximum(top, 7.888609052210118e-31).to(tl.int32, bitcast=True)
        common = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(order + rank, row.to(tl.int32), mask=live)
    tl.store(sorted_class + rank, own, mask=live)
    tl.store(unit, common, mask=row == 0)

    d = tl.arange(0, WIDTH)
    scaled = x_hat * (factor / common)
    tl.store(operand + row * operand_row + d, scaled.to(operand.dtype.element_ty), mask=d < operand_row)
    tl.store(inverse_x + row, inverse)
    tl.store(target_row + row, y_row)
    value = tl.load(red + row * red_step, mask=live, other=float("-inf"))
    low = tl.load(red_low + row * low_step, mask=live, other=0.0)
    power, rest = zero, zero
    if not SOFTPLUS:  # a row without rivals: 2^(e - power) must be 0
        power = tl.where(value == float("-inf"), 1e30, tl.floor(value * LOG2E + 0.5))
        rest = (value - power * 0.693359375) + (power * 2.121944400546905e-4 + low)
        rest = tl.where(value == float("-inf"), 0.0, rest * LOG2E)
    tl.store(coefficients + row, power)
    tl.store(coefficients + padded + row, rest)
    tl.store(coefficients + 2 * padded + row, g / over)
    tl.store(coefficients + 3 * padded + row, h / over)
    tl.store(coefficients + 4 * padded + row, factor)
    tl.store(coefficients + 5 * padded + row, largest)
    tl.store(coefficients + 6 * padded + row, s * g)
    if TO_SCALE:
        d_s = g * tl.load(aux + 3 * batch + row, mask=live, other=0.0)
        d_s += h * tl.load(aux + 4 * batch + row, mask=live, other=0.0)
        tl.store(d_scale + row, d_s.to(d_scale.dtype.element_ty), mask=live)


@triton.jit
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
    D,
    x_row,
    x_col,
    w_row,
    w_col,
    label_step,
    g_step,
    ignore_index,
    FLASH: tl.constexpr,
    HALF: tl.constexpr,
    INDEXED: tl.constexpr,
    NORMALIZE_X: tl.constexpr,
    NORMALIZE_W: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`o` [B, D]: in the flash form o_red, else sum_j G_ij w_hat_j without f_i; `factors` [B] is f, with its sign."""
    row = tl.program_id(0).to(tl.int64)
    ignored = tl.load(labels + row * label_step) == ignore_index
    x_hat, inverse, constant = _unit_row(x, row, ~ignored, D, x_row, x_col, WIDTH, NORMALIZE_X)
    d = tl.arange(0, WIDTH)
    h = tl.load(o + row * D + d, mask=d < D, other=0.0) * tl.load(factors + row)
    if HALF:
        h *= 1 / HALF_UNIT
    y_row = tl.load(target_row + row)
    source = tl.maximum(y_row, 0).to(tl.int64)
    if INDEXED:
        source = tl.load(index + source, mask=y_row >= 0, other=0)
    b_w = tl.load(w + source * w_row + d.to(tl.int64) * w_col, mask=d < tl.where(y_row >= 0, D, 0), other=0.0).to(
        tl.float32
    )
    if NORMALIZE_W:
        b_w *= inverse_norm(tl.sum(b_w * b_w, 0))
    h += tl.load(g_cos_y + row * g_step).to(tl.float32) * b_w
    along = tl.where(constant, 0.0, tl.sum(h * x_hat, 0))
    h = (h - along * x_hat) * inverse
    h = tl.where(ignored, 0.0, h)
    tl.store(d_x + row * D + d, h.to(d_x.dtype.element_ty), mask=d < D)
