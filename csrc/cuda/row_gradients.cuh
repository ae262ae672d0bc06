// Work on rows around the backward's sweep, a warp a row.
//
// backward_rows_kernel  the coefficients of G, x_hat times what G leaves out, the rows in the order of their targets
// unit_weights_kernel   rows of w normalised, for the product with G that gives dX
// finish_weights_kernel dW_j = (h_j - (h_j . w_hat_j) w_hat_j) / |w_j|,  h_j the product with G and the targets' share
// update_weights_kernel the same, used up by an optimizer's step on w_j in the place of being stored
// finish_bias_kernel    the columns' sums
// finish_x_kernel       dX_i = (h_i - (h_i . x_hat_i) x_hat_i) / |x_i|,  h_i = f_i O_i + g_cos_y w_hat_y
#pragma once

#include "row.cuh"
#include "update.cuh"

namespace fused_margin {
namespace gpu {

constexpr int kNowhere = 0x7fffffff;  // sorts a row without target behind all classes

// The power of two next below the largest f of the batch: with a loss scale of 65536, f itself would leave fp16.
__device__ __forceinline__ float unit_of_batch(const BackwardRows& b) {
  float top = 0;
  for (int64_t k = lane_of(); k < b.p.batch; k += 32)
    top = fmaxf(top, fmaxf(fabsf(at(b.g_red, k)), fabsf(at(b.g_sum, k))) * fabsf(at(b.p.scale, k)));
  return unit_below(largest_of_warp(top));
}

// The row's place when rows are sorted by their target's class, and by number where it is the same.
__device__ __forceinline__ int rank_of(const Problem& p, int64_t i, int own) {
  int before = 0;
  for (int64_t k = lane_of(); k < p.batch; k += 32) {
    const int64_t class_ = target_of(p, k).class_;
    const int other = class_ < 0 ? kNowhere : int(class_);
    before += other < own || (other == own && k < i);
  }
  for (int apart = 16; apart; apart /= 2) before += __shfl_xor_sync(~0u, before, apart);
  return before;
}

__global__ void __launch_bounds__(kRowThreads, 4) backward_rows_kernel(const BackwardRows b) {
  const Problem& p = b.p;
  const int64_t i = row_of_warp();
  if (i >= p.padded) return;
  const bool live = i < p.batch;
  const Target y = target_of(p, i);
  const UnitRow unit = unit_row(p, i, y.counts);
  const Closest closest = closest_center(p, i, y, unit.inverse);
  const float s = live ? at(p.scale, i) : 0.0f, g = live ? at(b.g_red, i) : 0.0f, h = live ? at(b.g_sum, i) : 0.0f;
  const float largest = fmaxf(fabsf(g), fabsf(h)), over = largest > 0 ? largest : 1.0f;
  const float common = p.operand == Storage::f16 ? unit_of_batch(b) : 1.0f;
  each_column(p.operand_row, [&](int64_t d) {
    const float x_hat = d < p.dim ? unit_value(p, i, d, unit.inverse, y.counts) : 0.0f;
    write(b.scaled, p.operand, i * p.operand_row + d, x_hat * (s * largest / common));
  });
  if (live) {
    const int own = y.class_ < 0 ? kNowhere : int(y.class_), rank = rank_of(p, i, own);
    if (lane_of() == 0) b.order[rank] = int(i), b.sorted_class[rank] = own;
  }
  if (lane_of()) return;
  b.inverse_x[i] = unit.inverse;
  b.target_row[i] = int(closest.row);
  if (i == 0) *b.unit = common;
  float power = 0, rest = 0;
  if (p.reduction == Reduction::logsumexp) {
    const float red = live ? at(b.red, i) : -INFINITY;
    if (red == -INFINITY) {
      power = 1e30f;  // a row without rivals: 2^(e - power) must be 0
    } else {
      power = floorf(red * kLog2e + 0.5f);
      rest = ((red - power * 0.693359375f) + (power * 2.121944400546905e-4f + at(b.red_low, i))) * kLog2e;
    }
  }
  const float of_row[kCoefficients] = {power, rest, g / over, h / over, s * largest, largest, s * g};
  for (int k = 0; k < kCoefficients; k++) b.coefficients[k * p.padded + i] = of_row[k];
  if (live && b.d_scale.data)
    write(b.d_scale.data, b.d_scale.storage, i * b.d_scale.step,
          g * b.aux[3 * p.batch + i] + h * b.aux[4 * p.batch + i]);
}

__global__ void __launch_bounds__(kRowThreads) unit_weights_kernel(const UnitWeights u) {
  const Problem& p = u.p;
  const int64_t row = row_of_warp();
  if (row >= u.rows) return;
  const int64_t source = source_row(p, u.first_row + row);
  float inverse = 1;
  if (p.normalize_w) {
    float square = 0;
    each_column(p.dim, [&](int64_t d) { square = fmaf(at(p.w, source, d), at(p.w, source, d), square); });
    inverse = inverse_norm(over_warp(square));
  }
  each_column(p.dim, [&](int64_t d) { write(u.w_hat, p.operand, row * p.dim + d, at(p.w, source, d) * inverse); });
}

// The first place in `sorted` [n] that is not less than `value`.
__device__ __forceinline__ int64_t lower_bound(const int* sorted, int64_t n, int value) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A row, by the warp that has it: taker.take(column, w, dW, what taker.read(column) gave) for each of a lane's columns.
// `source`: where the row lies in w.
template <class Taker>
__device__ __forceinline__ void finish_row(const FinishWeights& f, int64_t local, int64_t source, const Taker& taker) {
  const Problem& p = f.p;
  const int64_t row = f.first_row + local;
  const int class_ = int(row / p.sub_centers);
  const int64_t begin = lower_bound(f.sorted_class, p.batch, class_);
  const int64_t end = lower_bound(f.sorted_class, p.batch, class_ + 1);  // rows whose target the class is
  const float unit = p.operand == Storage::f16 ? *f.unit / kHalfUnit : 1.0f;
  float* products = f.products + local * p.dim;
  const float* earlier = f.earlier ? f.earlier + local * p.dim : nullptr;
  struct Column {
    float h, w;
  };
  const auto read_column = [&](int64_t d) { return Column{products[d], at(p.w, source, d)}; };
  float square = 0, along = 0;
  each_column_ahead(p.dim, read_column, [&](int64_t d, const Column& c) {
    float h = c.h * unit;
    for (int64_t k = begin; k < end; k++) {
      const int64_t i = f.order[k];
      if (f.target_row[i] == row) h += at(f.g_cos_y, i) * (at(p.x, i, d) * f.inverse_x[i]);
    }
    products[d] = h;
    square = fmaf(c.w, c.w, square);
    along = fmaf(h, c.w, along);
  });
  float inverse = 1, back = 0;
  if (p.normalize_w) {
    square = over_warp(square);
    inverse = inverse_norm(square);
    back = sqrtf(square) < kEps ? 0.0f : over_warp(along) * inverse;  // a clamped norm is a constant
  }
  struct Finished {
    Column column;
    float earlier;
    decltype(taker.read(0)) more;
  };
  each_column_ahead(
      p.dim, [&](int64_t d) { return Finished{read_column(d), earlier ? earlier[d] : 0.0f, taker.read(d)}; },
      [&](int64_t d, const Finished& c) {
        const float d_w = (c.column.h - back * (c.column.w * inverse)) * inverse;
        taker.take(d, c.column.w, earlier ? c.earlier + d_w : d_w, c.more);
      });
}

// The taker that writes dW, as the result or for another call to be added.
struct StoredRow {
  const Matrix& d_w;
  int64_t row;
  struct Nothing {};

