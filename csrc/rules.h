// Rival rules: N(c) and its slope N'(c) for a rival's cosine c, as fused_margin/rules.py defines them.
//
// Shared by host and device: V is a scalar or a vector type, Ops has `select(mask, a, b)` and `exponential(v)` for it.
// On the CPU, include it after the instruction set is chosen.
#pragma once

#include "codes.h"

namespace fused_margin {

template <class V>
struct Rival {
  V value, slope;
};

FM_HOST_DEVICE float power_of(float base, float exponent) { return __builtin_powf(base, exponent); }
FM_HOST_DEVICE double power_of(double base, double exponent) { return __builtin_pow(base, exponent); }

// base^exponent for base >= 0: a small whole exponent by squaring, any other number by number.
template <class V, class T>
FM_HOST_DEVICE V power(V base, T exponent) {
  const int whole = exponent >= T(0) && exponent <= T(64) ? int(exponent) : -1;
  if (T(whole) == exponent) {
    V result = V{} + T(1);
    for (int left = whole; left; left >>= 1, base = base * base)
      if (left & 1) result = result * base;
    return result;
  }
  T numbers[sizeof(V) / sizeof(T)];
  __builtin_memcpy(numbers, &base, sizeof base);
  for (T& number : numbers) number = power_of(number, exponent);
  __builtin_memcpy(&base, numbers, sizeof base);
  return base;
}

template <RuleCode code, class Ops, class V, class T>
FM_HOST_DEVICE Rival<V> rival(V c, V tau, const T* args) {
  const V zero = V{}, one = V{} + T(1);
  if constexpr (code == RuleCode::hard) {  // a c + b above tau
    const auto masked = c > tau;
    return {Ops::select(masked, args[0] * c + args[1], c), Ops::select(masked, one * args[0], one)};
  } else if constexpr (code == RuleCode::curricular) {  // c (t + c) above tau
    const auto masked = c > tau;
    return {Ops::select(masked, c * (c + args[0]), c), Ops::select(masked, T(2) * c + args[0], one)};
  } else if constexpr (code == RuleCode::clip) {  // between lo and hi
    const V lo = zero + args[0], hi = zero + args[1];
    return {Ops::select(c > hi, hi, Ops::select(c < lo, lo, c)),
            Ops::select(c > lo, Ops::select(c < hi, one, zero), zero)};
  } else if constexpr (code == RuleCode::filter) {  // 0 above the threshold
    const auto dropped = c > zero + args[0];
    return {Ops::select(dropped, zero, c), Ops::select(dropped, zero, one)};
  } else if constexpr (code == RuleCode::gauss) {  // q c + q - 1, q a constant in the gradient
    const V q = args[0] * Ops::exponential((c - tau) * (tau - c) / args[1]);
    return {q * (c + T(1)) - T(1), q};
  } else if constexpr (code == RuleCode::circle) {  // [c + m]_+ (c - m), the factor a constant in the gradient
    const V sum = c + args[0], factor = Ops::select(sum > zero, sum, zero);
    return {factor * (c - args[0]), factor};
  } else if constexpr (code == RuleCode::power) {  // 2 ((c + 1) / 2)^t - 1 + m
    const V half = (c + T(1)) * T(0.5), slope = power(half, args[0] - T(1));
    return {T(2) * slope * half - T(1) + args[1], args[0] * slope};
  } else {
    return {c, one};
  }
}

}  // namespace fused_margin
