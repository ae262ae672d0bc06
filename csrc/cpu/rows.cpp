// The work on single rows; see rows.h. Sums over the dimension in double, as there are few.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "storage.h"

namespace fused_margin {
namespace {

constexpr double kEps = 1e-12;  // as in torch.nn.functional.normalize

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  double sum[8] = {};  // independent sums, for the compiler to vectorise
  int64_t d = 0;
  for (; d + 8 <= n; d += 8)
    for (int64_t l = 0; l < 8; l++) sum[l] += double(a[d + l]) * double(b[d + l]);
  double rest = 0;
  for (; d < n; d++) rest += double(a[d]) * double(b[d]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])) + rest;
}

template <class T>
double inverse_norm(const T* a, int64_t n) {
  const double norm = std::sqrt(dot(a, a, n));
  return 1 / (norm < kEps ? kEps : norm);
}

}  // namespace

template <class T>
void prepare_rows(const Problem<T>& p, const RowsIn& in, const RowsOut<T>& out, int64_t begin, int64_t end) {
  std::vector<T> row(static_cast<size_t>(p.dim));
  for (int64_t i = begin; i < end; i++) {
    T* x = out.x_hat + i * p.dim;
    read_row(in.x, i, p.dim, x);
    if (p.target[i] == kIgnored) std::fill(x, x + p.dim, T(0));
    const double inv = in.normalize_x ? inverse_norm(x, p.dim) : 1;
    out.inv[i] = T(inv);
    for (int64_t d = 0; d < p.dim; d++) x[d] = T(x[d] * inv);
    out.cos_y[i] = 0;
    out.target_row[i] = -1;
    if (p.target[i] < 0) continue;
    for (int64_t r = p.target[i] * p.sub_centers; r < (p.target[i] + 1) * p.sub_centers; r++) {
      read_row(p.w, r, p.dim, row.data());
      double c = dot(x, row.data(), p.dim) * (p.normalize_w ? inverse_norm(row.data(), p.dim) : 1);
      if (p.clamp) c = c < -1 ? -1 : c > 1 ? 1 : c;
      if (out.target_row[i] >= 0 && !exceeds<double>(c, out.cos_y[i])) continue;
      out.cos_y[i] = T(c);
      out.target_row[i] = r;
    }
  }
}

template <class T>
void finish_rows(const Problem<T>& p, const RowsIn& in, const RowsOut<T>& rows, const BackwardIn<T>& g, const T* o_red,
                 const T* o_sum, void* d_x, int64_t begin, int64_t end) {
  std::vector<T> row(static_cast<size_t>(p.dim)), d_hat(static_cast<size_t>(p.dim));
  for (int64_t i = begin; i < end; i++) {
    const T* x = rows.x_hat + i * p.dim;
    T target = 0;
    if (rows.target_row[i] >= 0) {
      read_row(p.w, rows.target_row[i], p.dim, row.data());
      target = T(g.g_cos_y[i] * (p.normalize_w ? inverse_norm(row.data(), p.dim) : 1));
    }
    const T red = g.g_red[i] * p.scale[i], sum = g.g_sum_u[i] * p.scale[i];
    for (int64_t d = 0; d < p.dim; d++)
      d_hat[d] =
          (o_red ? red * o_red[i * p.dim + d] : T(0)) + (o_sum ? sum * o_sum[i * p.dim + d] : T(0)) + target * row[d];
    const bool constant = !in.normalize_x || rows.inv[i] >= T(1 / kEps);  // no norm, or a clamped one
    const T along = constant ? T(0) : T(dot(d_hat.data(), x, p.dim));
    for (int64_t d = 0; d < p.dim; d++) d_hat[d] = (d_hat[d] - along * x[d]) * rows.inv[i];
    if (p.target[i] == kIgnored) std::fill(d_hat.begin(), d_hat.end(), T(0));
    write_row(in.x.storage, d_hat.data(), p.dim, d_x, i);
  }
}

template <class T>
void lose_rows(const Problem<T>& p, const Form<double>& target_form, const T* cos_y, const T* red,
               const LossOut<T>& out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const double scale = p.scale[i];
    const bool takes_part = p.target[i] != kIgnored;
    const Transformed<double> t = target<double>(cos_y[i], target_form);
    const Transformed<double> l = softplus_of(double(red[i]) - scale * t.value);
    out.loss[i] = takes_part ? T(l.value) : T(0);
    out.by_red[i] = takes_part ? T(l.slope) : T(0);
    out.by_cos_y[i] = takes_part ? T(-l.slope * scale * (p.unit_slope ? 1 : t.slope)) : T(0);
    out.by_scale[i] = takes_part ? T(-l.slope * t.value) : T(0);
  }
}

template void prepare_rows(const Problem<float>&, const RowsIn&, const RowsOut<float>&, int64_t, int64_t);
template void prepare_rows(const Problem<double>&, const RowsIn&, const RowsOut<double>&, int64_t, int64_t);
template void finish_rows(const Problem<float>&, const RowsIn&, const RowsOut<float>&, const BackwardIn<float>&,
                          const float*, const float*, void*, int64_t, int64_t);
template void finish_rows(const Problem<double>&, const RowsIn&, const RowsOut<double>&, const BackwardIn<double>&,
                          const double*, const double*, void*, int64_t, int64_t);
template void lose_rows(const Problem<float>&, const Form<double>&, const float*, const float*, const LossOut<float>&,
                        int64_t, int64_t);
template void lose_rows(const Problem<double>&, const Form<double>&, const double*, const double*,
                        const LossOut<double>&, int64_t, int64_t);

}  // namespace fused_margin
