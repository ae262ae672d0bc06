"""The backward of the sweep by chunks of classes: a chunk's G, and the gradient of its rows of w.

    G_ij  = (p_i A_ij + q_i) N'_ij          in the operands' dtype; f_i = s_i g_i goes into x or into the row's end
    dW_j  = (h_j - (h_j . w_hat_j) w_hat_j) / |w_j|
    h_j   = sum_i G_ij f_i x_hat_i + sum_{i: y_i = j} g_cos_y_i x_hat_i

The sum over i is a library product. The targets' share is added in the order of the rows, without atomics. The gradient
is stored, or an optimizer's step uses it up (update.py).
"""

import triton
import triton.language as tl

from .rival import exponent, rival, softplus
from .tile import EPS, HALF_UNIT, ROW_VECTORS, clamp, cosines, inverse_norm, rivals, tile_rows
from .update import update_block


@triton.jit(do_not_specialize=["batch", "classes", "first_tile"])
def gradient_kernel(
    x,
    w,
    index,
    bias,
    args,
    target,
    constants,
    coefficients,
    gradient,
    w_hat,
    bias_parts,
    batch,
    padded,
    D,
    x_row,
    classes,
    w_row,
    w_col,
    bias_step,
    first_tile,
    chunk,
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
    TO_GRADIENT: tl.constexpr,
    TO_W_HAT: tl.constexpr,
    TO_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = padded // ROWS
    block, tile = tl.program_id(0) % blocks, first_tile + tl.program_id(0) // blocks
    i = block * ROWS + tl.arange(0, ROWS)
    scale_hi, scale_lo = tl.load(constants + i), tl.load(constants + padded + i)
    tau, scale = tl.load(constants + 2 * padded + i), tl.load(constants + 3 * padded + i)
    power, rest = tl.load(coefficients + i), tl.load(coefficients + padded + i)
    p, q = tl.load(coefficients + 2 * padded + i), tl.load(coefficients + 3 * padded + i)
    a = tl.load(args) if ARGS > 0 else 0.0
    b = tl.load(args + 1) if ARGS > 1 else 0.0

    j_class, j_row, j_source, valid = tile_rows(tile, classes, index, SLOTS, CENTERS, GROUP, INDEXED)
    c, inverse = cosines(
        x, i, x_row, w, j_source, D, w_row, w_col, ROWS, SLOTS, DEPTH, WHOLE, NORMALIZE, RANGE, PRECISION
    )
    keep = rivals(c, j_class, valid, tl.load(target + i), ROWS, SLOTS, GROUP)
    if CLAMP:
        c = clamp(c)
    v, slope = rival(c, tau[:, None], a, b, RULE)
    j_bias = tl.zeros((SLOTS,), tl.float32)
    if BIAS:
        j_bias = tl.load(bias + tl.minimum(j_class, classes - 1).to(tl.int64) * bias_step).to(tl.float32)
    if SOFTPLUS:
        _, weight = softplus(scale[:, None] * v + j_bias[None, :])
    else:
        e = exponent(v, scale_hi[:, None], scale_lo[:, None], (j_bias * 1.4426950408889634)[None, :], power[:, None])
        weight = tl.exp2(tl.where(keep, e - rest[:, None], float("-inf")))
    g = tl.where(keep, p[:, None] * weight + q[:, None], 0.0)
    first_row = first_tile * (SLOTS // GROUP) * CENTERS
    if TO_BIAS:  # the gradient of u, in full precision
        unit = tl.load(coefficients + 5 * padded + i)
        column = tl.sum(tl.reshape(tl.sum(g * unit[:, None], 0), (SLOTS // GROUP, GROUP)), 1)
        j = (tile - first_tile) * (SLOTS // GROUP) + tl.arange(0, SLOTS // GROUP)
        tl.store(
            bias_parts + block * (chunk // CENTERS) + j,
            column,
            mask=tile * (SLOTS // GROUP) + tl.arange(0, SLOTS // GROUP) < classes,
        )
    if TO_GRADIENT:
        if not UNIT_SLOPE:
            g *= slope
        if x.dtype.element_ty == tl.float16:
            g *= HALF_UNIT
        # Not from j_row, which ends at the last class: where a thread's columns follow each other, one address does.
        slot = tl.arange(0, SLOTS)
        column = (tile - first_tile) * (SLOTS // GROUP * CENTERS) + slot // GROUP * CENTERS + slot % GROUP
        at = gradient + i.to(tl.int64)[:, None] * chunk + column[None, :]
        tl.store(at, g.to(x.dtype.element_ty), mask=(i < batch)[:, None] & valid[None, :])
    if TO_W_HAT:  # noqa: SIM102 (a constant, and a value that is known when the kernel runs)
        if block == 0:  # for the product with G that gives dX; the rows are in the cache
            for first in range(0, D, DEPTH):
                # [j, d], not [d, j] as in `cosines`: the store's layout would become that of the loads there, and the
                # norms would be added up in another order than in the forward.
                d = first + tl.arange(0, DEPTH)
                from_w = w + j_source[:, None] * w_row + d.to(tl.int64)[None, :] * w_col
                b_w = tl.load(from_w, mask=d[None, :] < D, other=0.0).to(tl.float32) * inverse[:, None]
                w_at = w_hat + (j_row - first_row).to(tl.int64)[:, None] * D + d[None, :]
                tl.store(w_at, b_w.to(x.dtype.element_ty), mask=(d < D)[None, :] & valid[:, None])


@triton.jit(do_not_specialize=["batch", "classes", "first_class", "blocks"], do_not_specialize_on_alignment=ROW_VECTORS)
def finish_weights(
    products,
    x,
    w,
    index,
    inverse_x,
    order,
    sorted_class,
    target_row,
    g_cos_y,
    unit,
    bias_parts,
    d_w,
    d_bias,
    batch,
    D,
    x_row,
    x_col,
    classes,
    w_row,
    w_col,
    g_step,
    first_class,
    chunk,
    blocks,
    m,
    v,
    step,
    together,
    lr,
    decay,
    keep,
    own,
    keep_square,
    own_square,
    log_keep,
    log_keep_square,
    eps,
    HALF: tl.constexpr,
    INDEXED: tl.constexpr,
    CENTERS: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TO_W: tl.constexpr,
    TO_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    COUNTED: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SCAN: tl.constexpr,
):
    """`products` [rows of the chunk, D] = sum_i G_ij f_i x_hat_i in units of `unit`; d_w starts at the chunk's rows.

    ADD: d_w holds the gradients of other calls. OPTIMIZER: not stored there, but used up on w and its state.
    """
    CLASSES: tl.constexpr = SLOTS // GROUP
    low = first_class + tl.program_id(0) * CLASSES
    _, j_row, j_source, valid = tile_rows(0, classes - low, index, SLOTS, CENTERS, GROUP, False)
    j_source += low.to(tl.int64) * CENTERS
    if INDEXED:
        j_source = tl.load(index + j_source).to(tl.int64)
    if TO_BIAS:
        j = tl.arange(0, CLASSES)
        j_sum = tl.zeros((CLASSES,), tl.float32)
        for block in range(blocks):
            at = bias_parts + block * (chunk // CENTERS) + low - first_class + j
            j_sum += tl.load(at, mask=low + j < classes, other=0.0)
        tl.store(d_bias + low + j, j_sum.to(d_bias.dtype.element_ty), mask=low + j < classes)
    if TO_W:
        d = tl.arange(0, WIDTH)
        mask = valid[:, None] & (d < D)[None, :]
        j_local = (low - first_class) * CENTERS + j_row
        h = tl.load(products + j_local.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        if HALF:
            h *= tl.load(unit) / HALF_UNIT
        begin, end = 0, 0
        for k in range(0, batch, SCAN):
            at = k + tl.arange(0, SCAN)
            y = tl.load(sorted_class + at, mask=at < batch, other=2147483647)
            begin += tl.sum((y < low).to(tl.int32), 0)
            end += tl.sum((y < low + CLASSES).to(tl.int32), 0)
        for k in range(begin, end):
            row = tl.load(order + k).to(tl.int64)
            b_x = tl.load(x + row * x_row + d.to(tl.int64) * x_col, mask=d < D, other=0.0)
            x_hat = b_x.to(tl.float32) * tl.load(inverse_x + row)
            share = tl.load(g_cos_y + row * g_step).to(tl.float32) * x_hat
            hit = (low * CENTERS + j_row == tl.load(target_row + row)) & valid
            h += tl.where(hit[:, None], share[None, :], 0.0)
        w_at = w + j_source[:, None] * w_row + d.to(tl.int64)[None, :] * w_col
        if NORMALIZE or OPTIMIZER != "":
            b_w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            square = tl.sum(b_w * b_w, 1)
            inverse = inverse_norm(square)
            w_hat = b_w * inverse[:, None]
            along = tl.where(tl.sqrt_rn(square) < EPS, 0.0, tl.sum(h * w_hat, 1))  # a clamped norm is a constant
            h = (h - along[:, None] * w_hat) * inverse[:, None]
        d_w_at = d_w + j_local.to(tl.int64)[:, None] * D + d[None, :]
        if ADD:
            h += tl.load(d_w_at, mask=mask, other=0.0)
        if OPTIMIZER != "":
            update_block(
                w_at, b_w, h, m, v, step, j_source, d, mask, D, together,
                lr, decay, keep, own, keep_square, own_square, log_keep, log_keep_square, eps,
                OPTIMIZER, MOMENTUM, NESTEROV, COUNTED,
            )  # fmt: skip
        else:
            tl.store(d_w_at, h.to(d_w.dtype.element_ty), mask=mask)
