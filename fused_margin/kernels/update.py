"""An optimizer's step on rows of w and of its state, given their gradient; the formulas are those of update_rules.py.

sgd    g += decay w    m = keep m + own g    w -= lr (nesterov ? g + keep m : m)
adamw  w *= decay    m += own (g - m)    v = keep_square v + own_square g^2
       w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)    t: the steps of the row, this one included

What the host must know better than float32 does, it computes: see steps.py. `finish_weights` has the gradient of a
chunk of classes in registers; `update_rows` reads one from memory.
"""

import triton
import triton.language as tl


@triton.jit
def one_minus_power(t, log_base):
    """1 - base^t without the digits that 1 - exp loses near 1: by the series where base^t > exp(-1/2)."""
    y = t * log_base
    x = tl.where(y > -0.5, -y, 0.0)  # 1 - exp(-x) = x (1 - x/2 (1 - x/3 (...)))
    p = 1 - x * (1 / 8)
    p = 1 - x * (1 / 7) * p
    p = 1 - x * (1 / 6) * p
    p = 1 - x * (1 / 5) * p
    p = 1 - x * (1 / 4) * p
    p = 1 - x * (1 / 3) * p
    p = 1 - x * (1 / 2) * p
    return tl.where(y > -0.5, x * p, 1 - tl.exp(y))


@triton.jit
def advance(
    w, g, m, v, t, lr, decay, keep, own, keep_square, own_square, log_keep, log_keep_square, eps,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """w, m and v [i, d] after the step; t [i]."""
    if OPTIMIZER == "sgd":
        g += decay * w
        if MOMENTUM:
            if COUNTED:  # the first step of a row takes the whole gradient
                m = keep * m + tl.where(t == 1, 1.0, own)[:, None] * g
            else:
                m = keep * m + own * g
            if NESTEROV:
                g += keep * m
            else:
                g = m
        w -= lr * g
    else:
        tl.static_assert(OPTIMIZER == "adamw", "an optimizer that no kernel has")
        w *= decay
        m += own * (g - m)
        v = keep_square * v + own_square * g * g
        size = tl.div_rn(tl.zeros_like(t) + lr, one_minus_power(t, log_keep))
        root = tl.sqrt_rn(one_minus_power(t, log_keep_square))
        w -= tl.div_rn(size[:, None] * m, tl.div_rn(tl.sqrt_rn(v), tl.broadcast_to(root[:, None], v.shape)) + eps)
    return w, m, v


@triton.jit
def update_block(
    w_at, b_w, g, m, v, step, row, d, mask, D, together,
    lr, decay, keep, own, keep_square, own_square, log_keep, log_keep_square, eps,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """In place: rows `row` of the state, and of w, whose numbers b_w [row, d] lie at `w_at`, where `mask` is set."""
    at = row[:, None] * D + d[None, :]
    t = tl.full(row.shape, 1.0, tl.float32)
    if COUNTED:
        t = tl.load(step + row // together)
    b_m, b_v = b_w, b_w  # not used where there is none
    if MOMENTUM:
        b_m = tl.load(m + at, mask=mask, other=0.0)
    if OPTIMIZER == "adamw":
        b_v = tl.load(v + at, mask=mask, other=0.0)
    b_w, b_m, b_v = advance(
        b_w, g, b_m, b_v, t, lr, decay, keep, own, keep_square, own_square, log_keep, log_keep_square, eps,
        OPTIMIZER, MOMENTUM, NESTEROV, COUNTED,
    )  # fmt: skip
    tl.store(w_at, b_w.to(w_at.dtype.element_ty), mask=mask)
    if MOMENTUM:
        tl.store(m + at, b_m, mask=mask)
    if OPTIMIZER == "adamw":
        tl.store(v + at, b_v, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def update_rows(
    w,
    index,
    grad,
    rows,
    D,
    w_row,
    w_col,
    grad_row,
    grad_col,
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
    INDEXED: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows `index` of w (all, without) with their gradient `grad` [rows, D]."""
    parts = tl.cdiv(D, WIDTH)
    i = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(0) % parts).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = (i < rows)[:, None] & (d < D)[None, :]
    i = tl.minimum(i, rows - 1)
    row = i
    if INDEXED:
        row = tl.load(index + i).to(tl.int64)
    g = tl.load(grad + i[:, None] * grad_row + d[None, :] * grad_col, mask=mask, other=0.0).to(tl.float32)
    w_at = w + row[:, None] * w_row + d[None, :] * w_col
    b_w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
    update_block(
        w_at, b_w, g, m, v, step, row, d, mask, D, together,
        lr, decay, keep, own, keep_square, own_square, log_keep, log_keep_square, eps,
        OPTIMIZER, MOMENTUM, NESTEROV, COUNTED,
    )  # fmt: skip
