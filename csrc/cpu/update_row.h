// One row of weights and state, given its gradient; see update.h.
// Included inside the namespace of an instruction set; never on its own.

FM_INLINE Vec<float> root(Vec<float> v) {
#if defined(__x86_64__) && FM_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__x86_64__) && FM_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#else
  for (int64_t l = 0; l < kLanes<float>; l++) v[l] = std::sqrt(v[l]);
  return v;
#endif
}
FM_INLINE Vec<double> root(Vec<double> v) {
  for (int64_t l = 0; l < kLanes<double>; l++) v[l] = std::sqrt(v[l]);
  return v;
}

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

// What depends on a row's number of steps t alone; rows next to each other mostly have seen the same.
template <class T>
struct Correction {
  double t = 0;
  T size, root_scale;  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)

  void at(const Hyper& h, double steps) {
    if (steps == t) return;
    t = steps;
    size = T(h.lr / (1 - std::pow(h.beta1, t)));
    root_scale = T(1 / std::sqrt(1 - std::pow(h.beta2, t)));
  }
};

template <class T>
void update_sgd(const Hyper& h, bool first, int64_t dim, T* g, T* w, T* m) {
  const T lr = T(h.lr), decay = T(h.weight_decay), momentum = T(h.momentum), own = first ? T(1) : T(1 - h.dampening);
  by_vectors<T>(dim, g, w, m, nullptr, [&](Vec<T> grad, Vec<T>& at, Vec<T>& mean, Vec<T>&) {
    grad += decay * at;
    if (m) {
      mean = momentum * mean + own * grad;
      grad = h.nesterov ? grad + momentum * mean : mean;
    }
    at -= lr * grad;
  });
}

template <class T>
void update_adamw(const Hyper& h, const Correction<T>& c, int64_t dim, T* g, T* w, T* m, T* v) {
  const T keep = T(1 - h.lr * h.weight_decay), own1 = T(1 - h.beta1), beta2 = T(h.beta2), own2 = T(1 - h.beta2);
  const T eps = T(h.eps);
  by_vectors<T>(dim, g, w, m, v, [&](Vec<T> grad, Vec<T>& at, Vec<T>& mean, Vec<T>& square) {
    at *= keep;
    mean += own1 * (grad - mean);
    square = beta2 * square + own2 * grad * grad;
    at -= c.size * mean / (root(square) * c.root_scale + eps);
  });
}

// Row r with the gradient g [dim]. `w`: the row's values as T, which may be the row itself; else they are overwritten.
template <class T>
void update_row(const RowUpdate<T>& u, int64_t r, int64_t dim, T* g, T* w, Correction<T>& correction) {
  const int64_t row = row_number(u.w, r);
  T *m = u.m ? u.m + row * dim : nullptr, *v = u.v ? u.v + row * dim : nullptr;
  const float before = u.step ? u.step[row / u.together] : 0;
  if (u.step && row % u.together == u.together - 1) u.step[row / u.together] = before + 1;
  if (u.h.optimizer == Optimizer::sgd) {
    update_sgd(u.h, u.step && before == 0, dim, g, w, m);
  } else {
    correction.at(u.h, double(before) + 1);
    update_adamw(u.h, correction, dim, g, w, m, v);
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
    Correction<T> correction;
    for (int64_t r = task * kUpdateRows; r < std::min(rows, (task + 1) * kUpdateRows); r++) {
      read_row(grad, r, dim, g);
      update_row(u, r, dim, g, const_cast<T*>(row_of(u.w, r, dim, copy)), correction);
    }
  });
}
