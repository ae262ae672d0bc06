// CUDA's names on the simulator: qualifiers, indices, barriers, warp functions, atomics, vectors, fast mathematics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block at a time on one OS thread; ThreadSanitizer needs dynamic shared memory
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#ifndef __noinline__
#define __noinline__ __attribute__((noinline))
#endif

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;  // of either: few blocks, so that one has several tiles
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "simulated error"; }

#define threadIdx (cusim::sim().current->tid)
#define blockIdx (cusim::sim().index)
#define blockDim (cusim::sim().block)
#define gridDim (cusim::sim().grid)
#define CUSIM_LINE int line = __builtin_LINE()
constexpr int warpSize = 32;

#define CUSIM_VECTOR(T, name)                                                        \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUSIM_VECTOR(float, float)
CUSIM_VECTOR(int, int)
CUSIM_VECTOR(unsigned, uint)
CUSIM_VECTOR(short, short)
CUSIM_VECTOR(unsigned short, ushort)
struct alignas(16) double2 {
  double x, y;
};

inline void __syncthreads(CUSIM_LINE) { cusim::block_barrier(false, "__syncthreads", line); }
inline int __syncthreads_or(int p, CUSIM_LINE) { return cusim::block_barrier(p, "__syncthreads_or", line); }
inline void __syncwarp(unsigned m = ~0u, CUSIM_LINE) {
  cusim::together(m, nullptr, nullptr, nullptr, "__syncwarp", line);
}

namespace cusim {

template <class T>
struct Shuffled {
  T value;
  int source;
};

template <class T>
T shuffle(unsigned mask, T value, int source, const char* what, int line) {
  static_assert(std::is_trivially_copyable_v<T>);
  const Shuffled<T> in{value, source};
  T out;
  const Combine take = [](const Arrived& a) {
    for (int k = 0; k < kWarp; k++) {
      if (!a.in[k]) continue;
      const int from = static_cast<const Shuffled<T>*>(a.in[k])->source;
      if (a.in[from])
        memcpy(a.out[k], &static_cast<const Shuffled<T>*>(a.in[from])->value, sizeof(T));
      else
        memset(a.out[k], kPoison, sizeof(T));  // a lane outside the mask
    }
  };
  together(mask, &in, &out, take, what, line);
  return out;
}

template <class T, class F>
T reduce_warp(unsigned mask, T value, F, const char* what, int line) {
  T out;
  const Combine all = [](const Arrived& a) {
    bool first = true;
    T total{};
    for (int k = 0; k < kWarp; k++) {
      if (!a.in[k]) continue;
      const T v = *static_cast<const T*>(a.in[k]);
      total = first ? v : F{}(total, v);
      first = false;
    }
    for (int k = 0; k < kWarp; k++)
      if (a.out[k]) *static_cast<T*>(a.out[k]) = total;
  };
  together(mask, &value, &out, all, what, line);
  return out;
}

struct Sum {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smallest {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

}  // namespace cusim

template <class T>
T __shfl_xor_sync(unsigned m, T v, int o, int w = 32, CUSIM_LINE) {
  const int l = cusim::lane(), s = l ^ o;
  return cusim::shuffle(m, v, (s & ~(w - 1)) > (l | (w - 1)) ? l : s, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned o, int w = 32, CUSIM_LINE) {
  const int l = cusim::lane();
  return cusim::shuffle(m, v, (l & (w - 1)) + int(o) < w ? l + int(o) : l, "__shfl_down_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned o, int w = 32, CUSIM_LINE) {
  const int l = cusim::lane();
  return cusim::shuffle(m, v, (l & (w - 1)) >= int(o) ? l - int(o) : l, "__shfl_up_sync", line);
}
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32, CUSIM_LINE) {
  return cusim::shuffle(m, v, (cusim::lane() & ~(w - 1)) | (s & (w - 1)), "__shfl_sync", line);
}
inline unsigned __ballot_sync(unsigned m, int p, CUSIM_LINE) {
  return cusim::reduce_warp(m, p ? 1u << cusim::lane() : 0u, cusim::Sum{}, "__ballot_sync", line);
}
inline int __any_sync(unsigned m, int p, CUSIM_LINE) { return __ballot_sync(m, p, line) != 0; }
inline int __all_sync(unsigned m, int p, CUSIM_LINE) { return __ballot_sync(m, p, line) == m; }
template <class T>
T __reduce_add_sync(unsigned m, T v, CUSIM_LINE) {
  return cusim::reduce_warp(m, v, cusim::Sum{}, "__reduce_add_sync", line);
}
template <class T>
T __reduce_max_sync(unsigned m, T v, CUSIM_LINE) {
  return cusim::reduce_warp(m, v, cusim::Largest{}, "__reduce_max_sync", line);
}
template <class T>
T __reduce_min_sync(unsigned m, T v, CUSIM_LINE) {
  return cusim::reduce_warp(m, v, cusim::Smallest{}, "__reduce_min_sync", line);
}

template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  T old;
  if constexpr (std::is_integral_v<T>) {
    old = __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  } else {
    T sum;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do sum = old + v;
    while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
  return old;
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v > old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expect, std::common_type_t<T> v) {
  T old = expect;
  __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return old;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class To, class From>
To cusim_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &v, sizeof out);
  return out;
}
inline float __int_as_float(int x) { return cusim_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cusim_bits<float>(x); }
inline int __float_as_int(float x) { return cusim_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cusim_bits<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.f / x; }
namespace cusim {
inline float rsqrt(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
}  // namespace cusim
#define rsqrtf cusim::rsqrt  // glibc may declare a function of that name
template <class T, class U>
auto min(T a, U b) {
  return a < b ? a : b;
}
template <class T, class U>
auto max(T a, U b) {
  return a > b ? a : b;
}
