// Work on rows of x in the forward, a warp a row.
//
// prologue_kernel  x_hat in the operands' type, cos_y and the target, the row's constants
// merge_kernel     the parts' sums merged in their order: red, aux, sum_u
// loss_kernel      the loss of a built-in margin and its slopes; sum_kernel: their sum or mean
#pragma once

#include "row.cuh"

namespace fused_margin {
namespace gpu {

// s log2(e) - hi: log2(e) is cut in two, and so is s, so that all products but the last are exact.
__device__ __forceinline__ float folded_rest(float s, float hi) {
  const float s_hi = __uint_as_float(__float_as_uint(s) & 0xfffff000u);  // 12 significant bits
  constexpr float c_hi = 1.4423828125f, c_lo = 0.000312228388963387f;    // c_hi has 11
  return ((s_hi * c_hi - hi) + (s - s_hi) * c_hi) + s * c_lo;
}

__global__ void __launch_bounds__(kRowThreads, 4) prologue_kernel(const Prologue f) {
  const Problem& p = f.p;
  const int64_t i = row_of_warp();
  if (i >= (p.padded ? p.padded : p.batch)) return;
  const Target y = target_of(p, i);
  const UnitRow unit = unit_row(p, i, y.counts);
  float c = 0;
  if (f.cos_y && i < p.batch) {
    c = closest_center(p, i, y, unit.inverse).cosine;
    if (p.normalize_x && p.normalize_w) c = c < -1.0f ? -1.0f : c > 1.0f ? 1.0f : c;
    if (lane_of() == 0) f.cos_y[i] = c;
  }
  if (!p.padded) return;
  each_column(p.operand_row, [&](int64_t d) {
    const float value = d < p.dim ? unit_value(p, i, d, unit.inverse, y.counts) : 0.0f;
    write(p.x_hat, p.operand, i * p.operand_row + d, value);
  });
  if (lane_of()) return;
  const bool live = i < p.batch;
  const float s = live && p.scale.data ? at(p.scale, i) : 1.0f, hi = s * kLog2e;
  p.target[i] = int(y.class_);
  p.constants[i] = hi;
  p.constants[p.padded + i] = folded_rest(s, hi);
  float tau = live && p.tau.data ? at(p.tau, i) : 0.0f;
  if (f.has_threshold && live) tau = float(target<double>(c, f.threshold).value);
  p.constants[2 * p.padded + i] = tau;
  p.constants[3 * p.padded + i] = s;
}

// log(total * 2^power) in two parts; -inf and 0 where total is 0.
__device__ __forceinline__ void logarithm(float total, float power, float& value, float& low) {
  low = 0;
  value = total == total ? -INFINITY : total;  // a NaN stays one
  if (!(total > 0)) return;
  const uint32_t bits = __float_as_uint(total);
  const int shift = int(bits >> 23 & 0xff) - 127;
  const float fraction = __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);  // in [1, 2)
  const float whole = power + float(shift), first = whole * 0.693359375f;    // ln 2 in two parts, the first short
  const float rest = logf(fraction) - whole * 2.121944400546905e-4f;
  value = first + rest;
  low = rest - (value - first);
}

__global__ void __launch_bounds__(kRowThreads) merge_kernel(const Merge m) {
  const Problem& p = m.p;
  const int64_t i = row_of_warp();
  if (i >= p.batch) return;
  const float* parts = m.state + i * m.parts * kStates;
  float top = kNoPower, best = -INFINITY, sums[kStates] = {};
  for (int64_t k = lane_of(); k < m.parts; k += 32) {
    top = fmaxf(top, parts[k * kStates]);
    best = fmaxf(best, parts[k * kStates + 3]);
  }
  top = largest_of_warp(top), best = largest_of_warp(best);
  for (int64_t k = lane_of(); k < m.parts; k += 32) {
    const float* part = parts + k * kStates;
    const float factor = exp2_fast(part[0] - top);
    sums[1] += (part[1] + part[2]) * factor;
    sums[6] += part[6] * factor;
    sums[4] += part[4], sums[5] += part[5], sums[7] += part[7], sums[8] += part[8];
  }
#pragma unroll
  for (int k = 0; k < kStates; k++) sums[k] = over_warp(sums[k]);
  if (lane_of()) return;
  const bool softplus = p.reduction == Reduction::softplus;
  const float total = sums[1], whole = softplus || total == 0 ? 1.0f : total;
  float value = total, low = 0;
  if (!softplus) logarithm(total, top, value, low);
  const bool stats = p.want & kStats, mean = p.want & kDscale, sum = p.want & (kSum | kDscale);
  m.red[i] = value;
  m.sum_u[i] = sum ? at(p.scale, i) * sums[7] + sums[8] : 0.0f;
  m.aux[i] = stats ? best : -INFINITY;
  m.aux[p.batch + i] = stats ? sums[4] : 0.0f;
  m.aux[2 * p.batch + i] = stats ? sums[5] : 0.0f;
  m.aux[3 * p.batch + i] = mean ? sums[6] / whole : 0.0f;
  m.aux[4 * p.batch + i] = sum ? sums[7] : 0.0f;
  m.aux[5 * p.batch + i] = low;
}

// A thread a row.
__global__ void __launch_bounds__(kRowThreads) loss_kernel(const Loss l) {
  const Problem& p = l.p;
  const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  double share = 1;
  if (l.reduction == kMean) {  // of the rows that take part, which every block counts
    int* counted = dynamic_shared<int>();
    int mine = 0;
    for (int64_t k = threadIdx.x; k < p.batch; k += kRowThreads) mine += target_of(p, k).counts;
    for (int apart = 16; apart; apart /= 2) mine += __shfl_xor_sync(~0u, mine, apart);
    if (lane_of() == 0) counted[threadIdx.x / 32] = mine;
    __syncthreads();
    int valid = 0;
    for (int k = 0; k < kRowsOfBlock; k++) valid += counted[k];
    share = 1.0 / (valid > 0 ? valid : 1);
  }
  if (i >= p.batch) return;
  const double scale = at(p.scale, i);
  const Transformed<double> t = target<double>(l.cos_y[i], l.form);
  const Transformed<double> s = softplus_of((double(l.red[i]) - scale * t.value) + double(l.red_low[i]));
  const bool counts = target_of(p, i).counts;
  const double by_red = s.slope * share;
  l.losses[i] = counts ? float(s.value) : 0.0f;
  l.rows[i] = counts ? float(by_red) : 0.0f;
  l.rows[p.batch + i] = counts ? float(-by_red * scale * (p.unit_slope ? 1.0 : t.slope)) : 0.0f;
  l.rows[2 * p.batch + i] = counts ? float(-by_red * t.value) : 0.0f;
  l.rows[3 * p.batch + i] = l.red[i];
  l.rows[4 * p.batch + i] = l.cos_y[i];
  l.rows[5 * p.batch + i] = l.tau[i];
}

// One block: the sum of the losses, or their mean over the rows that take part.
__global__ void __launch_bounds__(kRowThreads) sum_kernel(const Loss l) {
  double* sums = dynamic_shared<double>();
  double* counts = sums + kRowThreads;
  double sum = 0, count = 0;
  for (int64_t k = threadIdx.x; k < l.p.batch; k += kRowThreads) sum += l.losses[k], count += target_of(l.p, k).counts;
  sums[threadIdx.x] = sum, counts[threadIdx.x] = count;
  __syncthreads();
  for (int apart = kRowThreads / 2; apart; apart /= 2) {
    if (int(threadIdx.x) < apart) {
      sums[threadIdx.x] += sums[threadIdx.x + apart];
      counts[threadIdx.x] += counts[threadIdx.x + apart];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0)
    *l.reduced = float(l.reduction == kMean ? sums[0] / (counts[0] > 0 ? counts[0] : 1.0) : sums[0]);
}

}  // namespace gpu
}  // namespace fused_margin
