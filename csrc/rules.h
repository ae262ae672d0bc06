// Rival rules: N(c) and its slope N'(c) for a rival's cosine c, as fused_margin/rules.py defines them.
//
// Shared by host and device: V is a scalar or a vector type, Ops has `select(mask, a, b)` and `exponential(v)` for it.
// On the CPU, include it after the instruction set is chosen.
#pragma once

#include "codes.h"

#ifdef __CUDACC__
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fused_margin {

template <class V>
struct Rival {
  V value, slope;
};

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
            Ops::select(c > hi, zero, Ops::select(c < lo, zero, one))};
  } else if constexpr (code == RuleCode::filter) {  // 0 above the threshold
    const auto dropped = c > zero + args[0];
    return {Ops::select(dropped, zero, c), Ops::select(dropped, zero, one)};
  } else if constexpr (code == RuleCode::gauss) {  // q c + q - 1, q a constant in the gradient
    const V q = args[0] * Ops::exponential((c - tau) * (tau - c) / args[1]);
    return {q * (c + T(1)) - T(1), q};
  } else if constexpr (code == RuleCode::circle) {  // [c + m]_+ (c - m), the factor a constant in the gradient
    const V sum = c + args[0], factor = Ops::select(sum > zero, sum, zero);
    return {factor * (c - args[0]), factor};
  } else {
    return {c, one};
  }
}

}  // namespace fused_margin
