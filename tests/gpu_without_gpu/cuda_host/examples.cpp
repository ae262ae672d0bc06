// The kernels of examples.cuh on the simulator, and kernels that are wrong by what they do to memory or to each other.
#define ARCH "simulated_arch.h"
#include "binding.h"
#include "examples.cuh"

namespace fused_margin {
namespace {

__global__ void divergent_barrier(float* o) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    o[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void absent_lane(float* o) {
  if (threadIdx.x < 16)
    o[threadIdx.x] = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
  else
    __syncwarp();
}

__global__ void exited_lane(float* o) {
  if (threadIdx.x >= 24) return;
  o[threadIdx.x] = __shfl_down_sync(0xffffffffu, int(threadIdx.x), 1);
}

__global__ void outside_its_mask(float* o) { o[threadIdx.x] = __shfl_sync(0xffffu, int(threadIdx.x), 0); }

__global__ void misaligned_copy(float* o) { copy_async_16(dynamic_shared<float>(), o + 1); }

__global__ void abandoned_copy(float* o) {
  copy_async_16(dynamic_shared<float>() + 4 * threadIdx.x, o);
  copy_commit();
}

__global__ void overrun_global(float* o) { o[blockIdx.x * blockDim.x + threadIdx.x] = 1.f; }

__global__ void overrun_shared(float* o) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x + 1] = 1.f;
  __syncthreads();
  o[threadIdx.x] = shared[threadIdx.x];
}

__global__ void race_global(float* o) { o[0] += threadIdx.x; }

__global__ void race_shared(float* o) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = threadIdx.x;
  o[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void race_between_blocks(float* o) {
  if (!threadIdx.x) o[0] = float(blockIdx.x);
}

__global__ void overflow(float* o) { o[threadIdx.x] = float(2147483647 + int(threadIdx.x)); }

struct Wrong {
  void (*kernel)(float*);
  int blocks, threads;
  size_t shared;
};

const Wrong kWrong[] = {
    {divergent_barrier, 1, 64, 0}, {absent_lane, 1, 32, 0},         {exited_lane, 1, 32, 0},
    {outside_its_mask, 1, 32, 0},  {misaligned_copy, 1, 32, 64},    {abandoned_copy, 1, 32, 512},
    {overrun_global, 2, 64, 0},    {overrun_shared, 1, 64, 256},    {race_global, 1, 64, 0},
    {race_shared, 1, 64, 256},     {race_between_blocks, 2, 32, 0}, {overflow, 1, 32, 0},
};

template <class T, bool transposed>
void run_product(const void* a, const void* b, float* d, int m, int n, int k, Bug bug) {
  const auto run = [&](auto kernel) {
    launch(kernel, dim3((m + 31) / 32, (n + 31) / 32), 128, kStages * kStage * sizeof(T), nullptr,
           static_cast<const T*>(a), static_cast<const T*>(b), d, m, n, k);
  };
  if (bug == Bug::none) run(product<T, transposed, Bug::none>);
  if (bug == Bug::no_barrier) run(product<T, transposed, Bug::no_barrier>);
  if (bug == Bug::no_wait) run(product<T, transposed, Bug::no_wait>);
  if (bug == Bug::early_fetch) run(product<T, transposed, Bug::early_fetch>);
}

template <class T>
void run_convert(int n, const float* x, void* narrow, uint32_t* pairs, float* wide, float* e, float* l) {
  launch(convert<T>, 1, n, 0, nullptr, x, static_cast<T*>(narrow), pairs, wide, e, l);
}

}  // namespace
}  // namespace fused_margin

using namespace fused_margin;

CUSIM_EXPORT const char* run_row_lse(const float* cos, float* lse, int rows, int classes, float s, int threads,
                                     int bug) {
  return guarded([=] {
    const auto kernel = Bug(bug) == Bug::no_barrier ? row_lse<Bug::no_barrier> : row_lse<Bug::none>;
    launch(kernel, rows, threads, 32 * sizeof(float), nullptr, cos, lse, classes, s);
  });
}

CUSIM_EXPORT const char* run_product(const void* a, const void* b, float* d, int m, int n, int k, bool half,
                                     bool transposed, int bug) {
  return guarded([=] {
    const auto run = half         ? transposed ? run_product<__half, true> : run_product<__half, false>
                     : transposed ? run_product<__nv_bfloat16, true>
                                  : run_product<__nv_bfloat16, false>;
    run(a, b, d, m, n, k, Bug(bug));
  });
}

CUSIM_EXPORT const char* run_product_tf32(const float* a, const float* b, float* d, bool rounded) {
  return guarded([=] { launch(rounded ? product_tf32<true> : product_tf32<false>, 1, 32, 0, nullptr, a, b, d); });
}

CUSIM_EXPORT const char* run_convert(int n, const float* x, void* narrow, uint32_t* pairs, float* wide, float* e,
                                     float* l, bool half) {
  return guarded([=] { (half ? run_convert<__half> : run_convert<__nv_bfloat16>)(n, x, narrow, pairs, wide, e, l); });
}

CUSIM_EXPORT const char* run_wrong(int which, float* o) {
  return guarded([=] {
    const Wrong& w = kWrong[which];
    launch(w.kernel, w.blocks, w.threads, w.shared, nullptr, o);
  });
}
