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

// What comes into a backward.
struct Upstream {
  const Tensor &g_red, &g_cos_y, &g_sum_u, &red, &aux;
};

// A call's rows as the chunks of its backward read them.
class BackwardCall {
 public:
  BackwardCall(Call& call, const Upstream& in, const Vector& d_scale) : call(call) {
    call.make_operands();
    const Problem& p = call.p;
    const Tensor &x = call.x, &aux = in.aux;
    STD_TORCH_CHECK(aux.dim() == 2 && aux.size(0) == kAuxRows && aux.size(1) == p.batch && aux.is_contiguous() &&
                        aux.scalar_type() == ScalarType::Float,
                    "fused_margin: aux must be contiguous, float32 and of shape [6, ", p.batch, "]");
    scaled_ = make(x, {p.padded, p.operand_row}, type_of(p.operand)), unit_ = make(x, {1});
    coefficients_ = make(x, {kCoefficients, p.padded}), inverse_x_ = make(x, {p.padded});
    target_row_ = make(x, {p.padded}, ScalarType::Int), order_ = make(x, {p.batch}, ScalarType::Int);
    sorted_class_ = make(x, {p.batch}, ScalarType::Int);
    const float* aux_rows = aux.const_data_ptr<float>();
    g_cos_y = vector_of("g_cos_y", in.g_cos_y, p.batch);
    rows = {p,
            vector_of("g_red", in.g_red, p.batch),
            vector_of("g_sum_u", in.g_sum_u, p.batch),
            vector_of("red", in.red, p.batch),
            {aux_rows + (kAuxRows - 1) * p.batch, Storage::f32, 1},
            aux_rows,
            scaled_->mutable_data_ptr(),
            floats(*coefficients_),
            floats(*unit_),
            floats(*inverse_x_),
            ints(*target_row_),
            ints(*order_),
            ints(*sorted_class_),
            d_scale};
  }

  // Launches that read w at the targets: before any chunk that changes it.
  void run_rows() const { call.run("backward_rows", rows); }
  void run_prologue() const { call.run("prologue", Prologue{call.p, nullptr, false, {}}); }

  // What is multiplied by G for dW [batch, dim].
  Tensor scaled() const { return corner(*scaled_, call.p.batch, call.p.dim); }
  FinishWeights finish(int64_t first_row, int64_t count, float* products, const float* earlier,
                       const Matrix& d_w) const {
    return {call.p,     first_row,         count,           products, rows.unit, rows.inverse_x,
            rows.order, rows.sorted_class, rows.target_row, g_cos_y,  earlier,   d_w};
  }

  Call& call;
  BackwardRows rows;
  Vector g_cos_y;

 private:
  std::optional<Tensor> scaled_, unit_, coefficients_, inverse_x_, target_row_, order_, sorted_class_;
};

// What a backward makes; null where nobody wants it.
struct Made {
  Tensor *o, *d_w, *d_bias;  // o [B, D]: sum_j G_ij w_hat_j
  const Update* update;      // what takes the gradient of the weights in the place of d_w
};

