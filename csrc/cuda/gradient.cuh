// The backward's sweep over a chunk of classes: its G, and the column sums that are the gradient of the bias.
//
//   G_ij = (p_i A_ij + q_i) N'_ij    in the operands' type; f_i = s_i g_i goes into x or into the row's end
#pragma once

#include "launchers.h"
#include "rival.cuh"

namespace fused_margin {
namespace gpu {

// What G takes of a thread's rows: 2^(e - power - rest) is A, and G is (share A + more) N'.
struct Coefficients : OwnRows {
  const float* numbers;

  __device__ Coefficients(const Gradient& g, int64_t block, const Place& at)
      : OwnRows(g.p, block, at), numbers(g.coefficients + first) {}
  __device__ float number(int k, int r) const { return numbers[k * p.padded + 8 * r]; }
  __device__ float power(int r) const { return number(0, r); }
  __device__ float rest(int r) const { return number(1, r); }
  __device__ float share(int r) const { return number(2, r); }
  __device__ float more(int r) const { return number(3, r); }
  __device__ float unit(int r) const { return number(5, r); }
};

template <class T, bool Plain>
class ToGradient {
 public:
  __device__ ToGradient(const Gradient& g, int64_t block) : g_(g), p_(g.p), block_(block) {}

  __device__ __forceinline__ void operator()(int64_t tile, Accumulators& c, const SlotNumbers& slots) {
    const Coefficients rows(g_, block_, at_);
    Rivals rivals;
    to_rivals<Plain>(p_, tile, at_, rows, c, slots, rivals);
    if constexpr (Plain) {
#pragma unroll
      for (int r = 0; r < kOwnRows; r++) {
        const float hi = rows.scale_hi(r), lo = rows.scale_lo(r), power = rows.power(r), rest = rows.rest(r);
        const float share = rows.share(r), more = rows.more(r);
#pragma unroll
        for (int s = 0; s < kOwnSlots; s++) {
          const float e = exponent(own(c, r, s), hi, lo, 0, power) - rest;
          own(c, r, s) = rivals[r] >> s & 1 ? share * exp2_fast(e) + more : 0.0f;
        }
      }
    } else {
      general(rows, tile, c, slots, rivals);
    }
    if (g_.gradient) store(tile, c);
  }

 private:
  __device__ __forceinline__ void general(const Coefficients& rows, int64_t tile, Accumulators& c,
                                          const SlotNumbers& slots, const Rivals& rivals) {
    float column[kOwnSlots] = {};
#pragma unroll
    for (int r = 0; r < kOwnRows; r++) {
      const float hi = rows.scale_hi(r), lo = rows.scale_lo(r), tau = rows.tau(r), scale = rows.scale(r);
      const float power = rows.power(r), rest = rows.rest(r), share = rows.share(r), more = rows.more(r);
      const float unit = rows.unit(r);
#pragma unroll
      for (int s = 0; s < kOwnSlots; s++) {
        Rival<float> n = {own(c, r, s), 1.0f};
        const float bias = slots.bias[at_.slot(s)];
        if (p_.rule != RuleCode::identity) n = any_rival(p_.rule, n.value, tau, p_.args);
        const float weight = p_.reduction == Reduction::softplus
                                 ? any_softplus(scale * n.value + bias).slope
                                 : exp2_fast(exponent(n.value, hi, lo, bias * kLog2e, power) - rest);
        const float g = rivals[r] >> s & 1 ? share * weight + more : 0.0f;
        column[s] += g * unit;
        own(c, r, s) = p_.unit_slope ? g : g * n.slope;
      }
    }
    if (g_.bias_parts) store_columns(tile, column);
  }

  // Sums over the rows of a warp, always in the same order; bias_parts [kBiasParts * blocks, slots of the chunk]
  __device__ __forceinline__ void store_columns(int64_t tile, float (&column)[kOwnSlots]) {
    float* to = g_.bias_parts + (block_ * kBiasParts + at_.warp_row) * (g_.tiles * kSlots);
    to += (tile - g_.first_tile) * kSlots;
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++) {
      for (int apart = 4; apart < 32; apart *= 2) column[s] += __shfl_xor_sync(~0u, column[s], apart);
      if (at_.lane < 4) to[at_.slot(s)] = column[s];
    }
  }

  __device__ __forceinline__ void store(int64_t tile, Accumulators& g) {
    const int64_t first_row = g_.first_tile * (kSlots / p_.group) * p_.sub_centers;
    const float unit = kStorage<T> == Storage::f16 ? kHalfUnit : 1.0f;
#pragma unroll
    for (int s = 0; s < kOwnSlots; s += 2) {
      const Slot one = slot_of(p_, tile, at_.slot(s)), two = slot_of(p_, tile, at_.slot(s + 1));
      const int64_t column = one.row - first_row;
      const bool both = one.valid && two.valid && two.row == one.row + 1 && column % 2 == 0 && g_.columns % 2 == 0;
#pragma unroll
      for (int r = 0; r < kOwnRows; r++) {
        const int64_t i = block_ * kRows + at_.row(r);
        if (i >= p_.batch) continue;
        T* to = static_cast<T*>(g_.gradient) + i * g_.columns;
        const float a = own(g, r, s) * unit, b = own(g, r, s + 1) * unit;
        if (both) {
          store_pair(to + column, a, b);
        } else {
          if (one.valid) to[column] = from_float<T>(a);
          if (two.valid) to[two.row - first_row] = from_float<T>(b);
        }
      }
    }
  }

  __device__ __forceinline__ static void store_pair(T* to, float a, float b) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float2*>(to) = make_float2(a, b);
    else
      *reinterpret_cast<uint32_t*>(to) = pack<T>(a, b);
  }

  const Gradient& g_;
  const Problem& p_;
  const int64_t block_;
  const Place at_;
};

template <class T, bool Plain>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(const Gradient g) {
  const int64_t blocks = g.p.padded / kRows, block = blockIdx.x % blocks, split = blockIdx.x / blocks;
  ToGradient<T, Plain> to_gradient(g, block);
  Tiles<T>(g.p, block)
      .run(g.first_tile + split * g.tiles / g.splits, g.first_tile + (split + 1) * g.tiles / g.splits, to_gradient);
}

template <class T>
cudaError_t run_gradient(const Gradient& g, cudaStream_t stream) {
  const dim3 grid(unsigned(g.p.padded / kRows * g.splits));
  const size_t bytes = Tiles<T>::shared_bytes(g.p.w.storage);
  return is_plain(g.p) && !g.bias_parts ? launch(gradient_kernel<T, true>, grid, kThreads, bytes, stream, g)
                                        : launch(gradient_kernel<T, false>, grid, kThreads, bytes, stream, g);
}

}  // namespace gpu
}  // namespace fused_margin
