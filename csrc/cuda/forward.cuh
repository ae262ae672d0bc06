// The forward: a block of rows of x through one split of the class tiles.
//
//   sum_i = sum_j 2^(log2(e) u_ij - K_i)    K_i the whole number next to the largest exponent so far
//
// K is whole, so that rescaling rounds nothing; sums over tiles are compensated. Each thread carries its own rows' sums
// of its own slots; four lanes are merged at the end, the parts by `merge_kernel`.
#pragma once

#include "launchers.h"
#include "rival.cuh"

namespace fused_margin {
namespace gpu {

// What sums beyond the log-sum-exp a sweep carries; nothing in a plain one.
template <bool Plain>
struct MoreSums {
  float best[kOwnRows], count[kOwnRows] = {}, masked[kOwnRows] = {}, mean_v[kOwnRows] = {}, sum_v[kOwnRows] = {},
                        sum_bias[kOwnRows] = {};

  __device__ MoreSums() {
#pragma unroll
    for (int r = 0; r < kOwnRows; r++) best[r] = -INFINITY;
  }
};
template <>
struct MoreSums<true> {};

template <bool Plain>
class RowSums {
 public:
  __device__ RowSums(const Problem& p, int64_t block) : p_(p), block_(block) {
#pragma unroll
    for (int r = 0; r < kOwnRows; r++) power_[r] = kNoPower;
  }

  __device__ __forceinline__ void operator()(int64_t tile, Accumulators& c, const SlotNumbers& slots) {
    const OwnRows rows(p_, block_, at_);
    Rivals rivals;
    to_rivals<Plain>(p_, tile, at_, rows, c, slots, rivals);
    const auto bias = [&](int s) { return Plain ? 0.0f : slots.bias[at_.slot(s)]; };
#pragma unroll
    for (int r = 0; r < kOwnRows; r++) {
      if constexpr (!Plain) look(rows, c, r, rivals[r], bias);
      if (Plain || p_.reduction == Reduction::logsumexp)
        add_exponentials(rows, c, r, rivals[r], bias);
      else
        add_softplus(rows, c, r, rivals[r], bias);
    }
  }

  // state [padded, parts, kStates]
  __device__ void store(float* state, int64_t split, int64_t splits) {
    const int64_t parts = kPartsOfSplit * splits, part = kPartsOfSplit * split + at_.warp_col;
#pragma unroll
    for (int r = 0; r < kOwnRows; r++) {
      float top = power_[r];
      for (int apart = 1; apart <= 2; apart *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
      const float factor = exp2_fast(power_[r] - top);
      float out[kStates] = {top, over_quad(total_[r] * factor), over_quad(low_[r] * factor), -INFINITY};
      if constexpr (!Plain) {
        out[3] = more_.best[r];
        for (int apart = 1; apart <= 2; apart *= 2) out[3] = fmaxf(out[3], __shfl_xor_sync(~0u, out[3], apart));
        out[4] = over_quad(more_.count[r]), out[5] = over_quad(more_.masked[r]);
        out[6] = over_quad(more_.mean_v[r] * factor), out[7] = over_quad(more_.sum_v[r]);
        out[8] = over_quad(more_.sum_bias[r]);
      }
      float* to = state + ((block_ * kRows + at_.row(r)) * parts + part) * kStates;
      if (at_.lane % 4 == 0)
        for (int k = 0; k < kStates; k++) to[k] = out[k];
    }
  }

 private:
  __device__ static float over_quad(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  }

  // Sums that are not weighted by A; then N(c) in the place of c.
  template <class Bias>
  __device__ __forceinline__ void look(const OwnRows& rows, Accumulators& c, int r, unsigned rivals, const Bias& bias) {
    const float tau = rows.tau(r), scale = rows.scale(r);
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++) {
      const float cosine = own(c, r, s);
      const bool counts = rivals >> s & 1;
      const float v = p_.rule == RuleCode::identity ? cosine : any_rival(p_.rule, cosine, tau, p_.args).value;
      own(c, r, s) = v;
      if (!counts) continue;
      more_.best[r] = fmaxf(more_.best[r], p_.bias.data ? cosine + bias(s) / scale : cosine);
      if (cosine > tau) more_.count[r] += 1, more_.masked[r] += cosine;
      more_.sum_v[r] += v, more_.sum_bias[r] += bias(s);
    }
  }

  template <class Bias>
  __device__ __forceinline__ void add_exponentials(const OwnRows& rows, Accumulators& v, int r, unsigned rivals,
                                                   const Bias& bias) {
    const float hi = rows.scale_hi(r), lo = rows.scale_lo(r);
    float top = kNoPower;
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++)
      if (rivals >> s & 1) top = fmaxf(top, own(v, r, s) * hi + bias(s) * kLog2e);
    const float raised = fmaxf(power_[r], floorf(top + 0.5f)), shrink = exp2_fast(power_[r] - raised);
    power_[r] = raised;
    float sum = 0, mean = 0;
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++) {
      const float e = exponent(own(v, r, s), hi, lo, bias(s) * kLog2e, raised);
      const float weight = exp2_fast(rivals >> s & 1 ? e : -INFINITY);
      sum += weight;
      if constexpr (!Plain) mean += rivals >> s & 1 ? weight * own(v, r, s) : 0.0f;
    }
    total_[r] *= shrink, low_[r] *= shrink;
    two_sum(total_[r], low_[r], sum);
    if constexpr (!Plain) more_.mean_v[r] = more_.mean_v[r] * shrink + mean;
  }

  template <class Bias>
  __device__ __forceinline__ void add_softplus(const OwnRows& rows, Accumulators& v, int r, unsigned rivals,
                                               const Bias& bias) {
    const float scale = rows.scale(r);
    float sum = 0, mean = 0;
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++) {
      const Transformed<float> l = any_softplus(scale * own(v, r, s) + bias(s));
      sum += rivals >> s & 1 ? l.value : 0.0f;
      if constexpr (!Plain) mean += rivals >> s & 1 ? l.slope * own(v, r, s) : 0.0f;
    }
    two_sum(total_[r], low_[r], sum);
    if constexpr (!Plain) more_.mean_v[r] += mean;
  }

  const Problem& p_;
  const int64_t block_;
  const Place at_;
  float power_[kOwnRows], total_[kOwnRows] = {}, low_[kOwnRows] = {};
  MoreSums<Plain> more_;
};

template <class T, bool Plain>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const Forward f) {
  const int64_t blocks = f.p.padded / kRows, block = blockIdx.x % blocks, split = blockIdx.x / blocks;
  RowSums<Plain> sums(f.p, block);
  Tiles<T>(f.p, block).run(split * f.tiles / f.splits, (split + 1) * f.tiles / f.splits, sums);
  sums.store(f.state, split, f.splits);
}

template <class T>
cudaError_t run_forward(const Forward& f, cudaStream_t stream) {
  const dim3 grid(unsigned(f.p.padded / kRows * f.splits));
  const size_t bytes = Tiles<T>::shared_bytes(f.p.w.storage);
  return is_plain(f.p) ? launch(forward_kernel<T, true>, grid, kThreads, bytes, stream, f)
                       : launch(forward_kernel<T, false>, grid, kThreads, bytes, stream, f);
}

}  // namespace gpu
}  // namespace fused_margin
