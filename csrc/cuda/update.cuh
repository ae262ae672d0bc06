// An optimizer's step on rows of the weights and of its state, a warp a row; the formulas are those of ../update.h.
//
// count_steps_kernel     t += 1 of the rows or classes that get a step, before what reads it
// update_rows_kernel     a step with a gradient in memory
// update_weights_kernel  (row_gradients.cuh) a step with a gradient that is finished there, and never stored
#pragma once

#include "row.cuh"

namespace fused_margin {
namespace gpu {

struct RootOps {
  __device__ static float root(float v) { return sqrtf(v); }
};

__device__ __forceinline__ int64_t updated_row(const Update& u, int64_t row) { return u.index ? u.index[row] : row; }

// 1 - beta^t, near 1 and near 0; log_beta is -inf for beta = 0.
__device__ __forceinline__ float one_minus_power(float log_beta, float t) { return -expm1f(t * log_beta); }

// A row as its warp updates it; rows of one class read the same t, which no launch of an update changes.
template <Optimizer optimizer>
class UpdatedRow {
 public:
  // Of a column, as far as the optimizer has it.
  struct State {
    float mean, square;
  };

  __device__ UpdatedRow(const Update& u, int64_t source, int64_t dim)
      : u_(u), w_(source * u.w.row), state_(source * dim), sgd_(u.sgd), correction_{} {
    const float t = u.step ? u.step[source / u.together] : 0.0f;
    if constexpr (optimizer == Optimizer::adamw)
      correction_ = {u.lr / one_minus_power(u.log_beta1, t), 1.0f / sqrtf(one_minus_power(u.log_beta2, t))};
    else if (t == 1)
      sgd_.own = 1;
  }

  __device__ __forceinline__ State read(int64_t d) const {
    if constexpr (optimizer == Optimizer::adamw) return {u_.m[state_ + d], u_.v[state_ + d]};
    return {u_.m ? u_.m[state_ + d] : 0.0f, 0.0f};
  }

  // Column d, where the weight is w and its gradient g.
  __device__ __forceinline__ void take(int64_t d, float w, float g, State s) const {
    if constexpr (optimizer == Optimizer::adamw) {
      update_adamw<RootOps>(u_.adamw, correction_, g, w, s.mean, s.square);
      u_.v[state_ + d] = s.square;
    } else {
      update_sgd(sgd_, u_.m != nullptr, g, w, s.mean);
    }
    if (u_.m) u_.m[state_ + d] = s.mean;
    write(u_.w.data, u_.w.storage, w_ + d * u_.w.col, w);
  }

 private:
  const Update& u_;
  const int64_t w_, state_;
  SgdNumbers<float> sgd_;
  Correction<float> correction_;
};

// A thread a row: the last of those that have a step in common counts it, so that each count has one writer.
__global__ void __launch_bounds__(kRowThreads) count_steps_kernel(const CountSteps c) {
  const int64_t row = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= c.rows) return;
  const int64_t source = updated_row(c.update, row);
  if (source % c.update.together == c.update.together - 1) c.update.step[source / c.update.together] += 1;
}

template <Optimizer optimizer>
__global__ void __launch_bounds__(kRowThreads, kBusyBlocks) update_rows_kernel(const UpdateRows r) {
  const int64_t row = row_of_warp();
  if (row >= r.rows) return;
  const int64_t source = updated_row(r.update, row);
  const UpdatedRow<optimizer> updated(r.update, source, r.dim);
  struct Column {
    float w, g;
    typename UpdatedRow<optimizer>::State state;
  };
  each_column_ahead(
      r.dim, [&](int64_t d) { return Column{at(r.update.w, source, d), at(r.grad, row, d), updated.read(d)}; },
      [&](int64_t d, const Column& c) { updated.take(d, c.w, c.g, c.state); });
}

}  // namespace gpu
}  // namespace fused_margin
