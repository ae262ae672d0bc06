// The operators of the CPU backend on torch's stable ABI: checks values, reads tensors into a Problem, runs the sweep.
//
// Schemas are declared in fused_margin/backends/cpu.py; autograd and fake kernels in fused_margin/ops.py.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "rows.h"
#include "storage.h"
#include "update.h"

namespace fused_margin {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Storage storage_of(const Tensor& t) {
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

Weights rows_of(const Tensor& t, const MaybeTensor& index = {}) {
  STD_TORCH_CHECK(t.dim() == 2, "fused_margin: expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(!index || (index->scalar_type() == ScalarType::Long && index->is_contiguous()),
                  "fused_margin: index must be contiguous and int64");
  for (int64_t i = 0; index && i < index->numel(); i++) {
    const int64_t row = index->const_data_ptr<int64_t>()[i];
    STD_TORCH_CHECK(row >= 0 && row < t.size(0), "index[", i, "] = ", row, " is outside [0, ", t.size(0), ")");
  }
  return {t.const_data_ptr(), storage_of(t), t.stride(0), t.stride(1),
          index ? index->const_data_ptr<int64_t>() : nullptr};
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

// Tasks to torch's threads, each taking the next one: which thread runs a task changes no number.
void run_parallel(int64_t tasks, const std::function<void(int64_t)>& task) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (workers <= 1) {
    for (int64_t t = 0; t < tasks; t++) task(t);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t t = next++; t < tasks; t = next++) task(t);
  });
}

