// One row of weights and state, given its gradient; see ../update.h.
// Included inside the namespace of an instruction set; never on its own.

// f on vectors of up to four arrays in place; what is left of the row goes through a padded copy.
template <class T, class F>
FM_INLINE void by_vectors(int64_t dim, T* g, T* w, T* m, T* v, const F& f) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t d = 0;
  const auto run = [&](T* g_at, T* w_at, T* m_at, T* v_at) {
    Vec<T> mine[4] = {load(g_at), load(w_at), m ? load(m_at) : Vec<T>{}, v ? load(v_at) : Vec<T>{}};
    f(mine[0], mine[1], mine[2], mine[3]);
    store(w_at, mine[1]);
    if (m) store(m_at, mine[2]);
    if (v) store(v_at, mine[3]);
  };
  for (; d + lanes <= dim; d += lanes) run(g + d, w + d, m + d, v + d);
  if (d == dim) return;
  T rest[4][lanes] = {};
  T* const rows[] = {g, w, m, v};
  for (int k = 0; k < 4; k++)
    if (rows[k]) std::copy(rows[k] + d, rows[k] + dim, rest[k]);
  run(rest[0], rest[1], rest[2], rest[3]);
  for (int k = 1; k < 4; k++)
    if (rows[k]) std::copy_n(rest[k], dim - d, rows[k] + d);
}

// Rows next to each other mostly have seen the same number of steps t.
template <class T>
struct LastCorrection {
  double t = 0;
  Correction<T> value;

  void at(const Hyper& h, double steps) {
    if (steps == t) return;
    t = steps;
    value = {T(h.lr / (1 - std::pow(h.beta1, t))), T(1 / std::sqrt(1 - std::pow(h.beta2, t)))};
  }
};

// Row r with the gradient g [dim]. `w`: the row's values as T, which may be the row itself; else they are overwritten.
template <class T>
void update_row(const RowUpdate<T>& u, int64_t r, int64_t dim, T* g, T* w, LastCorrection<T>& correction) {
  const int64_t row = row_number(u.w, r);
  T *m = u.m ? u.m + row * dim : nullptr, *v = u.v ? u.v + row * dim : nullptr;
  const float before = u.step ? u.step[row / u.together] : 0;
  if (u.step && row % u.together == u.together - 1) u.step[row / u.together] = before + 1;
  if (u.h.optimizer == Optimizer::sgd) {
    const SgdNumbers<T> n = sgd_numbers<T>(u.h, u.step && before == 0);
    by_vectors<T>(dim, g, w, m, nullptr,
                  [&](Vec<T> grad, Vec<T>& at, Vec<T>& mean, Vec<T>&) { update_sgd(n, m, grad, at, mean); });
  } else {
    correction.at(u.h, double(before) + 1);
    const AdamwNumbers<T> n = adamw_numbers<T>(u.h);
    by_vectors<T>(dim, g, w, m, v, [&](Vec<T> grad, Vec<T>& at, Vec<T>& mean, Vec<T>& square) {
      update_adamw<Ops>(n, correction.value, grad, at, mean, square);
    });
  }
  storage::visit(u.w.storage, [&](auto type) {
    using S = decltype(type);
    S* out = static_cast<S*>(u.out) + row * u.w.row_stride;
    if (static_cast<void*>(out) == static_cast<void*>(w)) return;
    for (int64_t d = 0; d < dim; d++) out[d * u.w.col_stride] = S::put(w[d]);
  });
}

constexpr int64_t kUpdateRows = 64;  // of one task

// `rows` rows, their gradients given in memory.
template <class T>
void update_rows(const RowUpdate<T>& u, const Weights& grad, int64_t rows, int64_t dim, const Parallel& parallel) {
  parallel(div_up(rows, kUpdateRows), [&](int64_t task) {
    Scratch scratch(2 * Scratch::room<T>(dim));
    T *g = scratch.take<T>(dim), *copy = scratch.take<T>(dim);
    LastCorrection<T> correction;
    for (int64_t r = task * kUpdateRows; r < std::min(rows, (task + 1) * kUpdateRows); r++) {
      read_row(grad, r, dim, g);
      update_row(u, r, dim, g, const_cast<T*>(row_of(u.w, r, dim, copy)), correction);
    }
  });
}
