// The wrappers of csrc/cuda/arch.cuh on the simulator: same names, same signatures, the layouts of the PTX ISA.
//
// An asynchronous copy lands when it is waited for (seed 0), at once (seed 1), or by chance at either time: a wait that
// is missing leaves poison or old data behind, a barrier that is missing lets it overwrite what is still read.
//
// Sums of tensor-core products are float32's, or if asked truncated as hardware does it.
#pragma once

#include "cuda_names.h"
#include "numbers.h"

namespace fused_margin {

// Launches and memory

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cusim::sim().shared);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, A... args) {
  if constexpr (sizeof...(A) == 1)
    if (cusim::sim().hook) {
      const unsigned size[] = {grid.x, grid.y, grid.z};
      const auto call = [&](const auto& argument) {
        return cusim::sim().hook(reinterpret_cast<const void*>(kernel), size, threads, shared_bytes, &argument,
                                 sizeof argument);
      };
      return call(args...) ? cudaErrorLaunchFailure : cudaSuccess;
    }
  cusim::run_grid(grid, dim3(threads), shared_bytes, [=] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace fused_margin

namespace cusim {

inline void land(const Copy& c) {
  if (c.source)
    memcpy(c.target, c.source, c.bytes);
  else
    memset(c.target, 0, c.bytes);
}

inline bool by_chance(bool at_seed_0_or_1) {
  Quiet quiet;
  return sim().seed > 1 ? sim().random() % 2 : at_seed_0_or_1;
}

CUSIM_HOOK copy_async(void* target, const void* source, int bytes, bool valid) {
  Simulator& s = sim();
  if (reinterpret_cast<uintptr_t>(target) % bytes || (valid && reinterpret_cast<uintptr_t>(source) % bytes))
    throw Error("cusim: an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to its size");
  note_write(target, bytes);  // may happen from now on
  if (valid) note_read(source, bytes);
  const Copy copy{target, valid ? source : nullptr, bytes};
  if (by_chance(s.seed == 1)) land(copy);
  Quiet quiet;
  s.current->copies.push_back(copy);  // landing twice changes nothing in a right kernel
}

inline void commit() {
  Quiet quiet;
  Fiber& f = *sim().current;
  size_t committed = 0;
  for (const size_t n : f.groups) committed += n;
  f.groups.push_back(f.copies.size() - committed);
}

inline void wait_for_groups(size_t left) {
  Fiber& f = *sim().current;
  while (f.groups.size() > left) {
    const size_t n = f.groups.front();
    for (size_t i = 0; i < n; i++) land(f.copies[i]);
    Quiet quiet;
    f.copies.erase(f.copies.begin(), f.copies.begin() + n);
    f.groups.erase(f.groups.begin());
  }
}

// ldmatrix: lane 8 i + r reads row r of matrix i, 16 bytes; lane l gets elements 2 (l % 4) and + 1 of row l / 4 of each
// matrix, of its transpose if asked.
template <int N>
void load_matrices(uint32_t (&r)[N], const void* row, bool transposed, int line) {
  struct Row {
    uint16_t v[8];
  };
  struct In {
    Row row;
    bool transposed;
  } in;
  if (lane() < 8 * N) {
    if (reinterpret_cast<uintptr_t>(row) % 16) throw Error("cusim: a row of ldmatrix is not aligned to 16 bytes");
    memcpy(&in.row, row, 16);
  }
  in.transposed = transposed;
  const Combine spread = [](const Arrived& a) {
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < N; i++) {
        const auto at = [&](int r, int c) { return uint32_t(static_cast<const In*>(a.in[8 * i + r])->row.v[c]); };
        const int major = l / 4, minor = l % 4 * 2;
        static_cast<uint32_t*>(a.out[l])[i] = static_cast<const In*>(a.in[l])->transposed
                                                  ? at(minor, major) | at(minor + 1, major) << 16
                                                  : at(major, minor) | at(major, minor + 1) << 16;
      }
  };
  together(~0u, &in, r, spread, "ldmatrix", line);
}

struct Bf16Pair {
  static constexpr int kValues = 2;
  static float get(uint32_t bits, int i) { return bf16_value(uint16_t(bits >> 16 * i)); }
};
struct HalfPair {
  static constexpr int kValues = 2;
  static float get(uint32_t bits, int i) { return half_value(uint16_t(bits >> 16 * i)); }
};
struct Tf32 {
  static constexpr int kValues = 1;
  static float get(uint32_t bits, int) { return tf32_value(bits); }
};

// What a tensor core may make of c + sum a_k b_k: it takes half of the products at a time, drops what a term has two bits
// or more below the last one of the largest, and what their sum has beyond float32. The A100's way as arXiv 2512.07004
// describes it; newer units keep more.
template <int N>
float truncated_sum(float c, const float (&products)[N]) {
  for (int first = 0; first < N; first += N / 2) {
    float largest = std::fabs(c);
    for (int k = first; k < first + N / 2; k++) largest = std::max(largest, std::fabs(products[k]));
    if (!(largest > 0) || std::isinf(largest)) continue;
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
    double sum = std::trunc(c / unit);
    for (int k = first; k < first + N / 2; k++) sum += std::trunc(products[k] / unit);
    sum *= unit;
    c = float(sum);
    if (std::fabs(c) > std::fabs(sum)) c = std::nextafter(c, 0.0f);
  }
  return c;
}

// mma.sync.m16n8kK.row.col: with g = lane / 4, t = lane % 4 and V values a register, register i of A holds row
// g + 8 (i % 2), columns V (t + 4 (i / 2)) and on; register i of B rows V (t + 4 i) and on of column g; d[e] is row
// g + 8 (e / 2), column 2 t + e % 2.
template <class Values>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  struct In {
    uint32_t a[4], b[2];
    float d[4];
  } in;
  memcpy(in.a, a, sizeof in.a);
  memcpy(in.b, b, sizeof in.b);
  memcpy(in.d, d, sizeof in.d);
  const Combine multiply = [](const Arrived& arrived) {
    constexpr int V = Values::kValues, K = 8 * V;
    float left[16][K], right[K][8];
    for (int l = 0; l < kWarp; l++) {
      const In& v = *static_cast<const In*>(arrived.in[l]);
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < V; k++) left[l / 4 + 8 * (i % 2)][V * (l % 4 + 4 * (i / 2)) + k] = Values::get(v.a[i], k);
      for (int i = 0; i < 2; i++)
        for (int k = 0; k < V; k++) right[V * (l % 4 + 4 * i) + k][l / 4] = Values::get(v.b[i], k);
    }
    for (int row = 0; row < 16; row++) {
      float sum[8] = {};
      for (int k = 0; k < K; k++)
        for (int col = 0; col < 8; col++) sum[col] += left[row][k] * right[k][col];
      for (int col = 0; col < 8; col++) {
        const int l = row % 8 * 4 + col / 2, e = row / 8 * 2 + col % 2;
        const float before = static_cast<const In*>(arrived.in[l])->d[e];
        float& out = static_cast<float*>(arrived.out[l])[e];
        if (!sim().truncates) {
          out = before + sum[col];
        } else {
          float products[K];
          for (int k = 0; k < K; k++) products[k] = left[row][k] * right[k][col];
          out = truncated_sum(before, products);
        }
      }
    }
  };
  together(~0u, &in, d, multiply, "mma.sync", line);
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

}  // namespace cusim

