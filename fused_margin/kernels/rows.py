"""Work on rows of x, a few rows a program, before the sweep and after it.

prologue  x_hat in the operands' dtype, cos_y and the target, the row's constants
epilogue  the splits' sums and O merged in their order: red, aux, sum_u
"""

import triton
import triton.language as tl

from .forward import NO_POWER, STATES
from .margins import transform
from .tile import EPS, HALF_UNIT, ROW_VECTORS, clamp, inverse_norm

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def targets(labels, i, label_step, batch, first_class, classes, ignore_index):
    """The labels as classes of this shard, or -1 [i]; and whether the row takes part."""
    label = tl.load(labels + i * label_step, mask=i < batch, other=ignore_index)
    counts = label != ignore_index
    here = counts & (label >= first_class) & (label < first_class + classes)
    return tl.where(here, label - first_class, -1).to(tl.int32), counts & (i < batch)


@triton.jit
def load_rows(t, row, valid, D, row_step, col_step, WIDTH: tl.constexpr):
    """Rows of a matrix in float32 [row, WIDTH], zero where they are not valid and beyond D."""
    d = tl.arange(0, WIDTH)
    at = t + row.to(tl.int64)[:, None] * row_step + d.to(tl.int64)[None, :] * col_step
    return tl.load(at, mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def unit_rows(x, i, valid, D, x_row, x_col, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr):
    """x_hat [i, WIDTH], 1 / |x|, and whether the norm has a slope."""
    b_x = load_rows(x, i, valid, D, x_row, x_col, WIDTH)
    if NORMALIZE:
        square = tl.sum(b_x * b_x, 1)
        inverse = inverse_norm(square)
        return b_x * inverse[:, None], inverse, tl.sqrt_rn(square) >= EPS
    return b_x, tl.full(i.shape, 1.0, tl.float32), i < 0


@triton.jit
def source_row(row, index, INDEXED: tl.constexpr):
    """Where in w a row lies of those that are read; of -1, some row."""
    source = tl.maximum(row, 0).to(tl.int64)
    if INDEXED:
        source = tl.load(index + source, mask=row >= 0, other=0).to(tl.int64)
    return source


@triton.jit
def closest_centers(
    x_hat, y, w, index, D, w_row, w_col, CENTERS: tl.constexpr, INDEXED: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Cosines of the targets, their rows, the first of the maxima (a NaN is one) of a class; 0 and -1 without one."""
    best = tl.zeros(y.shape, tl.float32)
    best_row = tl.full(y.shape, -1, tl.int32)
    for center in range(CENTERS):
        row = tl.where(y >= 0, y * CENTERS + center, -1)
        b_w = load_rows(w, source_row(row, index, INDEXED), row >= 0, D, w_row, w_col, WIDTH)
        c = tl.sum(x_hat * b_w, 1)
        if NORMALIZE:
            c *= inverse_norm(tl.sum(b_w * b_w, 1))
        better = (row >= 0) & ((best_row < 0) | (c > best) | ((c != c) & (best == best)))
        best = tl.where(better, c, best)
        best_row = tl.where(better, row, best_row)
    return best, best_row


@triton.jit
def _folded_rest(s, hi):
    """s log2(e) - hi: log2(e) is cut in two, and so is s, so that all products but the last are exact."""
    s_hi = (s.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)  # 12 significant bits
    c_hi: tl.constexpr = 1.4423828125  # 11 significant bits
    c_lo: tl.constexpr = 0.000312228388963387
    return ((s_hi * c_hi - hi) + (s - s_hi) * c_hi) + s * c_lo


@triton.jit(
    do_not_specialize=["batch", "classes", "first_class", "ignore_index"], do_not_specialize_on_alignment=ROW_VECTORS
)
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
    m1,
    m2,
    m3,
    cos_m2,
    sin_m2,
    past,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_TAU: tl.constexpr,
    INDEXED: tl.constexpr,
    CENTERS: tl.constexpr,
    NORMALIZE_X: tl.constexpr,
    NORMALIZE_W: tl.constexpr,
    TO_COSINE: tl.constexpr,
    TO_OPERAND: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows beyond the batch, columns beyond D and ignored rows of `operand` [padded, operand_row] are zero."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y, counts = targets(labels, i, label_step, batch, first_class, classes, ignore_index)
    x_hat, _, _ = unit_rows(x, i, counts, D, x_row, x_col, WIDTH, NORMALIZE_X)
    threshold = tl.zeros((ROWS,), tl.float32)
    if TO_COSINE:
        c, _ = closest_centers(x_hat, y, w, index, D, w_row, w_col, CENTERS, INDEXED, NORMALIZE_W, WIDTH)
        if NORMALIZE_X and NORMALIZE_W:
            c = clamp(c)
        tl.store(cos_y + i, c, mask=i < batch)
        if KIND != "":  # tau is a transform of the target's cosine
            threshold, _ = transform(c, m1, m2, m3, cos_m2, sin_m2, past, KIND, TAIL)
    if TO_OPERAND:
        d = tl.arange(0, WIDTH)
        inside = i < padded
        at = operand + i[:, None] * operand_row + d[None, :]
        tl.store(at, x_hat.to(operand.dtype.element_ty), mask=inside[:, None] & (d < operand_row)[None, :])
        tl.store(target + i, y, mask=inside)
        s = tl.load(scale + i * scale_step, mask=i < batch, other=1.0).to(tl.float32)
        hi = s * LOG2E
        tl.store(constants + i, hi, mask=inside)
        tl.store(constants + padded + i, _folded_rest(s, hi), mask=inside)
        if HAS_TAU:
            threshold = tl.load(tau + i * tau_step, mask=i < batch, other=0.0).to(tl.float32)
        tl.store(constants + 2 * padded + i, threshold, mask=inside)
        tl.store(constants + 3 * padded + i, s, mask=inside)


@triton.jit
def _partial(state, number, i, padded, split, splits, batch, other):
    """One of a row's sums, of every split [i, split]."""
    at = state + (split.to(tl.int64) * STATES + number)[None, :] * padded + i[:, None]
    return tl.load(at, mask=(i < batch)[:, None] & (split < splits)[None, :], other=other)


@triton.jit(do_not_specialize=["batch", "splits"], do_not_specialize_on_alignment=ROW_VECTORS)
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
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < batch
    split = tl.arange(0, SPLITS)
    zero = tl.zeros((ROWS,), tl.float32)
    powers = _partial(state, 0, i, padded, split, splits, batch, NO_POWER)
    power = tl.max(powers, 1)
    factor = tl.exp2(powers - power[:, None])
    total = tl.sum(_partial(state, 1, i, padded, split, splits, batch, 0.0) * factor, 1)
    total += tl.sum(_partial(state, 2, i, padded, split, splits, batch, 0.0) * factor, 1)
    value, low, whole = total, zero, zero + 1
    if not SOFTPLUS:
        value, low = _logarithm(total, power)
        whole = tl.where(total == 0, 1.0, total)
    best, count, masked, mean_v, sum_v, sums = zero - float("inf"), zero, zero, zero, zero, zero
    if STATS:
        best = tl.max(_partial(state, 3, i, padded, split, splits, batch, float("-inf")), 1)
        count = tl.sum(_partial(state, 4, i, padded, split, splits, batch, 0.0), 1)
        masked = tl.sum(_partial(state, 5, i, padded, split, splits, batch, 0.0), 1)
    if MEAN:
        mean_v = tl.sum(_partial(state, 6, i, padded, split, splits, batch, 0.0) * factor, 1) / whole
    if SUM:
        sum_v = tl.sum(_partial(state, 7, i, padded, split, splits, batch, 0.0), 1)
        s = tl.load(scale + i * scale_step, mask=live, other=0.0).to(tl.float32)
        sums = s * sum_v + tl.sum(_partial(state, 8, i, padded, split, splits, batch, 0.0), 1)
    tl.store(red + i, value, mask=live)
    tl.store(sum_u + i, sums, mask=live)
    tl.store(aux + i, best, mask=live)
    tl.store(aux + batch + i, count, mask=live)
    tl.store(aux + 2 * batch + i, masked, mask=live)
    tl.store(aux + 3 * batch + i, mean_v, mask=live)
    tl.store(aux + 4 * batch + i, sum_v, mask=live)
    tl.store(aux + 5 * batch + i, low, mask=live)
    if FLASH:
        d = tl.arange(0, WIDTH)
        mask = live[:, None] & (d < D)[None, :]
        h = tl.zeros((ROWS, WIDTH), tl.float32)
        for number in range(splits):
            row = tl.cast(number, tl.int64) * padded + i
            share = tl.exp2(tl.load(state + row + (STATES - 1) * number * padded, mask=live, other=NO_POWER) - power)
            h += tl.load(o + row[:, None] * D + d[None, :], mask=mask, other=0.0) * share[:, None]
        if HALF:
            h *= 1 / HALF_UNIT
        tl.store(o_red + i[:, None] * D + d[None, :], h / whole[:, None], mask=mask)


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
    without = tl.where(total == total, float("-inf"), total)  # a NaN stays one
    return tl.where(total > 0, value, without), tl.where(total > 0, low, 0.0)
