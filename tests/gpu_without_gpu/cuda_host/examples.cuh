// Small kernels on the wrappers of csrc/cuda/arch.cuh, right and with one planted bug each: what the proof tools must
// find before their silence on the real kernels means anything. For nvcc and for the simulator.
#pragma once

#include ARCH  // csrc/cuda/arch.cuh, or the simulator's

namespace fused_margin {

enum class Bug { none, no_barrier, no_wait, early_fetch };

template <class F>
__device__ float reduce_warp(float v, F f) {
  for (int o = 16; o; o >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

template <Bug bug, class F>
__device__ float reduce_block(float v, float init, float* shared, F f) {  // shared: 32 floats
  v = reduce_warp(v, f);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!lane) shared[warp] = v;
  __syncthreads();
  v = reduce_warp(lane < int(blockDim.x / 32) ? shared[lane] : init, f);
  if (bug != Bug::no_barrier) __syncthreads();  // shared is used again by the next reduction
  return v;
}

// One row of cosines a block: lse = log sum_j exp(s c_j)
template <Bug bug>
__global__ void row_lse(const float* cos, float* lse, int classes, float s) {
  float* shared = dynamic_shared<float>();
  const float* c = cos + int64_t(blockIdx.x) * classes;
  float top = -INFINITY, sum = 0.f;
  for (int j = threadIdx.x; j < classes; j += blockDim.x) top = fmaxf(top, s * c[j]);
  top = reduce_block<bug>(top, -INFINITY, shared, [](float a, float b) { return fmaxf(a, b); });
  for (int j = threadIdx.x; j < classes; j += blockDim.x) sum += exp2_fast((s * c[j] - top) * 1.44269504f);
  sum = reduce_block<bug>(sum, 0.f, shared, [](float a, float b) { return a + b; });
  if (!threadIdx.x) lse[blockIdx.x] = top + log2_fast(sum) * 0.69314718f;
}

constexpr int kTile = 32, kStages = 3, kStride = kTile + 8, kStage = 2 * kTile * kStride;

// D[M, N] = A[M, K] B in tiles of 32 x 32 by four warps; B is [N, K], or [K, N] if transposed. K % 8 == 0, N % 8 == 0.
template <class T, bool transposed, Bug bug>
__global__ void product(const T* A, const T* B, float* D, int M, int N, int K) {
  T* shared = dynamic_shared<T>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = (K + kTile - 1) / kTile;
  const int row0 = blockIdx.x * kTile, col0 = blockIdx.y * kTile;
  const auto fetch = [&](int step) {
    T* to = shared + step % kStages * kStage;
    for (int i = threadIdx.x; step < steps && i < 2 * kTile * kTile / 8; i += blockDim.x) {
      const int r = i / 4 % kTile, c = i % 4 * 8, depth = step * kTile;
      const bool of_a = i < kTile * kTile / 8;
      const int row = of_a ? row0 + r : transposed ? depth + r : col0 + r;
      const int col = of_a || !transposed ? depth + c : col0 + c;
      const int rows = of_a ? M : transposed ? K : N, columns = of_a || !transposed ? K : N;
      const bool valid = row < rows && col < columns;
      const T* from = of_a ? A : B;
      copy_async_16(to + (of_a ? r : kTile + r) * kStride + c, valid ? from + int64_t(row) * columns + col : from,
                    valid);
    }
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; step++) fetch(step);
  float d[2][4] = {};
  for (int step = 0; step < steps; step++) {
    if (bug == Bug::early_fetch) fetch(step + kStages - 1);
    if (bug != Bug::no_wait) copy_wait<kStages - 2 + (bug == Bug::early_fetch)>();
    if (bug != Bug::no_barrier) __syncthreads();
    if (bug != Bug::early_fetch) fetch(step + kStages - 1);
    const T *a = shared + step % kStages * kStage + warp / 2 * 16 * kStride,
            *b = shared + step % kStages * kStage + kTile * kStride;
    const int n0 = warp % 2 * 16;
    for (int k = 0; k < kTile; k += 16) {
      uint32_t left[4], right[4];
      load_matrices(left, a + lane % 16 * kStride + k + lane / 16 * 8);
      const int n = n0 + lane / 16 * 8, depth = k + lane / 8 % 2 * 8;
      if (transposed)
        load_matrices_transposed(right, b + (depth + lane % 8) * kStride + n);
      else
        load_matrices(right, b + (n + lane % 8) * kStride + depth);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
      multiply_add<T>(d[0], left, first);
      multiply_add<T>(d[1], left, second);
    }
  }
  copy_wait<0>();
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) {
      const int row = row0 + warp / 2 * 16 + lane / 4 + e / 2 * 8;
      const int col = col0 + warp % 2 * 16 + j * 8 + lane % 4 * 2 + e % 2;
      if (row < M && col < N) D[int64_t(row) * N + col] = d[j][e];
    }
}

// D[16, 8] = A[16, 8] B[8, 8]^T of one warp; rounded: operands to nearest tf32, else as the hardware cuts them.
template <bool rounded>
__global__ void product_tf32(const float* A, const float* B, float* D) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto operand = [](float v) { return rounded ? round_to_tf32(v) : __float_as_uint(v); };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = operand(A[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; i++) b[i] = operand(B[g * 8 + t + i * 4]);
  float d[4] = {};
  multiply_add_tf32(d, a, b);
  for (int e = 0; e < 4; e++) D[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = d[e];
}

// Conversions and fast mathematics, one number a thread.
template <class T>
__global__ void convert(const float* x, T* narrow, uint32_t* pairs, float* wide, float* exponential, float* logarithm) {
  const int i = threadIdx.x;
  narrow[i] = from_float<T>(x[i]);
  pairs[i] = pack<T>(x[i], -x[i]);
  wide[i] = to_float(narrow[i]);
  exponential[i] = exp2_fast(x[i]);
  logarithm[i] = log2_fast(x[i]);
}

}  // namespace fused_margin
