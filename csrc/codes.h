// The rules, reductions and target transforms by number: the order is that of CODES and REDUCTIONS in
// fused_margin/rules.py, of KINDS in fused_margin/margins/forms.py, and of TAILS in fused_margin/margins/angular.py.
// Also which of two cosines is the larger.
#pragma once

#ifdef __CUDACC__
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fused_margin {

enum class RuleCode { identity, hard, curricular, clip, filter, gauss, circle, power };
enum class Reduction { logsumexp, softplus };
enum class TargetKind { cosine, angle, multiple };
enum class Tail { raw, linear, continuous, clamp, easy };

// NaN is above all numbers: of sub-centres of which one has it, the largest cosine must not hide it.
template <class T>
FM_HOST_DEVICE bool exceeds(T a, T b) {
  return a > b || (a != a && b == b);
}

}  // namespace fused_margin
