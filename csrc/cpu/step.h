// The operators of the optimizers: a step with gradients in memory, and one that runs the dW sweep itself.
// Included inside the namespace of ops.cpp; never on its own.

// Where the state lies; it has the weights' shape, `step` one value a row.
struct StateTensors {
  MaybeTensor &m, &v, &step;
};

// `index`: the rows to update, rising, so that no two tasks write the same one.
template <class T>
RowUpdate<T> row_update(Tensor& w, const StateTensors& state, const MaybeTensor& index, const Hyper& hyper) {
  const Weights rows = rows_of(w, index);
  for (int64_t i = 1, n = index ? index->numel() : 0; i < n; i++)
    STD_TORCH_CHECK(rows.index[i - 1] < rows.index[i], "fused_margin: rows to update must rise, but [", i - 1,
                    "] = ", rows.index[i - 1], ", [", i, "] = ", rows.index[i]);
  const auto matrix = [&](MaybeTensor& t) -> T* {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == kType<T> && t->is_contiguous() && t->numel() == w.numel(),
                    "fused_margin: an optimizer's state must be contiguous, of the weights' shape, float64 for float64 "
                    "weights and float32 for others");
    return t->mutable_data_ptr<T>();
  };
  RowUpdate<T> u{hyper, rows, w.mutable_data_ptr(), matrix(state.m), matrix(state.v), nullptr, 1};
  if (state.step) {
    u.together = w.size(0) / std::max<int64_t>(state.step->numel(), 1);
    STD_TORCH_CHECK(state.step->scalar_type() == ScalarType::Float && state.step->is_contiguous() &&
                        state.step->numel() * u.together == w.size(0),
                    "fused_margin: step must be contiguous and float32, one value for each row or class");
    u.step = state.step->mutable_data_ptr<float>();
  }
  STD_TORCH_CHECK(hyper.optimizer == Optimizer::sgd ? u.m || hyper.momentum == 0 : u.m && u.v && u.step,
                  "fused_margin: the optimizer's state is incomplete");
  return u;
}

void update_rows(Tensor w, MaybeTensor m, MaybeTensor v, MaybeTensor step, MaybeTensor index, Tensor grad,
                 int64_t optimizer, double lr, double weight_decay, double momentum, double dampening, bool nesterov,
                 double beta1, double beta2, double eps) {
  const Hyper h{Optimizer(optimizer), lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps};
  by_type(w, [&](auto type) {
    using T = decltype(type);
    const RowUpdate<T> u = row_update<T>(w, {m, v, step}, index, h);
    const int64_t rows = index ? index->numel() : w.size(0);
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == w.size(1), "fused_margin: expected ",
                    rows, " rows of gradient with ", w.size(1), " columns");
    STD_TORCH_CHECK(u.together == 1, "fused_margin: step must have one value for each row");
    const Kernels& kernels = *cpu_path().kernels;
    if constexpr (sizeof(T) == 8)
      kernels.update_f64(u, rows_of(grad), rows, w.size(1), torch_threads());
    else
      kernels.update_f32(u, rows_of(grad), rows, w.size(1), torch_threads());
  });
}

void sweep_step(Tensor w, MaybeTensor m, MaybeTensor v, MaybeTensor step, MaybeTensor index, std::vector<Tensor> g_red,
                std::vector<Tensor> g_cos_y, std::vector<Tensor> g_sum_u, std::vector<Tensor> x,
                std::vector<Tensor> labels, std::vector<Tensor> scale, std::vector<Tensor> tau,
                std::vector<Tensor> bias, std::vector<Tensor> rule_args, std::vector<Tensor> red,
                std::vector<Tensor> aux, std::vector<Tensor> kept, int64_t rule, bool unit_slope, int64_t reduction,
                int64_t sub_centers, bool normalize_x, bool normalize_w, bool bf16, int64_t num_classes,
                int64_t first_class, int64_t ignore_index, int64_t want, int64_t optimizer, double lr,
                double weight_decay, double momentum, double dampening, bool nesterov, double beta1, double beta2,
                double eps) {
  const Options o{rule, unit_slope,  reduction,   sub_centers,  normalize_x, normalize_w,
                  bf16, num_classes, first_class, ignore_index, want};
  const Hyper h{Optimizer(optimizer), lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps};
  by_type(w, [&](auto type) {
    using T = decltype(type);
    const RowUpdate<T> u = row_update<T>(w, {m, v, step}, index, h);
    const size_t count = x.size();
    std::vector<std::unique_ptr<Call<T>>> calls;  // Problem points into them
    std::vector<std::unique_ptr<Upstream<T>>> upstream;
    std::vector<BackwardCall<T>> inputs;
    for (size_t k = 0; k < count; k++) {
      const auto maybe = [&](const std::vector<Tensor>& list) { return list.empty() ? MaybeTensor() : list[k]; };
      calls.push_back(
          std::make_unique<Call<T>>(x[k], w, labels[k], scale[k], maybe(tau), maybe(bias), index, rule_args[k], o));
      calls[k]->keep(kept[k]);
      upstream.push_back(
          std::make_unique<Upstream<T>>(*calls[k], UpstreamTensors{g_red[k], g_cos_y[k], g_sum_u[k], red[k], aux[k]}));
      inputs.push_back({&calls[k]->p, upstream[k]->in});
    }
    STD_TORCH_CHECK(count > 0, "fused_margin: a step needs at least one call of the sweep");
    const CpuPath& path = calls[0]->path;
    if constexpr (sizeof(T) == 8)
      path.kernels->step_f64(inputs.data(), int64_t(count), u, torch_threads());
    else
      path.kernels->step_f32(inputs.data(), int64_t(count), u, torch_threads());
  });
}