namespace fused_margin {

inline int any_of_block(int predicate, CUSIM_LINE) { return __syncthreads_or(predicate, line); }

// Asynchronous copies

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  cusim::copy_async(shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid = true) {
  cusim::copy_async(shared, global, 4, valid);
}
inline void copy_commit() { cusim::commit(); }
template <int N>
void copy_wait() {
  cusim::wait_for_groups(N);
}

// Tensor cores

template <int N>
void load_matrices(uint32_t (&r)[N], const void* shared_row, CUSIM_LINE) {
  cusim::load_matrices(r, shared_row, false, line);
}
template <int N>
void load_matrices_transposed(uint32_t (&r)[N], const void* shared_row, CUSIM_LINE) {
  cusim::load_matrices(r, shared_row, true, line);
}
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUSIM_LINE) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, cusim::HalfPair, cusim::Bf16Pair>;
  cusim::multiply_add<Pair>(d, a, b, line);
}
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUSIM_LINE) {
  cusim::multiply_add<cusim::Tf32>(d, a, b, line);
}

// Numbers

inline uint32_t round_to_tf32(float x) { return (__float_as_uint(x) + 0x1000) & 0xffffe000; }
template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(T(low).bits) | uint32_t(T(high).bits) << 16;
}
template <class T>
T from_float(float x) {
  return T(x);
}
template <class T>
float to_float(T x) {
  return float(x);
}
inline float exp2_fast(float x) { return cusim::flushed(std::exp2(cusim::flushed(x))); }
inline float log2_fast(float x) { return std::log2(cusim::flushed(x)); }

}  // namespace fused_margin