// G of a chunk of classes at a time, and the products with it; o is added up over the chunks in their order.
//
// Of several calls, whose gradients make one update, each leaves a chunk's in `sum` but the last, which uses it up: no
// call comes to a chunk after its weights have changed. o and d_bias are of a single call.
void run_chunks(const std::vector<const BackwardCall*>& calls, const Made& made) {
  const Problem& p = calls[0]->call.p;  // of the weights, what any call says
  const Tensor& x = calls[0]->call.x;
  const int tile_classes = calls[0]->call.plan.tile_classes;
  int64_t chunk = calls[0]->call.plan.chunk, batch = 0;
  for (const BackwardCall* c : calls)
    chunk = std::min(chunk, c->call.plan.chunk), batch = std::max(batch, c->call.p.batch);
  const int64_t columns = chunk * p.sub_centers, parts = kBiasParts * calls[0]->call.plan.blocks;
  const bool to_w = made.d_w || made.update, to_gradient = made.o || to_w;
  const bool in_place = made.d_w && made.d_w->scalar_type() == ScalarType::Float;
  Tensor gradient = make(x, {batch, to_gradient ? columns : 0}, type_of(p.operand));
  Tensor w_hat = make(x, {made.o ? columns : 0, p.dim}, type_of(p.operand));
  Tensor part_o = make(x, {made.o ? p.batch : 0, p.dim});
  Tensor products = make(x, {to_w && !in_place ? columns : 0, p.dim});
  Tensor sum = make(x, {calls.size() > 1 ? columns : 0, p.dim});
  Tensor bias_parts = make(x, {parts, made.d_bias ? chunk * p.group : 0});
  for (int64_t first = 0; first < p.classes; first += chunk) {
    const int64_t classes = std::min(chunk, p.classes - first), first_row = first * p.sub_centers;
    const int64_t rows = classes * p.sub_centers, tiles = div_up(classes, tile_classes);
    for (const BackwardCall* c : calls) {
      const Call& call = c->call;
      call.run("gradient", Gradient{call.p, c->rows.coefficients, first / tile_classes, tiles,
                                    splits_of(tiles, call.plan.blocks, call.plan.programs),
                                    to_gradient ? gradient.mutable_data_ptr() : nullptr, columns,
                                    made.d_bias ? floats(bias_parts) : nullptr});
      const Tensor g = corner(gradient, call.p.batch, to_gradient ? rows : 0);
      if (to_w) {
        Tensor target = in_place ? torch::stable::narrow(*made.d_w, 0, first_row, rows)
                                 : torch::stable::narrow(products, 0, 0, rows);
        multiply(torch::stable::transpose(g, 0, 1), c->scaled(), target);
        const float* earlier = c == calls.front() ? nullptr : floats(sum);
        if (made.update && c == calls.back()) {
          call.run("update_weights",
                   UpdateWeights{c->finish(first_row, rows, floats(target), earlier, {}), *made.update});
        } else {
          Matrix d_w = matrix_of(made.update ? sum : *made.d_w);
          if (!made.update) d_w.data = static_cast<const char*>(d_w.data) + first_row * p.dim * size_of(d_w.storage);
          call.run("finish_weights", c->finish(first_row, rows, floats(target), earlier, d_w));
        }
      }
      if (made.o) {
        call.run("unit_weights", UnitWeights{p, first_row, rows, w_hat.mutable_data_ptr()});
        Tensor& part = first ? part_o : *made.o;
        multiply(g, torch::stable::narrow(w_hat, 0, 0, rows), part);
        if (first) call.run("add", Add{floats(*made.o), floats(part_o), p.batch * p.dim});
      }
      if (made.d_bias)
        call.run("finish_bias", FinishBias{p, first, classes, parts, tiles * kSlots, floats(bias_parts),
                                           vector_of("d_bias", *made.d_bias, p.classes)});
    }
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
  STD_TORCH_CHECK(!(need & kBias) || bias, "fused_margin: a gradient of a bias is asked for, but there is none");
  const auto if_needed = [&](int64_t flag, const Tensor& like, std::vector<int64_t> shape) {
    return make(x, need & flag ? shape : std::vector<int64_t>{0}, need & flag ? like.scalar_type() : ScalarType::Float);
  };
  const int64_t batch = call.p.batch, dim = call.p.dim, classes = call.p.classes;
  Tensor d_x = if_needed(kX, x, {batch, dim}), d_w = if_needed(kW, w, {classes * call.p.sub_centers, dim});
  Tensor d_scale = if_needed(kScale, scale, {batch}), d_bias = if_needed(kBias, bias ? *bias : x, {classes});
  const BackwardCall rows(call, {g_red, g_cos_y, g_sum_u, red, aux},
                          need & kScale ? vector_of("d_scale", d_scale, batch) : Vector{nullptr, Storage::f32, 0});
  rows.run_rows();

  Tensor sum = make(x, {need & kX ? batch : 0, dim});
  if (need & (kX | kW | kBias)) {
    rows.run_prologue();
    const auto wanted = [&](int64_t flag, Tensor& t) { return need & flag ? &t : nullptr; };
    run_chunks({&rows}, {wanted(kX, sum), wanted(kW, d_w), wanted(kBias, d_bias), nullptr});
  }
  if (need & kX) {
    if (!classes) torch::stable::zero_(sum);
    call.run("finish_x", FinishX{call.p, floats(sum), rows.rows.coefficients + 4 * call.p.padded, rows.g_cos_y,
                                 rows.rows.target_row, matrix_of(d_x)});
  }
  return {d_x, d_w, d_scale, d_bias};
}

#include "step.h"

}  // namespace gpu
}  // namespace fused_margin

STABLE_TORCH_LIBRARY_IMPL(fused_margin_cuda, FM_DISPATCH_KEY, m) {
  m.impl("target_cosine", TORCH_BOX(&fused_margin::gpu::target_cosine));
  m.impl("sweep", TORCH_BOX(&fused_margin::gpu::sweep));
  m.impl("sweep_loss", TORCH_BOX(&fused_margin::gpu::sweep_loss));
  m.impl("sweep_backward", TORCH_BOX(&fused_margin::gpu::sweep_backward));
  m.impl("update_rows", TORCH_BOX(&fused_margin::gpu::update_rows));
  m.impl("sweep_step", TORCH_BOX(&fused_margin::gpu::sweep_step));
}

// For tests: programs at one time and classes of a chunk, 0 as shipped.
extern "C" __attribute__((visibility("default"))) void fm_cuda_cut(int64_t programs, int64_t chunk_classes) {
  fused_margin::gpu::cut() = {programs, chunk_classes};
}
