"""Built-in target transforms T and their slopes T', as fused_margin/margins/angular.py defines them, and the row loss.

loss_i = log(1 + exp(red_i - s_i T(cos_y_i)))
"""

import triton
import triton.language as tl

from .forward import two_sum
from .rival import softplus
from .tile import ROW_VECTORS

PI = tl.constexpr(3.14159265358979323846)
SINE_FLOOR = tl.constexpr(1e-3)  # as in fused_margin/angles.py
LARGEST_POLYNOMIAL = tl.constexpr(16)  # as in csrc/margins.h


@triton.jit
def arccosine(c):
    """acos(c) for |c| <= 1, error 2e-7: asin of c, or of the sine of half the angle."""
    size = tl.abs(c)
    near = size > 0.5
    square = tl.where(near, (1 - size) * 0.5, size * size)
    x = tl.where(near, tl.sqrt_rn(tl.where(near, square, 0.0)), size)
    p = square * 3.820644205e-2 + 2.649428242e-2  # (asin(x) / x - 1) / x^2: Chebyshev fit, error 7e-8
    p = p * square + 4.501069900e-2
    p = p * square + 7.498809183e-2
    p = p * square + 1.666667276e-1
    sine = x + x * square * p
    angle = tl.where(near, 2 * sine, PI / 2 - sine)
    mirrored = tl.where(near, PI - 2 * sine, PI / 2 + sine)
    return tl.where(c < 0, mirrored, angle)


@triton.jit
def _multiple(c, m, floored, WHOLE: tl.constexpr):
    """psi = (-1)^k cos(m theta) - 2 k, k = floor(m theta / pi); of a whole m without an angle."""
    k = tl.zeros(c.shape, tl.float32)
    if WHOLE:
        whole = k + m
        segment = (k + PI) / whole  # of the angle, for each k
        value = c
        slope = tl.full(c.shape, 1.0, tl.float32)
        before = slope
        slope_before = k
        for i in range(1, LARGEST_POLYNOMIAL):
            more = whole > i
            k += tl.where(more & (c <= tl.cos(segment * i)), 1.0, 0.0)
            following = 2 * c * value - before
            slope_following = 2 * value + 2 * c * slope - slope_before
            before, slope_before = value, slope
            value = tl.where(more, following, value)
            slope = tl.where(more, slope_following, slope)
    else:
        angle = arccosine(c) * m
        k = tl.floor(angle / PI)
        value = tl.cos(angle)
        slope = m * tl.sin(angle) / floored
    sign = 1 - 2 * (k - 2 * tl.floor(k * 0.5))
    return sign * value - 2 * k, sign * slope


@triton.jit
def transform(c, m1, m2, m3, cos_m2, sin_m2, past, KIND: tl.constexpr, TAIL: tl.constexpr):
    """(T(c), T'(c)). `past`: what a tail takes from c where the angle is beyond pi."""
    square = (1 - c) * (1 + c)
    sine = tl.sqrt_rn(tl.where(square > 0, square, 0.0))
    floored = tl.where(sine > SINE_FLOOR, sine, SINE_FLOOR)
    value = c
    slope = tl.full(c.shape, 1.0, tl.float32)
    if KIND == "whole multiple":
        value, slope = _multiple(c, m1, floored, True)
    elif KIND == "multiple":
        value, slope = _multiple(c, m1, floored, False)
    elif KIND != "cosine":
        if KIND == "turned":  # m1 = 1: without an angle
            beyond = c < -cos_m2
            value = c * cos_m2 - sine * sin_m2
            slope = cos_m2 + c / floored * sin_m2
        else:
            tl.static_assert(KIND == "angle", "a transform that no kernel has")
            angle = arccosine(c) * m1 + m2
            beyond = angle > PI
            value = tl.cos(angle)
            slope = m1 * tl.sin(angle) / floored
        if TAIL == "easy":
            value = tl.where(c > 0, value, c)
            slope = tl.where(c > 0, slope, 1.0)
        elif TAIL == "clamp":
            value = tl.where(beyond, -1.0, value)
            slope = tl.where(beyond, 0.0, slope)
        elif TAIL != "raw":
            value = tl.where(beyond, c - past, value)
            slope = tl.where(beyond, 1.0, slope)
    return value - m3, slope


@triton.jit(do_not_specialize=["batch", "ignore_index"], do_not_specialize_on_alignment=ROW_VECTORS)
def row_loss(
    labels,
    scale,
    cos_y,
    red,
    red_low,
    tau,
    loss,
    rows,
    batch,
    label_step,
    scale_step,
    ignore_index,
    m1,
    m2,
    m3,
    cos_m2,
    sin_m2,
    past,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT_SLOPE: tl.constexpr,
    REDUCTION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Losses and their slopes, the rows of spec.Rows. One program for a sum or a mean, which it adds in order."""
    begin, end = 0, batch
    if REDUCTION == "none":
        begin = tl.program_id(0) * ROWS
        end = tl.minimum(begin + ROWS, batch)
    share = 1.0
    if REDUCTION == "mean":
        valid = 0
        for first in range(0, batch, ROWS):
            i = first + tl.arange(0, ROWS).to(tl.int64)
            label = tl.load(labels + i * label_step, mask=i < batch, other=ignore_index)
            valid += tl.sum((label != ignore_index).to(tl.int32), 0)
        share = 1.0 / tl.maximum(valid, 1).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS,), tl.float32)
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS).to(tl.int64)
        live = i < batch
        label = tl.load(labels + i * label_step, mask=live, other=ignore_index)
        counts = label != ignore_index
        s = tl.load(scale + i * scale_step, mask=live, other=0.0).to(tl.float32)
        c = tl.load(cos_y + i, mask=live, other=0.0)
        b_red = tl.load(red + i, mask=live, other=0.0)
        t, slope = transform(c, m1, m2, m3, cos_m2, sin_m2, past, KIND, TAIL)
        if UNIT_SLOPE:
            slope = tl.full(t.shape, 1.0, tl.float32)
        value, by_red = softplus((b_red - s * t) + tl.load(red_low + i, mask=live, other=0.0))
        value = tl.where(counts, value, 0.0)
        by_red = tl.where(counts, by_red * share, 0.0)
        tl.store(rows + i, by_red, mask=live)
        tl.store(rows + batch + i, tl.where(counts, -by_red * s * slope, 0.0), mask=live)
        tl.store(rows + 2 * batch + i, tl.where(counts, -by_red * t, 0.0), mask=live)
        tl.store(rows + 3 * batch + i, b_red, mask=live)
        tl.store(rows + 4 * batch + i, c, mask=live)
        tl.store(rows + 5 * batch + i, tl.load(tau + i, mask=live, other=0.0), mask=live)
        if REDUCTION == "none":
            tl.store(loss + i, value, mask=live)
        total, low = two_sum(total, low, value)
    if REDUCTION != "none":
        tl.store(loss, (tl.sum(total, 0) + tl.sum(low, 0)) * share)
