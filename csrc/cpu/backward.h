// The backward of the sweep: the weights' gradient, each tile's rows finished by the task that owns them.
// Included inside the namespace of an instruction set; never on its own.

// G for the product with x_hat, as T or bf16: [rows of the tile, columns]
template <class T>
struct Slopes {
  T* wide;
  uint16_t* narrow;
};

// From cosines to G = (g_red A + g_sum) s N', rivals only, and the sums of the bias' gradient.
template <RuleCode rule, bool extras, class T>
void weigh_backward(const Problem<T>& p, const BackwardIn<T>& in, const Tile<T>& t, const Cosines<T>& cos,
                    const Slopes<T>& g, T* d_bias) {
  constexpr int64_t lanes = kLanes<T>;
  const bool soft = p.reduction == Reduction::softplus;
  const Vec<T> zero{};
  for (int64_t i = 0; i < cos.columns; i += lanes) {
    const int64_t row = cos.first + i;
    const Vec<T> scale = load(p.scale + row), tau = load(p.tau + row), target = load(cos.place + i);
    const Vec<T> g_red = load(in.g_red + row), g_sum = load(in.g_sum_u + row), red = load(in.red + row);
    const Vec<T> red_low = load(in.red_low + row);
    for (int64_t j = 0; j < t.rows; j++) {
      const Element<T> e = element(p, t, cos, j, i, target);
      const Rival<Vec<T>> n = rival<rule, Ops>(e.c, tau, p.args);
      const Vec<T> u = scale * n.value + t.bias[j];
      Vec<T> a, value;
      if (soft)
        softplus<T>(u, value, a);
      else
        a = exponential(u - red - red_low);
      const Vec<T> g_u = select(e.excluded, zero, g_red * a + g_sum);
      if constexpr (extras) d_bias[j] += lane_sum<T>(g_u);
      const Vec<T> g_c = g_u * scale * (p.unit_slope ? zero + T(1) : n.slope);
      if constexpr (sizeof(T) == 4) {
        if (p.bf16) {
          const Half16 h = to_bf16(g_c);
          __builtin_memcpy(g.narrow + j * cos.columns + i, &h, sizeof h);
          continue;
        }
      }
      store(g.wide + j * cos.columns + i, g_c);
    }
  }
}

template <class T>
void add_gradient(const Problem<T>& p, const TileProducts& products, const PackedRows<T>& x, const Tile<T>& t,
                  const Cosines<T>& cos, const Slopes<T>& g, T* d_w) {
  const bool add = cos.first > 0;
  if constexpr (sizeof(T) == 4) {
    if (p.bf16)
      return products.bf16(t.rows, p.dim, cos.columns, cos.columns, p.dim, p.dim, add, g.narrow,
                           x.rows16.get() + cos.first * p.dim, d_w, true);
  }
  multiply(products, t.rows, p.dim, cos.columns, g.wide, cos.columns, p.x_hat + cos.first * p.dim, p.dim, d_w, p.dim,
           add);
}

// The target's share, in full precision and in the order of the rows: dW_y += g_cos_y x_hat.
template <class T>
void add_targets(const Problem<T>& p, const BackwardIn<T>& in, const Tile<T>& t, T* d_w) {
  const int64_t first = t.first_class * p.sub_centers;
  const int64_t* end = in.by_target + p.batch;
  const int64_t* it = std::lower_bound(in.by_target, end, first,
                                       [&](int64_t row, int64_t value) { return in.target_row[row] < value; });
  for (; it != end && in.target_row[*it] < first + t.rows; ++it) {
    T* out = d_w + (in.target_row[*it] - first) * p.dim;
    const T* x = p.x_hat + *it * p.dim;
    for (int64_t d = 0; d < p.dim; d++) out[d] += in.g_cos_y[*it] * x[d];
  }
}