  __device__ __forceinline__ Nothing read(int64_t) const { return {}; }
  __device__ __forceinline__ void take(int64_t d, float, float value, Nothing) const {
    write(d_w.data, d_w.storage, row * d_w.row + d * d_w.col, value);
  }
};

__global__ void __launch_bounds__(kRowThreads, kBusyBlocks) finish_weights_kernel(const FinishWeights f) {
  const int64_t local = row_of_warp();
  if (local >= f.rows) return;
  finish_row(f, local, source_row(f.p, f.first_row + local), StoredRow{f.d_w, local});
}

template <Optimizer optimizer>
__global__ void __launch_bounds__(kRowThreads, kBusyBlocks) update_weights_kernel(const UpdateWeights u) {
  const FinishWeights& f = u.finish;
  const int64_t local = row_of_warp();
  if (local >= f.rows) return;
  const int64_t source = source_row(f.p, f.first_row + local);
  finish_row(f, local, source, UpdatedRow<optimizer>(u.update, source, f.p.dim));
}

// A thread a class.
__global__ void __launch_bounds__(kRowThreads) finish_bias_kernel(const FinishBias f) {
  const int64_t j = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (j >= f.classes) return;
  float sum = 0;
  for (int64_t part = 0; part < f.parts; part++)
    for (int k = 0; k < f.p.group; k++) sum += f.bias_parts[part * f.slots + j * f.p.group + k];
  write(f.d_bias.data, f.d_bias.storage, (f.first_class + j) * f.d_bias.step, sum);
}

__global__ void __launch_bounds__(kRowThreads) finish_x_kernel(const FinishX f) {
  const Problem& p = f.p;
  const int64_t i = row_of_warp();
  if (i >= p.batch) return;
  const bool counts = target_of(p, i).counts;
  const UnitRow unit = unit_row(p, i, counts);
  const float factor = f.factors[i] * (p.operand == Storage::f16 ? 1 / kHalfUnit : 1.0f);
  const int64_t row = f.target_row[i], source = row < 0 ? 0 : source_row(p, row);
  float share = row < 0 ? 0.0f : at(f.g_cos_y, i);
  if (row >= 0 && p.normalize_w) {
    float square = 0;
    each_column(p.dim, [&](int64_t d) { square = fmaf(at(p.w, source, d), at(p.w, source, d), square); });
    share *= inverse_norm(over_warp(square));
  }
  const auto h = [&](int64_t d) { return f.o[i * p.dim + d] * factor + (row < 0 ? 0.0f : share * at(p.w, source, d)); };
  float along = 0;
  if (unit.slope) {  // a norm that is clamped is a constant
    each_column(p.dim, [&](int64_t d) { along = fmaf(h(d), at(p.x, i, d) * unit.inverse, along); });
    along = over_warp(along);
  }
  each_column(p.dim, [&](int64_t d) {
    const float d_x = counts ? (h(d) - along * (at(p.x, i, d) * unit.inverse)) * unit.inverse : 0.0f;
    write(f.d_x.data, f.d_x.storage, i * f.d_x.row + d * f.d_x.col, d_x);
  });
}

// A chunk's share of O: torch's own addition would be one more pass through the dispatcher.
__global__ void __launch_bounds__(kRowThreads) add_kernel(const Add a) {
  const int64_t k = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (k < a.count) a.sum[k] += a.part[k];
}

}  // namespace gpu
}  // namespace fused_margin
