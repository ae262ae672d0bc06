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
class UpdatedRow {
 public:
  __device__ UpdatedRow(const Update& u, int64_t source, int64_t dim)
      : u_(u), w_(source * u.w.row), state_(source * dim), sgd_(u.sgd), correction_{} {
    const float t = u.step ? u.step[source / u.together] : 0.0f;
    if (u.optimizer == Optimizer::adamw) {
      const float over1 = one_minus_power(u.log_beta1, t), over2 = one_minus_power(u.log_beta2, t);
      correction_ = {u.lr / over1, 1.0f / sqrtf(over2)};
    } else if (t == 1) {
      sgd_.own = 1;
    }
  }

  // Of a column, as far as the optimizer has it.
  struct State {
    float mean, square;
  };
  __device__ __forceinline__ State read(int64_t d) const {
    return {u_.m ? u_.m[state_ + d] : 0.0f, u_.v ? u_.v[state_ + d] : 0.0f};
  }
  // Column d, where the weight is w and its gradient g.
  __device__ __forceinline__ void take(int64_t d, float w, float g, State s) const {
    if (u_.optimizer == Optimizer::sgd)
      update_sgd(sgd_, u_.m != nullptr, g, w, s.mean);
    else
      update_adamw<RootOps>(u_.adamw, correction_, g, w, s.mean, s.square);
    if (u_.m) u_.m[state_ + d] = s.mean;
    if (u_.v) u_.v[state_ + d] = s.square;
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

__global__ void __launch_bounds__(kRowThreads, 4) update_rows_kernel(const UpdateRows r) {
  const int64_t row = row_of_warp();
  if (row >= r.rows) return;
  const int64_t source = updated_row(r.update, row);
  const UpdatedRow updated(r.update, source, r.dim);
  struct Column {
    float w, g;
    UpdatedRow::State state;
  };
  each_column_ahead(
      r.dim, [&](int64_t d) { return Column{at(r.update.w, source, d), at(r.grad, row, d), updated.read(d)}; },
      [&](int64_t d, const Column& c) { updated.take(d, c.w, c.g, c.state); });
}

}  // namespace gpu
}  // namespace fused_margin
