// What the kernels on single rows share: a warp takes a row, lane l its columns l, l + 32, ...; and small blocks of it.
#pragma once

#include "launchers.h"
#include "tile.cuh"

namespace fused_margin {
namespace gpu {

constexpr int kRowThreads = 128, kRowsOfBlock = kRowThreads / 32;
constexpr int kBusyBlocks = 5;  // at least, on a multiprocessor, of kernels that wait for memory only: 96 registers

__device__ __forceinline__ int lane_of() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int64_t row_of_warp() { return int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32; }

template <class F>
__device__ __forceinline__ void each_column(int64_t dim, const F& f) {
#pragma unroll 4
  for (int64_t d = lane_of(); d < dim; d += 32) f(d);
}

// use(d, read(d)) for them, some being read before any is used: a store to memory that the compiler cannot tell from
// what is read next would make each column wait for its own reads.
template <class Read, class Use>
__device__ __forceinline__ void each_column_ahead(int64_t dim, const Read& read, const Use& use) {
  constexpr int kAhead = 4;
  int64_t d = lane_of();
  for (; d + 32 * (kAhead - 1) < dim; d += 32 * kAhead) {
    decltype(read(d)) found[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k++) found[k] = read(d + 32 * k);
#pragma unroll
    for (int k = 0; k < kAhead; k++) use(d + 32 * k, found[k]);
  }
  for (; d < dim; d += 32) use(d, read(d));
}

// The same bits in every lane.
__device__ __forceinline__ float over_warp(float v) {
  for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
  return v;
}
__device__ __forceinline__ float largest_of_warp(float v) {
  for (int apart = 16; apart; apart /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, apart));
  return v;
}

__device__ __forceinline__ float at(const Matrix& m, int64_t row, int64_t d) {
  return read(m.data, m.storage, row * m.row + d * m.col);
}
__device__ __forceinline__ float at(const Vector& v, int64_t i) { return read(v.data, v.storage, i * v.step); }

// The tensors that kernels write are ours to write: their descriptions are shared with those that are read.
__device__ __forceinline__ void write(const void* data, Storage storage, int64_t at, float v) {
  void* to = const_cast<void*>(data);
  switch (storage) {
    case Storage::bf16:
      static_cast<__nv_bfloat16*>(to)[at] = from_float<__nv_bfloat16>(v);
      break;
    case Storage::f16:
      static_cast<__half*>(to)[at] = from_float<__half>(v);
      break;
    default:
      static_cast<float*>(to)[at] = v;
  }
}

// The label's class in this shard, or -1; and whether the row takes part.
struct Target {
  int64_t class_;
  bool counts;
};
__device__ __forceinline__ Target target_of(const Problem& p, int64_t i) {
  if (i >= p.batch) return {-1, false};
  const int64_t label = p.labels[i * p.label_step];
  const bool counts = label != p.ignore_index;
  const bool here = counts && label >= p.first_class && label < p.first_class + p.classes;
  return {here ? label - p.first_class : -1, counts};
}

// Row i of x: what it is multiplied by to become x_hat, 0 where it takes no part; and whether its norm has a slope.
struct UnitRow {
  float inverse;
  bool slope;
};
__device__ __forceinline__ UnitRow unit_row(const Problem& p, int64_t i, bool counts) {
  if (!counts) return {0.0f, false};
  if (!p.normalize_x) return {1.0f, false};
  float square = 0;
  each_column(p.dim, [&](int64_t d) { square = fmaf(at(p.x, i, d), at(p.x, i, d), square); });
  square = over_warp(square);
  return {inverse_norm(square), sqrtf(square) >= kEps};
}

// x_hat, which is 0 in a row that takes no part even if x holds NaN there.
__device__ __forceinline__ float unit_value(const Problem& p, int64_t i, int64_t d, float inverse, bool counts) {
  return counts ? at(p.x, i, d) * inverse : 0.0f;
}

// The cosine of row i with its target, and the target's row among those read: of a class's sub-centres the first maximum.
struct Closest {
  float cosine;
  int64_t row;
};
__device__ __forceinline__ Closest closest_center(const Problem& p, int64_t i, const Target& y, float inverse) {
  Closest best = {0.0f, -1};
  if (y.class_ < 0) return best;
  for (int center = 0; center < p.sub_centers; center++) {
    const int64_t row = y.class_ * p.sub_centers + center, source = source_row(p, row);
    float dot = 0, square = 0;
    each_column(p.dim, [&](int64_t d) {
      const float w = at(p.w, source, d);
      dot = fmaf(at(p.x, i, d) * inverse, w, dot);
      square = fmaf(w, w, square);
    });
    float c = over_warp(dot);
    square = over_warp(square);
    if (p.normalize_w) c *= inverse_norm(square);
    if (best.row < 0 || exceeds(c, best.cosine)) best = {c, row};
  }
  return best;
}

// One warp a row; nothing where there are none.
template <class Args>
cudaError_t launch_rows(void (*kernel)(Args), int64_t rows, cudaStream_t stream, const Args& args) {
  const int64_t blocks = div_up(rows, kRowsOfBlock);
  return blocks ? launch(kernel, dim3(unsigned(blocks)), kRowThreads, 0, stream, args) : cudaSuccess;
}

}  // namespace gpu
}  // namespace fused_margin
