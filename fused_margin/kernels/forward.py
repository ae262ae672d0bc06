"""The forward of the sweep: each program takes a block of rows of x through one split of the class tiles.

    sum_i = sum_j 2^(log2(e) u_ij - K_i)    K_i the whole number next to the largest exponent so far
    O_i   = sum_j A_ij N'_ij w_hat_j        in the flash form, by online softmax

K is whole, so that rescaling rounds nothing; sums over tiles are compensated. `rows.epilogue` merges the splits.
"""

import triton
import triton.language as tl

from .rival import exponent, rival, softplus
from .tile import HALF_UNIT, clamp, cosines, rivals, tile_rows

NO_POWER = tl.constexpr(-1e30)  # K of a row that has seen no rival
STATES = tl.constexpr(9)  # of a row in a split: K, sum, its compensation, best, count, masked, mean v, sum v, sum bias


@triton.jit
def two_sum(total, low, value):
    """total + low += value, where `low` collects what rounding takes from `total`."""
    new = total + value
    part = new - total
    return new, low + ((total - (new - part)) + (value - part))


@triton.jit(do_not_specialize=["classes", "tiles", "splits"])
def sweep_kernel(
    x,
    w,
    index,
    bias,
    args,
    target,
    constants,
    state,
    o,
    padded,
    D,
    x_row,
    classes,
    w_row,
    w_col,
    bias_step,
    tiles,
    splits,
    RULE: tl.constexpr,
    ARGS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    UNIT_SLOPE: tl.constexpr,
    BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
    CENTERS: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CLAMP: tl.constexpr,
    STATS: tl.constexpr,
    MASKS: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    FLASH: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks = padded // ROWS
    split = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    b_target = tl.load(target + i)
    scale_hi, scale_lo = tl.load(constants + i), tl.load(constants + padded + i)
    tau, scale = tl.load(constants + 2 * padded + i), tl.load(constants + 3 * padded + i)
    a = tl.load(args) if ARGS > 0 else 0.0
    b = tl.load(args + 1) if ARGS > 1 else 0.0

    power = tl.full((ROWS,), NO_POWER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS,), tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    masked = tl.zeros((ROWS,), tl.float32)
    mean_v = tl.zeros((ROWS,), tl.float32)
    sum_v = tl.zeros((ROWS,), tl.float32)
    sum_bias = tl.zeros((ROWS,), tl.float32)
    if FLASH:
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        b_d = tl.arange(0, WIDTH)
    begin = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    end = ((split.to(tl.int64) + 1) * tiles // splits).to(tl.int32)
    for tile in range(begin, end):
        j_class, _, j_source, valid = tile_rows(tile, classes, index, SLOTS, CENTERS, GROUP, INDEXED)
        c, inverse = cosines(
            x, i, x_row, w, j_source, D, w_row, w_col, ROWS, SLOTS, DEPTH, WHOLE, NORMALIZE, RANGE, PRECISION
        )
        keep = rivals(c, j_class, valid, b_target, ROWS, SLOTS, GROUP)
        if CLAMP:
            c = clamp(c)
        v, slope = rival(c, tau[:, None], a, b, RULE)
        j_bias = tl.zeros((SLOTS,), tl.float32)
        if BIAS:
            j_bias = tl.load(bias + tl.minimum(j_class, classes - 1).to(tl.int64) * bias_step).to(tl.float32)
        if SOFTPLUS:
            value, weight = softplus(scale[:, None] * v + j_bias[None, :])
            weight = tl.where(keep, weight, 0.0)
            total, low = two_sum(total, low, tl.sum(tl.where(keep, value, 0.0), 1))
        else:
            j_shift = (j_bias * 1.4426950408889634)[None, :]
            e = v * scale_hi[:, None] + j_shift
            raised = tl.maximum(power, tl.floor(tl.max(tl.where(keep, e, NO_POWER), 1) + 0.5))
            shrink = tl.exp2(power - raised)
            power = raised
            e = exponent(v, scale_hi[:, None], scale_lo[:, None], j_shift, power[:, None])
            weight = tl.exp2(tl.where(keep, e, float("-inf")))
            total, low = two_sum(total * shrink, low * shrink, tl.sum(weight, 1))
            mean_v *= shrink
            if FLASH:
                acc *= shrink[:, None]
        if STATS:
            score = c
            if BIAS:
                score = c + j_bias[None, :] / scale[:, None]
            best = tl.maximum(best, tl.max(tl.where(keep, score, float("-inf")), 1))
            if MASKS:
                hard = keep & (c > tau[:, None])
                count += tl.sum(tl.where(hard, 1.0, 0.0), 1)
                masked += tl.sum(tl.where(hard, c, 0.0), 1)
        if MEAN:
            mean_v += tl.sum(weight * v, 1)
        if SUM:
            sum_v += tl.sum(tl.where(keep, v, 0.0), 1)
            if BIAS:
                sum_bias += tl.sum(tl.where(keep, j_bias[None, :], 0.0), 1)
        if FLASH:
            if not UNIT_SLOPE:
                weight *= slope
            if x.dtype.element_ty == tl.float16:
                weight *= HALF_UNIT
            at = w + j_source[:, None] * w_row + b_d.to(tl.int64)[None, :] * w_col
            b_w = tl.load(at, mask=b_d[None, :] < D, other=0.0).to(tl.float32) * inverse[:, None]
            acc = tl.dot(weight.to(x.dtype.element_ty), b_w.to(x.dtype.element_ty), acc, input_precision=PRECISION)

    at = state + split.to(tl.int64) * STATES * padded + i
    tl.store(at, power)
    tl.store(at + padded, total)
    tl.store(at + 2 * padded, low)
    tl.store(at + 3 * padded, best)
    tl.store(at + 4 * padded, count)
    tl.store(at + 5 * padded, masked)
    tl.store(at + 6 * padded, mean_v)
    tl.store(at + 7 * padded, sum_v)
    tl.store(at + 8 * padded, sum_bias)
    if FLASH:
        o_at = o + (split.to(tl.int64) * padded + i)[:, None] * D + b_d[None, :]
        tl.store(o_at, acc, mask=b_d[None, :] < D)
