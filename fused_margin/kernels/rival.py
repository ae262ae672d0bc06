"""Rival rules N(c) and their slopes N'(c) as fused_margin/rules.py defines them, and the reductions over rivals.

Exponentials are to base 2: scale * log2(e) comes as a sum of two numbers, so that folding rounds nothing.
"""

import triton
import triton.language as tl


@triton.jit
def rival(c, tau, a, b, RULE: tl.constexpr):
    """(N(c), N'(c)) of a block of cosines; a and b are the rule's arguments, tau is broadcast against c."""
    value = c
    slope = tl.full(c.shape, 1.0, tl.float32)
    if RULE == "hard":  # a c + b above tau
        value = tl.where(c > tau, a * c + b, c)
        slope = tl.where(c > tau, a, slope)
    elif RULE == "curricular":  # c (t + c) above tau
        value = tl.where(c > tau, c * (c + a), c)
        slope = tl.where(c > tau, 2 * c + a, slope)
    elif RULE == "clip":  # between lo and hi
        value = tl.where(c > b, b, tl.where(c < a, a, c))
        slope = tl.where((c > a) & (c < b), slope, 0.0)
    elif RULE == "filter":  # 0 above the threshold
        value = tl.where(c > a, 0.0, c)
        slope = tl.where(c > a, 0.0, slope)
    elif RULE == "gauss":  # q c + q - 1, q a constant in the gradient
        q = a * tl.exp((c - tau) * (tau - c) / b)
        value = q * (c + 1) - 1
        slope = q
    elif RULE == "circle":  # [c + m]_+ (c - m), the factor a constant in the gradient
        factor = tl.where(c + a > 0, c + a, 0.0)
        value = factor * (c - a)
        slope = factor
    elif RULE == "power":  # 2 ((c + 1) / 2)^t - 1 + m
        half = (c + 1) * 0.5
        power = _power(half, a - 1)
        value = 2 * power * half - 1 + b
        slope = a * power
    else:
        tl.static_assert(RULE == "identity", "a rule that no kernel has")
    return value, slope


@triton.jit
def _power(base, exponent):
    """base^exponent for base >= 0."""
    positive = tl.exp2(exponent * tl.log2(tl.where(base > 0, base, 1.0)))
    return tl.where(base > 0, positive, tl.where(exponent == 0, 1.0, 0.0))


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1], relative error 1e-7: the hardware's logarithm has an absolute one near 1."""
    p = t * -3.256378455e-3 + 1.990716084e-2
    p = p * t - 5.706420058e-2
    p = p * t + 1.061426467e-1
    p = p * t - 1.531186309e-1
    p = p * t + 1.967811725e-1
    p = p * t - 2.495455887e-1
    p = p * t + 3.333000404e-1
    p = p * t - 4.999990399e-1
    p = p * t + 9.999999954e-1
    return p * t


@triton.jit
def softplus(u):
    """(log(1 + exp(u)), its slope)"""
    e = tl.exp(tl.where(u < 0, u, -u))
    return tl.where(u > 0, u, 0.0) + log1p_unit(e), tl.where(u < 0, e, 1.0) / (1 + e)


@triton.jit
def exponent(value, scale_hi, scale_lo, bias, power):
    """log2 of exp(u) / 2^power: the large terms cancel inside one fused multiply-add."""
    return tl.fma(value, scale_hi, bias - power) + value * scale_lo
