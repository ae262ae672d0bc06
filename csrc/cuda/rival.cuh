// From cosines to exponents: which of a tile's cosines are rivals, the rules N and their slopes, exp(u) as powers of two.
#pragma once

#include "../margins.h"
#include "../rules.h"
#include "tile.cuh"

namespace fused_margin {
namespace gpu {

struct ScalarOps {
  __device__ static float select(bool mask, float a, float b) { return mask ? a : b; }
  __device__ static float exponential(float v) { return expf(v); }
};

// A call, not a copy of eight rules for each number that a thread holds.
__device__ __noinline__ inline Rival<float> any_rival(RuleCode rule, float c, float tau, const float* args) {
  switch (rule) {
    case RuleCode::hard:
      return rival<RuleCode::hard, ScalarOps>(c, tau, args);
    case RuleCode::curricular:
      return rival<RuleCode::curricular, ScalarOps>(c, tau, args);
    case RuleCode::clip:
      return rival<RuleCode::clip, ScalarOps>(c, tau, args);
    case RuleCode::filter:
      return rival<RuleCode::filter, ScalarOps>(c, tau, args);
    case RuleCode::gauss:
      return rival<RuleCode::gauss, ScalarOps>(c, tau, args);
    case RuleCode::circle:
      return rival<RuleCode::circle, ScalarOps>(c, tau, args);
    case RuleCode::power:
      return rival<RuleCode::power, ScalarOps>(c, tau, args);
    default:
      return {c, 1.0f};
  }
}

__device__ __noinline__ inline Transformed<float> any_softplus(float u) { return softplus_of(u); }

// log2 of exp(u) / 2^power: the large terms cancel inside one fused multiply-add.
__device__ __forceinline__ float exponent(float v, float scale_hi, float scale_lo, float bias2, float power) {
  return fmaf(v, scale_hi, bias2 - power) + v * scale_lo;
}

// total + low += value, where `low` collects what rounding takes from `total`.
__device__ __forceinline__ void two_sum(float& total, float& low, float value) {
  const float sum = total + value, part = sum - total;
  low += (total - (sum - part)) + (value - part);
  total = sum;
}

// What the sweep knows of a thread's rows. Read where it is needed: in the main loop the registers are wanted.
struct OwnRows {
  const Problem& p;
  int64_t first;  // own row r is first + 8 r

  __device__ OwnRows(const Problem& p, int64_t block, const Place& at) : p(p), first(block * kRows + at.row(0)) {}
  __device__ float constant(int k, int r) const { return p.constants[k * p.padded + first + 8 * r]; }
  __device__ float scale_hi(int r) const { return constant(0, r); }
  __device__ float scale_lo(int r) const { return constant(1, r); }
  __device__ float tau(int r) const { return constant(2, r); }
  __device__ float scale(int r) const { return constant(3, r); }
  __device__ int target(int r) const { return p.target[first + 8 * r]; }
};

// Bit s of rivals[r]: own slot s is a rival of own row r. Of a class's sub-centres that is the first of their maxima.
using Rivals = unsigned[kOwnRows];

// Of row r, those slots that have the largest cosine of their class.
__device__ __forceinline__ unsigned closest_centers(const Problem& p, Accumulators& c, int r, unsigned valid) {
  float largest[kSlotFragments];
  int first[kSlotFragments];
  const auto is_valid = [&](int s) { return valid >> s & 1; };
#pragma unroll
  for (int n = 0; n < kSlotFragments; n++) {
    const float a = is_valid(2 * n) ? own(c, r, 2 * n) : -INFINITY;
    const float b = is_valid(2 * n + 1) ? own(c, r, 2 * n + 1) : -INFINITY;
    largest[n] = largest_or_nan(a, b);
    for (int apart = 1; apart <= 2; apart *= 2) {
      const float other = __shfl_xor_sync(~0u, largest[n], apart);
      if (p.group > 2 * apart) largest[n] = largest_or_nan(largest[n], other);
    }
  }
  const int lane = int(threadIdx.x) % 4;
#pragma unroll
  for (int n = 0; n < kSlotFragments; n++) {
    const float top = p.group > 8 ? largest_or_nan(largest[n], largest[n ^ 1]) : largest[n];
    first[n] = kMostSubCenters;
#pragma unroll
    for (int e = 1; e >= 0; e--)
      if (is_valid(2 * n + e) && !exceeds(top, own(c, r, 2 * n + e))) first[n] = (n * 8 + lane * 2 + e) % p.group;
    for (int apart = 1; apart <= 2; apart *= 2) {
      const int other = __shfl_xor_sync(~0u, first[n], apart);
      if (p.group > 2 * apart) first[n] = other < first[n] ? other : first[n];
    }
  }
  unsigned closest = 0;
#pragma unroll
  for (int n = 0; n < kSlotFragments; n++) {
    const int winner = p.group > 8 && first[n ^ 1] < first[n] ? first[n ^ 1] : first[n];
#pragma unroll
    for (int e = 0; e < 2; e++)
      if ((n * 8 + lane * 2 + e) % p.group == winner) closest |= 1u << (2 * n + e);
  }
  return closest;
}

// Products to cosines, in place, and which of them count.
template <bool Plain>
__device__ __forceinline__ void to_rivals(const Problem& p, int64_t tile, const Place& at, const OwnRows& rows,
                                          Accumulators& acc, const SlotNumbers& slots, Rivals& rivals) {
  unsigned valid = 0;
  const bool clamp = p.normalize_x && p.normalize_w;
  int class_[kOwnSlots];
#pragma unroll
  for (int s = 0; s < kOwnSlots; s++) {
    const Slot slot = slot_of(p, tile, at.slot(s));
    if (slot.valid) valid |= 1u << s;
    class_[s] = int(slot.class_);
    const float factor = slots.inverse[at.slot(s)];
#pragma unroll
    for (int r = 0; r < kOwnRows; r++) own(acc, r, s) *= factor;
  }
#pragma unroll
  for (int r = 0; r < kOwnRows; r++) {
    rivals[r] = valid;
    if (!Plain && p.group > 1) rivals[r] &= closest_centers(p, acc, r, valid);
    const int target = rows.target(r);
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++) {
      if (class_[s] == target) rivals[r] &= ~(1u << s);
      const float c = own(acc, r, s);
      if (clamp) own(acc, r, s) = c < -1.0f ? -1.0f : c > 1.0f ? 1.0f : c;
    }
  }
}

// Without a rule, a bias, sub-centres or sums beyond the log-sum-exp.
inline bool is_plain(const Problem& p) {
  return p.rule == RuleCode::identity && p.reduction == Reduction::logsumexp && p.group == 1 && !p.bias.data &&
         !(p.want & (kSum | kStats | kDscale));
}

}  // namespace gpu
}  // namespace fused_margin
