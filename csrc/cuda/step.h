// The operators of the optimizers: a step with gradients in memory, and one that runs the dW sweep itself.
// Included inside the namespace of ops.cpp; never on its own.

// Where the state lies; it has the weights' shape, `step` one value a row or a class.
struct StateTensors {
  MaybeTensor &m, &v, &step;
};

// That `index` rises is not checked here, as it would wait for the device: the optimizers give it so.
Update update_of(Tensor& w, const StateTensors& state, const MaybeTensor& index, const Hyper& h) {
  const auto matrix = [&](MaybeTensor& t) -> float* {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == w.numel(),
                    "fused_margin: an optimizer's state must be contiguous, float32 and of the weights' shape");
    return floats(*t);
  };
  STD_TORCH_CHECK(!index || (index->scalar_type() == ScalarType::Long && index->is_contiguous()),
                  "fused_margin: index must be contiguous and int64");
  Update u = {};
  u.w = matrix_of(w);
  u.w.data = w.mutable_data_ptr();
  u.index = index ? index->const_data_ptr<int64_t>() : nullptr;
  u.m = matrix(state.m), u.v = matrix(state.v), u.together = 1;
  if (state.step) {
    u.together = w.size(0) / std::max<int64_t>(state.step->numel(), 1);
    STD_TORCH_CHECK(state.step->scalar_type() == ScalarType::Float && state.step->is_contiguous() &&
                        state.step->numel() * u.together == w.size(0),
                    "fused_margin: step must be contiguous and float32, one value for each row or class");
    u.step = floats(*state.step);
  }
  STD_TORCH_CHECK(h.optimizer == Optimizer::sgd ? u.m || h.momentum == 0 : u.m && u.v && u.step,
                  "fused_margin: the optimizer's state is incomplete");
  u.optimizer = h.optimizer;
  u.sgd = sgd_numbers<float>(h, false), u.adamw = adamw_numbers<float>(h);
  u.lr = float(h.lr), u.log_beta1 = float(std::log(h.beta1)), u.log_beta2 = float(std::log(h.beta2));
  return u;
}

void update_rows(Tensor w, MaybeTensor m, MaybeTensor v, MaybeTensor step, MaybeTensor index, Tensor grad,
                 int64_t optimizer, double lr, double weight_decay, double momentum, double dampening, bool nesterov,
                 double beta1, double beta2, double eps) {
  const Hyper h{Optimizer(optimizer), lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps};
  const Device device(w);
  const Update u = update_of(w, {m, v, step}, index, h);
  const int64_t rows = index ? index->numel() : w.size(0), dim = w.size(1);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == dim, "fused_margin: expected ", rows,
                  " rows of gradient with ", dim, " columns");
  STD_TORCH_CHECK(u.together == 1, "fused_margin: step must have one value for each row");
  const auto run = [&](const char* name, const auto& args) {
    const cudaError_t error = gpu::run(args, device.stream);
    STD_TORCH_CHECK(error == cudaSuccess, "fused_margin: ", name, " of ", rows, " x ", dim,
                    " (rows x dimension): ", cudaGetErrorString(error));
  };
  run("count_steps", CountSteps{u, rows});
  run("update_rows", UpdateRows{u, rows, dim, matrix_of(grad)});
}

void sweep_step(Tensor w, MaybeTensor m, MaybeTensor v, MaybeTensor step, MaybeTensor index, std::vector<Tensor> g_red,
                std::vector<Tensor> g_cos_y, std::vector<Tensor> g_sum_u, std::vector<Tensor> x,
                std::vector<Tensor> labels, std::vector<Tensor> scale, std::vector<Tensor> tau,
                std::vector<Tensor> bias, std::vector<Tensor> rule_args, std::vector<Tensor> red,
                std::vector<Tensor> aux, std::vector<Tensor>, int64_t rule, bool unit_slope, int64_t reduction,
                int64_t sub_centers, bool normalize_x, bool normalize_w, int64_t operand, int64_t num_classes,
                int64_t first_class, int64_t ignore_index, int64_t want, int64_t optimizer, double lr,
                double weight_decay, double momentum, double dampening, bool nesterov, double beta1, double beta2,
                double eps) {
  const Options o{rule,    unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  operand, num_classes, first_class, ignore_index, want};
  const Hyper h{Optimizer(optimizer), lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps};
  STD_TORCH_CHECK(!x.empty(), "fused_margin: a step needs at least one call of the sweep");
  const Device device(w);  // the first to come and the last to go: each call has one too
  const Update u = update_of(w, {m, v, step}, index, h);
  std::vector<std::unique_ptr<Call>> calls;  // the rows point into them
  std::vector<std::unique_ptr<BackwardCall>> rows;
  std::vector<const BackwardCall*> all;
  for (size_t k = 0; k < x.size(); k++) {
    const auto maybe = [&](const std::vector<Tensor>& list) { return list.empty() ? MaybeTensor() : list[k]; };
    calls.push_back(
        std::make_unique<Call>(Inputs{x[k], w, labels[k], scale[k], maybe(tau), maybe(bias), index, rule_args[k]}, o));
    rows.push_back(std::make_unique<BackwardCall>(*calls[k], Upstream{g_red[k], g_cos_y[k], g_sum_u[k], red[k], aux[k]},
                                                  Vector{nullptr, Storage::f32, 0}));
    all.push_back(rows[k].get());
  }
  for (const BackwardCall* call : all) call->run_rows(), call->run_prologue();
  calls[0]->run("count_steps", CountSteps{u, calls[0]->p.classes * calls[0]->p.sub_centers});
  run_chunks(all, {nullptr, nullptr, nullptr, &u});
}
