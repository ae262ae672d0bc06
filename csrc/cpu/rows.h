// The work on single rows, B * D in all: x_hat, the target's cosine, and the gradient of x from what the sweep left.
#pragma once

#include "../margins.h"
#include "problem.h"

namespace fused_margin {

// What is known of the rows before a sweep; arrays [padded] (x_hat [padded, dim]), zero beyond the batch.
template <class T>
struct RowsOut {
  T* x_hat;
  T* inv;               // 1 / max(|x|, eps), or 1
  T* cos_y;             // 0 where the row has no target here
  int64_t* target_row;  // the row of w that is the target (of its sub-centres the closest), or -1
};

struct RowsIn {
  Weights x;
  bool normalize_x;
};

// Rows [begin, end) of the batch.
template <class T>
void prepare_rows(const Problem<T>& p, const RowsIn& in, const RowsOut<T>& out, int64_t begin, int64_t end);

// d_x from d red / d x_hat = scale o_red and d sum_u / d x_hat = scale o_sum (either may be null), rows [begin, end).
template <class T>
void finish_rows(const Problem<T>& p, const RowsIn& in, const RowsOut<T>& rows, const BackwardIn<T>& g, const T* o_red,
                 const T* o_sum, void* d_x, int64_t begin, int64_t end);

// The losses of rows, each [batch], and their slopes by red, by the target's cosine and by the scale.
template <class T>
struct LossOut {
  T *loss, *by_red, *by_cos_y, *by_scale;
};

// Rows [begin, end): loss = log(1 + exp(red - z)) with z = scale T(cos_y), 0 in ignored rows.
template <class T>
void lose_rows(const Problem<T>& p, const Form<double>& target_form, const T* cos_y, const T* red,
               const LossOut<T>& out, int64_t begin, int64_t end);

}  // namespace fused_margin
