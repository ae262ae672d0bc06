// The operators of the CPU backend on torch's stable ABI; see call.h for how their tensors are read.
//
// Schemas are declared in fused_margin/backends/cpu.py; autograd and fake kernels in fused_margin/ops.py.
#include <memory>

#include "../read_form.h"
#include "call.h"
#include "update.h"

namespace fused_margin {
namespace {

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

// Everything that a sweep finds, in the places of `out`, which has no workspace yet.
template <class T>
void run_forward(const Tensor& x, const Call<T>& call, ForwardOut<T> out) {
  Tensor partial = make<T>(x, {forward_workspace(call.p)});
  out.partial = partial.mutable_data_ptr<T>();
  if constexpr (sizeof(T) == 8)
    call.path.kernels->forward_f64(call.p, out, torch_threads());
  else
    call.path.kernels->forward_f32(call.p, out, torch_threads());
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_sweep(const Tensor& x, const Call<T>& call) {
  const Problem<T>& p = call.p;
  const bool dx = p.want & kDx, sum = p.want & kSum;
  Tensor red = make<T>(x, {p.batch}), sum_u = make<T>(x, {p.batch}), aux = make<T>(x, {kAuxRows, p.batch});
  Tensor o_red = dx ? make<T>(x, {p.batch, p.dim}) : make<T>(x, {0});
  Tensor o_sum = dx && sum ? make<T>(x, {p.batch, p.dim}) : make<T>(x, {0});
  const ForwardOut<T> out{red.mutable_data_ptr<T>(), aux.mutable_data_ptr<T>(),
                          dx ? o_red.mutable_data_ptr<T>() : nullptr,
                          dx && sum ? o_sum.mutable_data_ptr<T>() : nullptr};
  run_forward(x, call, out);

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
    Tensor rule_args, Tensor kept, int64_t rule, bool unit_slope, int64_t reduction, int64_t sub_centers,
    bool normalize_x, bool normalize_w, bool bf16, int64_t num_classes, int64_t first_class, int64_t ignore_index,
    int64_t want) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  return by_type(x, [&](auto type) {
    Call<decltype(type)> call(x, w, labels, scale, tau, bias, index, rule_args, o);
    call.keep(kept);
    return run_sweep(x, call);
  });
}

// The sweep and what follows on [B] for a margin that margins.h knows: the losses, their mean or sum, and their slopes.
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_loss(const Tensor& x, Call<T>& call, const Tensor& forms,
                                                    int64_t loss_reduction) {
  const Problem<T>& p = call.p;
  if (forms.numel() > 5) {
    const Form<double> threshold = read_form(forms, 1);
    for (int64_t i = 0; i < p.batch; i++) call.tau[i] = T(target<double>(call.cos_y[i], threshold).value);
  }
  const bool dx = p.want & kDx, each = loss_reduction == kNone;
  Tensor rows = make<T>(x, {6, p.batch}), aux = make<T>(x, {kAuxRows, p.batch});
  Tensor o_red = dx ? make<T>(x, {p.batch, p.dim}) : make<T>(x, {0}),
         loss = each ? make<T>(x, {p.batch}) : make<T>(x, {});
  T* row[6];  // as spec.Rows has them
  for (int64_t k = 0; k < 6; k++) row[k] = rows.template mutable_data_ptr<T>() + k * p.batch;
  T *red = row[3], *o = dx ? o_red.template mutable_data_ptr<T>() : nullptr;
  run_forward(x, call,
              {red, aux.template mutable_data_ptr<T>(), o, nullptr});  // without o_sum: no loss here has a sum_u
  std::copy_n(call.cos_y.data(), p.batch, row[4]);
  std::copy_n(call.tau.data(), p.batch, row[5]);
  std::vector<T> row_losses(each ? 0 : p.batch);  // of which only the sum leaves
  T* losses = each ? loss.template mutable_data_ptr<T>() : row_losses.data();
  const LossOut<T> out{losses, row[0], row[1], row[2]};
  const Form<double> form = read_form(forms, 0);
  call.by_strips([&](int64_t begin, int64_t end) { lose_rows(p, form, call.cos_y.data(), red, out, begin, end); });
  if (each) return {loss, rows, aux, o_red};
  const double sum = std::accumulate(losses, losses + p.batch, 0.0);
  const auto valid = std::count_if(p.target, p.target + p.batch, [](int64_t y) { return y != kIgnored; });
  const double share = loss_reduction == kMean ? 1.0 / double(std::max<int64_t>(valid, 1)) : 1.0;
  for (int64_t k = 0; k < 3 * p.batch; k++) row[0][k] = T(row[0][k] * share);  // the three slopes
  *loss.template mutable_data_ptr<T>() = T(sum * share);
  return {loss, rows, aux, o_red};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sweep_loss(Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor rule_args,
                                                      Tensor kept, int64_t rule, bool unit_slope, int64_t reduction,
                                                      int64_t sub_centers, bool normalize_x, bool normalize_w,
                                                      bool bf16, int64_t num_classes, int64_t first_class,
                                                      int64_t ignore_index, int64_t want, Tensor forms,
                                                      int64_t loss_reduction) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  return by_type(x, [&](auto type) {
    Call<decltype(type)> call(x, w, labels, scale, {}, {}, {}, rule_args, o);
    call.keep(kept);
    return run_loss(x, call, forms, loss_reduction);
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
std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& x, Tensor& d_w, const Call<T>& call,
                                                const UpstreamTensors& up, const Tensor& o_red, const Tensor& o_sum,
                                                int64_t need) {
  const Problem<T>& p = call.p;
  const Upstream<T> upstream(call, up);
  const BackwardIn<T>& in = upstream.in;

  Tensor d_x = need & kX ? make<T>(x, {p.batch, p.dim}, x.scalar_type()) : make<T>(x, {0});
  Tensor d_scale = make<T>(x, {need & kScale ? p.batch : 0}), d_bias = make<T>(x, {need & kBias ? p.classes : 0});
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
    STD_TORCH_CHECK(!(need & kW) || (d_w.is_contiguous() && d_w.numel() == p.classes * p.sub_centers * p.dim &&
                                     storage_of(d_w) == p.w.storage),
                    "fused_margin: the weights' gradient goes to contiguous memory of their type, ",
                    p.classes * p.sub_centers, " x ", p.dim, " numbers");
    const BackwardOut<T> out{need & kW ? d_w.mutable_data_ptr() : nullptr,
                             need & kBias ? d_bias.mutable_data_ptr<T>() : nullptr};
    if constexpr (sizeof(T) == 8)
      call.path.kernels->backward_f64(p, in, out, torch_threads());
    else
      call.path.kernels->backward_f32(p, in, out, torch_threads());
  }
  return {d_x, d_scale, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> sweep_backward(Tensor g_red, Tensor g_cos_y, Tensor g_sum_u, Tensor x, Tensor w,
                                                  Tensor labels, Tensor scale, MaybeTensor tau, MaybeTensor bias,
                                                  MaybeTensor index, Tensor rule_args, Tensor red, Tensor aux,
                                                  Tensor o_red, Tensor o_sum, Tensor kept, Tensor d_w, int64_t rule,
                                                  bool unit_slope, int64_t reduction, int64_t sub_centers,
                                                  bool normalize_x, bool normalize_w, bool bf16, int64_t num_classes,
                                                  int64_t first_class, int64_t ignore_index, int64_t want,
                                                  int64_t need) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  return by_type(x, [&](auto type) {
    Call<decltype(type)> call(x, w, labels, scale, tau, bias, index, rule_args, o);
    call.keep(kept);
    return run_backward(x, d_w, call, {g_red, g_cos_y, g_sum_u, red, aux}, o_red, o_sum, need);
  });
}

#include "step.h"

}  // namespace
}  // namespace fused_margin

STABLE_TORCH_LIBRARY_IMPL(fused_margin_cpu, CPU, m) {
  m.impl("target_cosine", TORCH_BOX(&fused_margin::target_cosine));
  m.impl("sweep", TORCH_BOX(&fused_margin::sweep));
  m.impl("sweep_loss", TORCH_BOX(&fused_margin::sweep_loss));
  m.impl("sweep_backward", TORCH_BOX(&fused_margin::sweep_backward));
  m.impl("sweep_step", TORCH_BOX(&fused_margin::sweep_step));
  m.impl("update_rows", TORCH_BOX(&fused_margin::update_rows));
}