// From the gradient of w_hat to that of w: what points along w drops out, the rest shrinks with the norm.
template <class T>
void undo_norm(const T* w, T inv, int64_t dim, T* d_w) {
  constexpr int64_t lanes = kLanes<T>;
  if (inv >= T(1 / kEps)) {  // a clamped norm is a constant
    for (int64_t d = 0; d < dim; d++) d_w[d] *= inv;
    return;
  }
  Vec<T> sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= dim; d += 2 * lanes)
    for (int v = 0; v < 2; v++) sums[v] += load(w + d + v * lanes) * load(d_w + d + v * lanes);
  T dot = lane_sum<T>(sums[0] + sums[1]);
  for (; d < dim; d++) dot += w[d] * d_w[d];
  const T along = dot * inv * inv;
  for (d = 0; d < dim; d++) d_w[d] = (d_w[d] - along * w[d]) * inv;
}

// A few consecutive tiles, all rows.
template <RuleCode rule, bool extras, class T>
void backward_task(const Problem<T>& p, const Partition& cut, int64_t group, const BackwardIn<T>& in,
                   const BackwardOut<T>& out, const PackedRows<T>& x, const TileProducts& products) {
  const int64_t tile_rows = cut.tile_classes * p.sub_centers;
  using S = Scratch;
  S scratch(tile_room(p, tile_rows, x.depth) + 2 * S::room<T>(tile_rows * kRowBlock) + S::room<T>(kRowBlock) +
            S::room<T>(tile_rows * p.dim) + S::room<T>(tile_rows));
  Tile<T> tile = make_tile(p, tile_rows, x.depth, scratch);
  Cosines<T> cos{scratch.take<T>(tile_rows * kRowBlock), nullptr, scratch.take<T>(kRowBlock), 0, 0};
  T* g_memory = scratch.take<T>(tile_rows * kRowBlock);
  const Slopes<T> g{g_memory, reinterpret_cast<uint16_t*>(g_memory)};
  T *copy = scratch.take<T>(tile_rows * p.dim), *d_bias = scratch.take<T>(tile_rows);
  const bool in_place = p.w.storage == (sizeof(T) == 8 ? Storage::f64 : Storage::f32);

  const int64_t end = std::min((group + 1) * kBackwardTileGroup, cut.tiles);
  for (int64_t number = group * kBackwardTileGroup; number < end; number++) {
    load_tile(p, number, cut.tile_classes, x.depth, false, tile);
    const int64_t first = tile.first_class * p.sub_centers;
    T* d_w = in_place ? static_cast<T*>(out.d_w) + first * p.dim : copy;
    std::fill_n(d_bias, tile.rows, T(0));
    for (int64_t block = 0; block * kRowBlock < p.padded; block++) {
      compute_cosines(p, products, x, tile, block, cos);
      weigh_backward<rule, extras>(p, in, tile, cos, g, d_bias);
      if (out.d_w) add_gradient(p, products, x, tile, cos, g, d_w);
    }
    for (int64_t j = 0; j < tile.classes && out.d_bias; j++) {
      T* b = d_bias + j * p.sub_centers;  // zero where a sub-centre is not the maximum
      out.d_bias[tile.first_class + j] = std::accumulate(b, b + p.sub_centers, T(0));
    }
    if (!out.d_w) continue;
    if (!p.padded) std::fill_n(d_w, tile.rows * p.dim, T(0));
    add_targets(p, in, tile, d_w);
    for (int64_t r = 0; r < tile.rows; r++) {
      T* row = d_w + r * p.dim;
      if (p.normalize_w) undo_norm(tile.w + r * tile.stride, tile.inv[r], p.dim, row);
      if (!in_place) write_row(p.w.storage, row, p.dim, out.d_w, first + r);
    }
  }
  if (p.bf16) products.release(true);
}

template <class T>
struct BackwardTask {
  template <RuleCode rule, bool extras>
  static constexpr auto pointer() {
    return &backward_task<rule, extras, T>;
  }
};

template <class T>
void backward(const Problem<T>& p, const BackwardIn<T>& in, const BackwardOut<T>& out, const TileProducts& products,
              const Parallel& parallel) {
  const Partition cut = partition(p.padded, p.classes, p.sub_centers);
  const PackedRows<T> x(p, true, parallel);
  const auto task = choose_rule<BackwardTask<T>>(p.rule, out.d_bias != nullptr);
  parallel(div_up(cut.tiles, kBackwardTileGroup), [&](int64_t group) { task(p, cut, group, in, out, x, products); });
}
