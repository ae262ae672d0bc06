// The operators of the CUDA backend; see call.h for how their tensors are read.
//
// Schemas are declared in fused_margin/backends/cuda.py; autograd and fake kernels in fused_margin/ops.py.
#include "../read_form.h"
#include "call.h"

#ifndef FM_DISPATCH_KEY
#define FM_DISPATCH_KEY CUDA
#endif

namespace fused_margin {
namespace gpu {

Tensor target_cosine(Tensor x, Tensor w, Tensor labels, MaybeTensor index, int64_t rule, bool unit_slope,
                     int64_t reduction, int64_t sub_centers, bool normalize_x, bool normalize_w, int64_t operand,
                     int64_t num_classes, int64_t first_class, int64_t ignore_index, int64_t want) {
  const Options o{rule,    unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  operand, num_classes, first_class, ignore_index, want};
  const Call call({x, w, labels, {}, {}, {}, index, {}}, o);
  Tensor cos_y = make(x, {call.p.batch});
  call.run("target_cosine", Prologue{call.p, floats(cos_y), false, {}});
  return cos_y;
}

struct Swept {
  Tensor red, cos_y, sum_u, aux;
};

Swept run_sweep(Call& call, bool has_threshold = false, const Form<double>& threshold = {}) {
  const Tensor& x = call.x;
  call.make_operands();
  const Problem& p = call.p;
  Swept out{make(x, {p.batch}), make(x, {p.batch}), make(x, {p.batch}), make(x, {kAuxRows, p.batch})};
  call.run("prologue", Prologue{p, floats(out.cos_y), has_threshold, threshold});
  const int64_t splits = call.plan.splits;
  Tensor state = make(x, {p.padded, kPartsOfSplit * splits, kStates});
  call.run("forward", Forward{p, call.plan.tiles, splits, floats(state)});
  call.run("merge",
           Merge{p, floats(state), kPartsOfSplit * splits, floats(out.red), floats(out.sum_u), floats(out.aux)});
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sweep(
    Tensor x, Tensor w, Tensor labels, Tensor scale, MaybeTensor tau, MaybeTensor bias, MaybeTensor index,
    Tensor rule_args, int64_t rule, bool unit_slope, int64_t reduction, int64_t sub_centers, bool normalize_x,
    bool normalize_w, int64_t operand, int64_t num_classes, int64_t first_class, int64_t ignore_index, int64_t want) {
  const Options o{rule,    unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  operand, num_classes, first_class, ignore_index, want};
  Call call({x, w, labels, scale, tau, bias, index, rule_args}, o);
  const Swept out = run_sweep(call);
  return {out.red, out.cos_y, out.sum_u, out.aux, make(x, {0}), make(x, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sweep_loss(Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor rule_args,
                                                      int64_t rule, bool unit_slope, int64_t reduction,
                                                      int64_t sub_centers, bool normalize_x, bool normalize_w,
                                                      int64_t operand, int64_t num_classes, int64_t first_class,
                                                      int64_t ignore_index, int64_t want, Tensor forms,
                                                      int64_t loss_reduction) {
  const Options o{rule,    unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  operand, num_classes, first_class, ignore_index, want};
  Call call({x, w, labels, scale, {}, {}, {}, rule_args}, o);
  const bool has_threshold = forms.numel() > 5;
  Swept out = run_sweep(call, has_threshold, has_threshold ? read_form(forms, 1) : Form<double>{});
  const Problem& p = call.p;
  Tensor losses = make(x, {p.batch}), rows = make(x, {6, p.batch}), reduced = make(x, {});
  call.run("loss", Loss{p, read_form(forms, 0), LossReduction(loss_reduction), floats(out.cos_y), floats(out.red),
                        floats(out.aux) + (kAuxRows - 1) * p.batch, p.constants + 2 * p.padded, floats(losses),
                        floats(rows), floats(reduced)});
  return {loss_reduction == kNone ? losses : reduced, rows, out.aux, make(x, {0})};
}

// What the chunks of the backward share.
struct Backward {
  Call& call;
  const BackwardRows& rows;
  Tensor &scaled, &d_w, &d_bias, &o;  // o [B, D]: sum_j G_ij w_hat_j
  Vector g_cos_y;
  bool to_x, to_w, to_bias;
};

// G of a chunk of classes at a time, and the products with it; o is added up over the chunks in their order.
void run_chunks(const Backward& b) {
  const Problem& p = b.call.p;
  const Plan& plan = b.call.plan;
  const Tensor& x = b.call.x;
  const int64_t chunk = plan.chunk, columns = chunk * p.sub_centers, parts = kBiasParts * plan.blocks;
  const bool to_gradient = b.to_x || b.to_w, in_place = b.to_w && b.d_w.scalar_type() == ScalarType::Float;
  Tensor gradient = make(x, {p.batch, to_gradient ? columns : 0}, type_of(p.operand));
  Tensor w_hat = make(x, {b.to_x ? columns : 0, p.dim}, type_of(p.operand));
  Tensor part_o = make(x, {b.to_x ? p.batch : 0, p.dim});
  Tensor products = make(x, {b.to_w && !in_place ? columns : 0, p.dim});
  Tensor bias_parts = make(x, {parts, b.to_bias ? chunk * p.group : 0});
  Tensor scaled_rows = torch::stable::narrow(b.scaled, 0, 0, p.batch);
  scaled_rows = torch::stable::narrow(scaled_rows, 1, 0, p.dim);
  for (int64_t first = 0; first < p.classes; first += chunk) {
    const int64_t classes = std::min(chunk, p.classes - first), first_row = first * p.sub_centers;
    const int64_t rows = classes * p.sub_centers, tiles = div_up(classes, plan.tile_classes);
    b.call.run("gradient", Gradient{p, b.rows.coefficients, first / plan.tile_classes, tiles,
                                    splits_of(tiles, plan.blocks, plan.programs),
                                    to_gradient ? gradient.mutable_data_ptr() : nullptr, columns,
                                    b.to_bias ? floats(bias_parts) : nullptr});
    Tensor g = torch::stable::narrow(gradient, 1, 0, to_gradient ? rows : 0);
    if (b.to_w) {
      Tensor target =
          in_place ? torch::stable::narrow(b.d_w, 0, first_row, rows) : torch::stable::narrow(products, 0, 0, rows);
      multiply(torch::stable::transpose(g, 0, 1), scaled_rows, target);
      Matrix d_w = matrix_of(b.d_w);
      d_w.data = static_cast<const char*>(d_w.data) + first_row * p.dim * size_of(d_w.storage);
      b.call.run("finish_weights", FinishWeights{p, first_row, rows, floats(target), b.rows.unit, b.rows.inverse_x,
                                                 b.rows.order, b.rows.sorted_class, b.rows.target_row, b.g_cos_y, d_w});
    }
    if (b.to_x) {
      b.call.run("unit_weights", UnitWeights{p, first_row, rows, w_hat.mutable_data_ptr()});
      Tensor part = first ? part_o : b.o;
      multiply(g, torch::stable::narrow(w_hat, 0, 0, rows), part);
      if (first) b.call.run("add", Add{floats(b.o), floats(part_o), p.batch * p.dim});
    }
    if (b.to_bias)
      b.call.run("finish_bias", FinishBias{p, first, classes, parts, tiles * kSlots, floats(bias_parts),
                                           vector_of("d_bias", b.d_bias, p.classes)});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sweep_backward(
    Tensor g_red, Tensor g_cos_y, Tensor g_sum_u, Tensor x, Tensor w, Tensor labels, Tensor scale, MaybeTensor tau,
    MaybeTensor bias, MaybeTensor index, Tensor rule_args, Tensor red, Tensor aux, Tensor, Tensor, int64_t rule,
    bool unit_slope, int64_t reduction, int64_t sub_centers, bool normalize_x, bool normalize_w, int64_t operand,
    int64_t num_classes, int64_t first_class, int64_t ignore_index, int64_t want, int64_t need) {
  const Options o{rule,    unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  operand, num_classes, first_class, ignore_index, want};
  Call call({x, w, labels, scale, tau, bias, index, rule_args}, o);
  call.make_operands();
  const Problem& p = call.p;
  STD_TORCH_CHECK(aux.dim() == 2 && aux.size(0) == kAuxRows && aux.size(1) == p.batch && aux.is_contiguous() &&
                      aux.scalar_type() == ScalarType::Float,
                  "fused_margin: aux must be contiguous, float32 and of shape [6, ", p.batch, "]");
  STD_TORCH_CHECK(!(need & kBias) || bias, "fused_margin: a gradient of a bias is asked for, but there is none");
  const auto if_needed = [&](int64_t flag, const Tensor& like, std::vector<int64_t> shape) {
    return make(x, need & flag ? shape : std::vector<int64_t>{0}, need & flag ? like.scalar_type() : ScalarType::Float);
  };
  Tensor d_x = if_needed(kX, x, {p.batch, p.dim}), d_w = if_needed(kW, w, {p.classes * p.sub_centers, p.dim});
  Tensor d_scale = if_needed(kScale, scale, {p.batch}), d_bias = if_needed(kBias, bias ? *bias : x, {p.classes});

  Tensor scaled = make(x, {p.padded, p.operand_row}, type_of(p.operand)), unit = make(x, {1});
  Tensor coefficients = make(x, {kCoefficients, p.padded}), inverse_x = make(x, {p.padded});
  Tensor target_row = make(x, {p.padded}, ScalarType::Int), order = make(x, {p.batch}, ScalarType::Int);
  Tensor sorted_class = make(x, {p.batch}, ScalarType::Int);
  const float* aux_rows = aux.const_data_ptr<float>();
  const BackwardRows rows{p,
                          vector_of("g_red", g_red, p.batch),
                          vector_of("g_sum_u", g_sum_u, p.batch),
                          vector_of("red", red, p.batch),
                          {aux_rows + (kAuxRows - 1) * p.batch, Storage::f32, 1},
                          aux_rows,
                          scaled.mutable_data_ptr(),
                          floats(coefficients),
                          floats(unit),
                          floats(inverse_x),
                          ints(target_row),
                          ints(order),
                          ints(sorted_class),
                          need & kScale ? vector_of("d_scale", d_scale, p.batch) : Vector{nullptr, Storage::f32, 0}};
  call.run("backward_rows", rows);

  Tensor sum = make(x, {need & kX ? p.batch : 0, p.dim});
  const Vector of_target = vector_of("g_cos_y", g_cos_y, p.batch);
  if (need & (kX | kW | kBias)) {
    call.run("prologue", Prologue{p, nullptr, false, {}});
    run_chunks({call, rows, scaled, d_w, d_bias, sum, of_target, bool(need & kX), bool(need & kW), bool(need & kBias)});
  }
  if (need & kX) {
    if (!p.classes) torch::stable::zero_(sum);
    call.run("finish_x",
             FinishX{p, floats(sum), floats(coefficients) + 4 * p.padded, of_target, ints(target_row), matrix_of(d_x)});
  }
  return {d_x, d_w, d_scale, d_bias};
}

}  // namespace gpu
}  // namespace fused_margin

STABLE_TORCH_LIBRARY_IMPL(fused_margin_cuda, FM_DISPATCH_KEY, m) {
  m.impl("target_cosine", TORCH_BOX(&fused_margin::gpu::target_cosine));
  m.impl("sweep", TORCH_BOX(&fused_margin::gpu::sweep));
  m.impl("sweep_loss", TORCH_BOX(&fused_margin::gpu::sweep_loss));
  m.impl("sweep_backward", TORCH_BOX(&fused_margin::gpu::sweep_backward));
}

// For tests: programs at one time and classes of a chunk, 0 as shipped.
extern "C" __attribute__((visibility("default"))) void fm_cuda_cut(int64_t programs, int64_t chunk_classes) {
  fused_margin::gpu::cut() = {programs, chunk_classes};
}