// Page faults of a fresh large result would cost more than writing it: ask for huge pages.
void prefer_huge_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (uintptr_t(t.const_data_ptr()) + page - 1) & ~(page - 1);
  const uintptr_t end = (uintptr_t(t.const_data_ptr()) + uintptr_t(t.numel()) * t.element_size()) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

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
    p.bf16 = o.bf16 && sizeof(T) == 4 && path.products.bf16;
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

  template <class F>
  void by_strips(F f) const {
    run_parallel(div_up(p.batch, kPad), [&](int64_t s) { f(s * kPad, std::min((s + 1) * kPad, p.batch)); });
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
Tensor to_tensor(const Tensor& like, const T* values, int64_t n) {
  Tensor t = torch::stable::new_empty(like, {n}, kType<T>);
  std::copy_n(values, n, t.mutable_data_ptr<T>());
  return t;
}

Tensor target_cosine(Tensor x, Tensor w, Tensor labels, MaybeTensor index, int64_t rule, bool unit_slope,
                     int64_t reduction, int64_t sub_centers, bool normalize_x, bool normalize_w, bool bf16,
                     int64_t num_classes, int64_t first_class, int64_t ignore_index, int64_t want) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  return by_type(x, [&](auto type) {
    using T = decltype(type);
    const Call<T> call(x, w, labels, {}, {}, {}, index, {}, o);
    return to_tensor(x, call.cos_y.data(), call.p.batch);
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_sweep(const Tensor& x, const Call<T>& call) {
  const Problem<T>& p = call.p;
  const auto make = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, std::vector<int64_t>(shape), kType<T>);
  };
  const bool dx = p.want & kDx, sum = p.want & kSum;
  Tensor red = make({p.batch}), sum_u = make({p.batch}), aux = make({kAuxRows, p.batch});
  Tensor o_red = dx ? make({p.batch, p.dim}) : make({0}), o_sum = dx && sum ? make({p.batch, p.dim}) : make({0});
  Tensor partial = make({forward_workspace(p)});
  const ForwardOut<T> out{red.mutable_data_ptr<T>(), aux.mutable_data_ptr<T>(),
                          dx ? o_red.mutable_data_ptr<T>() : nullptr, dx && sum ? o_sum.mutable_data_ptr<T>() : nullptr,
                          partial.mutable_data_ptr<T>()};
  if constexpr (sizeof(T) == 8)
    call.path.kernels->forward_f64(p, out, call.path.products, run_parallel);
  else
    call.path.kernels->forward_f32(p, out, call.path.products, run_parallel);

  const double all_bias = std::accumulate(call.bias.begin(), call.bias.end(), 0.0);
  T* sums = sum_u.mutable_data_ptr<T>();
  for (int64_t i = 0; i < p.batch; i++) {
    const double own = p.bias && p.target[i] >= 0 ? p.bias[p.target[i]] : 0;
    sums[i] = sum ? T(double(p.scale[i]) * out.aux[4 * p.batch + i] + all_bias - own) : T(0);
  }
  return {red, to_tensor(x, call.cos_y.data(), p.batch), sum_u, aux, o_red, o_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sweep(
    Tensor x, Tensor w, Tensor labels, Tensor scale, MaybeTensor tau, MaybeTensor bias, MaybeTensor index,
    Tensor rule_args, int64_t rule, bool unit_slope, int64_t reduction, int64_t sub_centers, bool normalize_x,
    bool normalize_w, bool bf16, int64_t num_classes, int64_t first_class, int64_t ignore_index, int64_t want) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  return by_type(x, [&](auto type) {
    return run_sweep(x, Call<decltype(type)>(x, w, labels, scale, tau, bias, index, rule_args, o));
  });
}

// What comes into a backward beside the inputs of the sweep.
struct UpstreamTensors {
  const Tensor &g_red, &g_cos_y, &g_sum_u, &red, &aux;
};

template <class T>
struct Upstream {
  std::vector<T> g_red, g_cos_y, g_sum_u, red, red_low;
  std::vector<int64_t> by_target;
  BackwardIn<T> in;

  Upstream(const Call<T>& call, const UpstreamTensors& t) {
    const Problem<T>& p = call.p;
    const auto rows = [&](const char* name, const Tensor& v) { return read_vector<T>(name, v, p.batch, p.padded); };
    g_red = rows("g_red", t.g_red);
    g_cos_y = rows("g_cos_y", t.g_cos_y);
    g_sum_u = rows("g_sum_u", t.g_sum_u);
    red = rows("red", t.red);
    red_low.resize(p.padded);
    std::copy_n(t.aux.const_data_ptr<T>() + (kAuxRows - 1) * p.batch, p.batch, red_low.begin());
    const T nothing = T(1e30);  // exp(u - red) must be 0: in a row without rivals, and in the padding
    std::fill(red.begin() + p.batch, red.end(), nothing);
    std::replace(red.begin(), red.end(), -std::numeric_limits<T>::infinity(), nothing);
    by_target.resize(p.batch);
    std::iota(by_target.begin(), by_target.end(), 0);
    std::stable_sort(by_target.begin(), by_target.end(),
                     [&](int64_t a, int64_t b) { return call.target_row[a] < call.target_row[b]; });
    in = {g_red.data(),   g_cos_y.data(),         g_sum_u.data(),  red.data(),
          red_low.data(), call.target_row.data(), by_target.data()};
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& x, const Tensor& w, const Call<T>& call,
                                                        const UpstreamTensors& up, const Tensor& o_red,
                                                        const Tensor& o_sum, int64_t need) {
  const Problem<T>& p = call.p;
  const Upstream<T> upstream(call, up);
  const BackwardIn<T>& in = upstream.in;

  const auto make = [&](bool needed, const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(like, needed ? std::vector<int64_t>(shape) : std::vector<int64_t>{0},
                                    needed ? type : kType<T>);
  };
  Tensor d_x = make(need & kX, x, {p.batch, p.dim}, x.scalar_type());
  Tensor d_w = make(need & kW, w, {p.classes * p.sub_centers, p.dim}, w.scalar_type());
  Tensor d_scale = make(need & kScale, x, {p.batch}, kType<T>);
  Tensor d_bias = make(need & kBias, x, {p.classes}, kType<T>);
  if (need & kX) {
    const auto pointer = [](const Tensor& o) { return o.dim() == 2 ? o.const_data_ptr<T>() : nullptr; };
    call.by_strips([&](int64_t begin, int64_t end) {
      finish_rows(p, call.rows_in, call.rows, in, pointer(o_red), pointer(o_sum), d_x.mutable_data_ptr(), begin, end);
    });
  }
  if (need & kScale) {
    const T* aux = up.aux.const_data_ptr<T>();
    T* d = d_scale.mutable_data_ptr<T>();
    for (int64_t i = 0; i < p.batch; i++)
      d[i] = in.g_red[i] * aux[3 * p.batch + i] + in.g_sum_u[i] * aux[4 * p.batch + i];
  }
  if (need & (kW | kBias)) {
    prefer_huge_pages(d_w);
    const BackwardOut<T> out{need & kW ? d_w.mutable_data_ptr() : nullptr,
                             need & kBias ? d_bias.mutable_data_ptr<T>() : nullptr};
    if constexpr (sizeof(T) == 8)
      call.path.kernels->backward_f64(p, in, out, call.path.products, run_parallel);
    else
      call.path.kernels->backward_f32(p, in, out, call.path.products, run_parallel);
  }
  return {d_x, d_w, d_scale, d_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sweep_backward(
    Tensor g_red, Tensor g_cos_y, Tensor g_sum_u, Tensor x, Tensor w, Tensor labels, Tensor scale, MaybeTensor tau,
    MaybeTensor bias, MaybeTensor index, Tensor rule_args, Tensor red, Tensor aux, Tensor o_red, Tensor o_sum,
    int64_t rule, bool unit_slope, int64_t reduction, int64_t sub_centers, bool normalize_x, bool normalize_w,
    bool bf16, int64_t num_classes, int64_t first_class, int64_t ignore_index, int64_t want, int64_t need) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  return by_type(x, [&](auto type) {
    const Call<decltype(type)> call(x, w, labels, scale, tau, bias, index, rule_args, o);
    return run_backward(x, w, call, {g_red, g_cos_y, g_sum_u, red, aux}, o_red, o_sum, need);
  });
}

#include "step.h"

}  // namespace
}  // namespace fused_margin

STABLE_TORCH_LIBRARY_IMPL(fused_margin_cpu, CPU, m) {
  m.impl("target_cosine", TORCH_BOX(&fused_margin::target_cosine));
  m.impl("sweep", TORCH_BOX(&fused_margin::sweep));
  m.impl("sweep_backward", TORCH_BOX(&fused_margin::sweep_backward));
  m.impl("sweep_step", TORCH_BOX(&fused_margin::sweep_step));
  m.impl("update_rows", TORCH_BOX(&fused_margin::update_rows));
}
