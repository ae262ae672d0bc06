// The launches on rows, and the choice among the builds of the sweeps.
#include "rows.cuh"

#include "row_gradients.cuh"

namespace fused_margin {
namespace gpu {

namespace {

// f(a value of the operands' type)
template <class F>
cudaError_t by_operand(Storage operand, const F& f) {
  switch (operand) {
    case Storage::bf16:
      return f(__nv_bfloat16());
    case Storage::f16:
      return f(__half());
    default:
      return f(float());
  }
}

}  // namespace

cudaError_t run(const Prologue& f, cudaStream_t stream) {
  return launch_rows(prologue_kernel, f.p.padded ? f.p.padded : f.p.batch, stream, f);
}

cudaError_t run(const Forward& f, cudaStream_t stream) {
  return by_operand(f.p.operand, [&](auto type) { return run_forward<decltype(type)>(f, stream); });
}

cudaError_t run(const Merge& m, cudaStream_t stream) { return launch_rows(merge_kernel, m.p.batch, stream, m); }

cudaError_t run(const Loss& l, cudaStream_t stream) {
  const dim3 blocks(unsigned(div_up(l.p.batch, kRowThreads)));
  if (l.p.batch) {
    const cudaError_t error = launch(loss_kernel, blocks, kRowThreads, kRowsOfBlock * sizeof(int), stream, l);
    if (error != cudaSuccess) return error;
  }
  if (l.reduction == kNone) return cudaSuccess;
  return launch(sum_kernel, dim3(1), kRowThreads, 2 * kRowThreads * sizeof(double), stream, l);
}

cudaError_t run(const BackwardRows& b, cudaStream_t stream) {
  return launch_rows(backward_rows_kernel, b.p.padded, stream, b);
}

cudaError_t run(const Gradient& g, cudaStream_t stream) {
  return by_operand(g.p.operand, [&](auto type) { return run_gradient<decltype(type)>(g, stream); });
}

cudaError_t run(const UnitWeights& u, cudaStream_t stream) {
  return launch_rows(unit_weights_kernel, u.rows, stream, u);
}

cudaError_t run(const FinishWeights& f, cudaStream_t stream) {
  return launch_rows(finish_weights_kernel, f.rows, stream, f);
}

cudaError_t run(const UpdateWeights& u, cudaStream_t stream) {
  const auto kernel = u.update.optimizer == Optimizer::sgd ? update_weights_kernel<Optimizer::sgd>
                                                           : update_weights_kernel<Optimizer::adamw>;
  return launch_rows(kernel, u.finish.rows, stream, u);
}

cudaError_t run(const UpdateRows& u, cudaStream_t stream) {
  const auto kernel =
      u.update.optimizer == Optimizer::sgd ? update_rows_kernel<Optimizer::sgd> : update_rows_kernel<Optimizer::adamw>;
  return launch_rows(kernel, u.rows, stream, u);
}

cudaError_t run(const CountSteps& c, cudaStream_t stream) {
  const dim3 blocks(unsigned(div_up(c.rows, kRowThreads)));
  return c.rows && c.update.step ? launch(count_steps_kernel, blocks, kRowThreads, 0, stream, c) : cudaSuccess;
}

cudaError_t run(const FinishBias& f, cudaStream_t stream) {
  return launch(finish_bias_kernel, dim3(unsigned(div_up(f.classes, kRowThreads))), kRowThreads, 0, stream, f);
}

cudaError_t run(const Add& a, cudaStream_t stream) {
  const dim3 blocks(unsigned(div_up(a.count, kRowThreads)));
  return a.count ? launch(add_kernel, blocks, kRowThreads, 0, stream, a) : cudaSuccess;
}

cudaError_t run(const FinishX& f, cudaStream_t stream) { return launch_rows(finish_x_kernel, f.p.batch, stream, f); }

}  // namespace gpu
}  // namespace fused_margin
