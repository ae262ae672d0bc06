// A call of an operator: reads its tensors into a Problem, checks values, and holds the memory that the Problem points to.
// The only header here that knows torch (its stable ABI).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "rows.h"
#include "storage.h"

namespace fused_margin {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      STD_TORCH_CHECK(false, "fused_margin: expected a float32, float64, bfloat16 or float16 tensor");
  }
  return Storage::f32;
}

inline Weights rows_of(const Tensor& t, const MaybeTensor& index = {}) {
  STD_TORCH_CHECK(t.dim() == 2, "fused_margin: expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(!index || (index->scalar_type() == ScalarType::Long && index->is_contiguous()),
                  "fused_margin: index must be contiguous and int64");
  const int64_t* rows = index ? index->const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0, n = index ? index->numel() : 0, end = t.size(0); i < n; i++)
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < end, "index[", i, "] = ", rows[i], " is outside [0, ", end, ")");
  return {t.const_data_ptr(), storage_of(t), t.stride(0), t.stride(1), rows};
}

// A vector of `expected` values of any float type and stride as T, zero from its end up to `padded`.
template <class T>
std::vector<T> read_vector(const char* name, const MaybeTensor& t, int64_t expected, int64_t padded) {
  std::vector<T> out(static_cast<size_t>(padded));
  if (!t) return out;
  const int64_t n = t->numel(), stride = t->dim() ? t->stride(0) : 1;
  STD_TORCH_CHECK(n == expected, "fused_margin: ", name, " has ", n, " values; expected ", expected);
  storage::visit(storage_of(*t), [&](auto type) {
    using S = decltype(type);
    const S* in = static_cast<const S*>(t->const_data_ptr());
    for (int64_t i = 0; i < n; i++) out[i] = T(S::get(in[i * stride]));
  });
  return out;
}

// Each of torch's threads takes the next task: which one runs it changes no number.
inline void run_on_torch_threads(int64_t tasks, const std::function<void(int64_t)>& task) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (workers <= 1) {
    for (int64_t t = 0; t < tasks; t++) task(t);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;  // the first one; torch's own way would lose what it says
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t t = next++; t < tasks; t = next++) task(t);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}
inline Parallel torch_threads() { return {int64_t(torch::stable::get_num_threads()), run_on_torch_threads}; }

// The static part of a sweep, as backends/cpu.py packs it.
struct Options {
  int64_t rule;
  bool unit_slope;
  int64_t reduction, sub_centers;
  bool normalize_x, normalize_w, bf16;
  int64_t num_classes, first_class, ignore_index, want;
};

// A Problem with the memory that it points to.
template <class T>
struct Call {
  const CpuPath& path = cpu_path();
  Problem<T> p{};
  RowsIn rows_in;
  RowsOut<T> rows;
  std::vector<T> scale, tau, bias, args, x_hat, inv, cos_y;
  std::vector<int64_t> target, target_row;

  Call(const Tensor& x, const Tensor& w, const Tensor& labels, const MaybeTensor& scale_in, const MaybeTensor& tau_in,
       const MaybeTensor& bias_in, const MaybeTensor& index, const MaybeTensor& args_in, const Options& o)
      : rows_in{rows_of(x), o.normalize_x} {
    p.w = rows_of(w, index);
    p.batch = x.size(0);
    p.dim = x.size(1);
    p.padded = round_up(p.batch, kPad);
    const int64_t w_rows = index ? index->numel() : w.size(0);
    STD_TORCH_CHECK(w.size(1) == p.dim, "fused_margin: x has ", p.dim, " columns, w has ", w.size(1));
    STD_TORCH_CHECK(o.sub_centers >= 1 && w_rows % o.sub_centers == 0, "fused_margin: ", w_rows,
                    " rows of w are no multiple of sub_centers = ", o.sub_centers);
    p.sub_centers = o.sub_centers;
    p.classes = w_rows / o.sub_centers;
    p.normalize_w = o.normalize_w;
    p.clamp = o.normalize_x && o.normalize_w;
    p.pieces = sizeof(T) == 8 ? 0 : o.bf16 ? path.kernels->pieces_bf16 : path.kernels->pieces_f32;
    p.rule = static_cast<RuleCode>(o.rule);
    p.unit_slope = o.unit_slope;
    p.reduction = static_cast<Reduction>(o.reduction);
    p.want = int(o.want);
    read_targets(labels, o);
    scale = read_vector<T>("scale", scale_in, p.batch, p.padded);
    tau = read_vector<T>("tau", tau_in, p.batch, p.padded);
    args = read_vector<T>("rule_args", args_in, args_in ? args_in->numel() : 0, kRuleArgs);
    p.scale = scale.data();
    p.tau = tau.data();
    p.args = args.data();
    if (bias_in) {
      bias = read_vector<T>("bias", bias_in, p.classes, p.classes);
      p.bias = bias.data();
    }
    x_hat.resize(p.padded * p.dim);
    inv.resize(p.padded);
    cos_y.resize(p.padded);
    target_row.assign(p.padded, -1);
    p.x_hat = x_hat.data();
    rows = {x_hat.data(), inv.data(), cos_y.data(), target_row.data()};
    by_strips([&](int64_t begin, int64_t end) { prepare_rows(p, rows_in, rows, begin, end); });
  }

  // Memory for the products with the first rows of w, of which it says how many: none, all, or as many as it is for.
  void keep(const Tensor& memory) {
    const int64_t n = memory.numel();
    if (n == 0) return;
    p.kept_rows = p.padded ? n / p.padded : 0;
    STD_TORCH_CHECK(memory.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float) &&
                        memory.is_contiguous() && n == p.kept_rows * p.padded &&
                        p.kept_rows <= p.classes * p.sub_centers,
                    "fused_margin: what is kept of a sweep must be contiguous, of the type of its sums, ", p.padded,
                    " numbers for each row of w; got ", n);
    p.kept = static_cast<T*>(const_cast<void*>(memory.const_data_ptr()));
  }

  template <class F>
  void by_strips(F f) const {
    run_on_torch_threads(div_up(p.batch, kPad), [&](int64_t s) { f(s * kPad, std::min((s + 1) * kPad, p.batch)); });
  }

 private:
  void read_targets(const Tensor& labels, const Options& o) {
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == p.batch,
                    "fused_margin: labels must be int64, one for each of the ", p.batch, " rows");
    target.assign(p.padded, kElsewhere);
    const int64_t* y = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < p.batch; i++) {
      const int64_t label = y[i * labels.stride(0)], here = label - o.first_class;
      if (label == o.ignore_index) target[i] = kIgnored;
      if (label == o.ignore_index) continue;
      if (label < 0 || label >= o.num_classes)  // thrown as it is: for the user, without a place in this file
        throw std::runtime_error("labels[" + std::to_string(i) + "] = " + std::to_string(label) + " is outside [0, " +
                                 std::to_string(o.num_classes) +
                                 ") and is not ignore_index = " + std::to_string(o.ignore_index));
      if (here >= 0 && here < p.classes) target[i] = here;
    }
    p.target = target.data();
  }
};

template <class T>
constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// Calls f with a value of the type that sums have.
template <class F>
auto by_type(const Tensor& x, F f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class T>
Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type = kType<T>) {
  return torch::stable::new_empty(like, shape, type);
}

template <class T>
Tensor to_tensor(const Tensor& like, const T* values, int64_t n) {
  Tensor t = make<T>(like, {n});
  std::copy_n(values, n, t.mutable_data_ptr<T>());
  return t;
}

}  // namespace fused_margin
