// Both sweeps with operands of one type: a file each, so that they compile side by side.
#include "forward.cuh"
#include "gradient.cuh"

namespace fused_margin {
namespace gpu {

template cudaError_t run_forward<__half>(const Forward&, cudaStream_t);
template cudaError_t run_gradient<__half>(const Gradient&, cudaStream_t);

}  // namespace gpu
}  // namespace fused_margin
