// For which GPUs the library has code: what it was built for, and what the driver can make of that.
#include "arch.cuh"

#define FM_EXPORT extern "C" __attribute__((visibility("default")))

namespace fused_margin {
namespace gpu {

// Built for the same architectures as every kernel, and made in no time where there is PTX only.
__global__ void probe_kernel() {}

}  // namespace gpu
}  // namespace fused_margin

// In the driver's words, why the current device cannot run the kernels; "" if it can.
FM_EXPORT const char* fm_cuda_why_not() {
  cudaFuncAttributes of_probe;
  const cudaError_t error = cudaFuncGetAttributes(&of_probe, fused_margin::gpu::probe_kernel);
  cudaGetLastError();  // the next call is none the wiser
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Three or four digits each: 800,900.
FM_EXPORT const char* fm_cuda_architectures() {
#define FM_WORDS(...) #__VA_ARGS__
#define FM_TEXT(...) FM_WORDS(__VA_ARGS__)
  return FM_TEXT(__CUDA_ARCH_LIST__);
}
