// The forward of the sweep: online softmax over a range of tiles, with O = sum_j A_ij N'_ij w_hat_j on the way.
// Included inside the namespace of an instruction set; never on its own.

// What a task knows of its rows so far, [kRowGroup] each; sums over tiles in double.
template <class T>
struct RowSums {
  T K[kRowGroup], best[kRowGroup], factor[kRowGroup];
  double sum[kRowGroup], mean_v[kRowGroup], sum_v[kRowGroup], count[kRowGroup], masked[kRowGroup];
};

// A^T for the products with w, as T or bf16: [columns, stride]
template <class T>
struct Weighted {
  T* wide;
  uint16_t* narrow;
  int64_t stride;
};

template <class T>
FM_INLINE void store_transposed(Vec<T> (&a)[kLanes<T>], const Weighted<T>& out, int64_t row, int64_t column) {
  transpose(a);
  for (int64_t l = 0; l < kLanes<T>; l++) {
    const int64_t at = (row + l) * out.stride + column;
    if constexpr (sizeof(T) == 4) {
      if (out.narrow) {
        const Half16 h = to_bf16(a[l]);
        __builtin_memcpy(out.narrow + at, &h, sizeof h);
        continue;
      }
    }
    store(out.wide + at, a[l]);
  }
}

// Raises K to the whole number next to the largest logit (in powers of two) and says by which factor sums shrink.
template <class T>
bool raise_power(Vec<T> top, T* K, T* factor, double* sum, double* mean_v) {
  bool changed = false;
  for (int64_t l = 0; l < kLanes<T>; l++) {
    factor[l] = 1;
    const T power = std::nearbyint(top[l] * T(1.4426950408889634));
    if (!(power > K[l])) continue;
    if (K[l] > T(kNoPower)) {
      factor[l] = power - K[l] < 1000 ? power_of_two(K[l] - power) : T(0);
      changed = true;
    }
    K[l] = power;
    sum[l] *= factor[l];
    mean_v[l] *= factor[l];
  }
  return changed;
}

// From cosines to A^T; true if a row of O has to shrink by `factor` first.
template <RuleCode rule, bool extras, class T>
bool weigh_forward(const Problem<T>& p, const Tile<T>& t, const Cosines<T>& cos, RowSums<T>& s, int64_t s_first,
                   const Weighted<T>& a_out, const Weighted<T>& slope_out) {
  constexpr int64_t lanes = kLanes<T>;
  const bool soft = p.reduction == Reduction::softplus;
  const Vec<T> zero{};
  bool changed = false;
  for (int64_t i = 0; i < cos.columns; i += lanes) {
    const int64_t row = cos.first + i, r = s_first + i;
    const Vec<T> scale = load(p.scale + row), tau = load(p.tau + row), target = load(cos.place + i);
    Vec<T> top = splat(-std::numeric_limits<T>::infinity()), best = top, count{}, masked{}, sum_v{};
    for (int64_t j = 0; j < t.rows; j++) {
      const Element<T> e = element(p, t, cos, j, i, target);
      const Vec<T> v = rival<rule, Ops>(e.c, tau, p.args).value, u = scale * v + t.bias[j];
      top = select(e.excluded, top, select(u > top, u, top));
      if constexpr (extras) {
        const auto hard = e.c > tau;
        const Vec<T> score = p.bias ? e.c + t.bias[j] / scale : e.c;
        best = select(e.excluded, best, select(score > best, score, best));
        count += select(e.excluded, zero, select(hard, zero + T(1), zero));
        masked += select(e.excluded, zero, select(hard, e.c, zero));
        sum_v += select(e.excluded, zero, v);
      }
    }
    if (!soft) changed |= raise_power<T>(top, s.K + r, s.factor + r, s.sum + r, s.mean_v + r);

    const Vec<T> K = load(s.K + r);
    Vec<T> sum{}, mean_v{};
    for (int64_t j0 = 0; j0 < t.rows; j0 += lanes) {
      Vec<T> a_square[lanes], slope_square[lanes], part{};  // many equal rivals round alike: sums of sums
      for (int64_t l = 0; l < lanes; l++) {
        const int64_t j = j0 + l;
        a_square[l] = slope_square[l] = zero;
        if (j >= t.rows) continue;
        const Element<T> e = element(p, t, cos, j, i, target);
        const Rival<Vec<T>> n = rival<rule, Ops>(e.c, tau, p.args);
        const Vec<T> u = scale * n.value + t.bias[j];
        Vec<T> a, red;
        if (soft) {
          softplus<T>(u, red, a);
        } else {
          const Vec<T> shifted = u - K * T(0.693359375);  // ln 2 in two parts
          red = a = exponential(shifted + K * T(2.121944400546905e-4));
        }
        a = select(e.excluded, zero, a);
        part += select(e.excluded, zero, red);
        if constexpr (extras) mean_v += a * n.value;
        const Vec<T> slope = (p.unit_slope ? zero + T(1) : n.slope) * t.inv[j];
        a_square[l] = a * slope;
        if constexpr (extras) slope_square[l] = select(e.excluded, zero, slope);
      }
      sum += part;
      if (!(p.want & kDx)) continue;
      store_transposed<T>(a_square, a_out, i, j0);
      if constexpr (extras) {
        if (p.want & kSum) store_transposed<T>(slope_square, slope_out, i, j0);
      }
    }
    for (int64_t l = 0; l < lanes; l++) {
      s.sum[r + l] += sum[l];
      if constexpr (extras) {
        s.mean_v[r + l] += mean_v[l];
        s.best[r + l] = best[l] > s.best[r + l] ? best[l] : s.best[r + l];
        s.count[r + l] += count[l];
        s.masked[r + l] += masked[l];
        s.sum_v[r + l] += sum_v[l];
      }
    }
  }
  return changed;
}

// What a split leaves behind for its rows: states [kRowState, padded], then its share of o_red and o_sum [padded, dim].
template <class T>
struct Partial {
  T *state, *o_red, *o_sum;
};
template <class T>
Partial<T> partial_of(const Problem<T>& p, T* base, int64_t split) {
  const int64_t shares = (p.want & kDx) ? ((p.want & kSum) ? 2 : 1) : 0;
  T* state = base + split * p.padded * (kRowState + shares * p.dim);
  T* o_red = state + kRowState * p.padded;
  return {state, shares > 0 ? o_red : nullptr, shares > 1 ? o_red + p.padded * p.dim : nullptr};
}

template <class T>
void add_share(const Problem<T>& p, const TileProducts& products, const Tile<T>& t, const Weighted<T>& a, int64_t rows,
               T* out, bool add) {
  if constexpr (sizeof(T) == 4) {
    if (p.bf16)
      return products.bf16(rows, p.dim, round_up(t.rows, 32), a.stride, p.dim, p.dim, add, a.narrow, t.pairs, out,
                           true);
  }
  multiply(products, rows, p.dim, t.rows, a.wide, a.stride, t.w, t.stride, out, p.dim, add);
}

template <class T>
Weighted<T> make_weighted(const Problem<T>& p, int64_t tile_rows, Scratch& scratch) {
  const int64_t stride = round_up(tile_rows, 32), n = kRowBlock * stride;
  Weighted<T> a{nullptr, nullptr, stride};
  if (p.bf16)
    a.narrow = scratch.take<uint16_t>(n);
  else
    a.wide = scratch.take<T>(n);
  return a;
}

// One group of rows with one range of tiles.
template <RuleCode rule, bool extras, class T>
void forward_task(const Problem<T>& p, const Partition& cut, int64_t group, int64_t split, const PackedRows<T>& x,
                  const TileProducts& products, const Partial<T>& out) {
  const int64_t tile_rows = cut.tile_classes * p.sub_centers, stride = round_up(tile_rows, 32);
  using S = Scratch;
  S scratch(tile_room(p, tile_rows, x.depth) + S::room<T>(tile_rows * kRowBlock) + S::room<T>(kRowBlock) +
            2 * S::room<T>(kRowBlock * stride) + S::room<RowSums<T>>(1));
  Tile<T> tile = make_tile(p, tile_rows, x.depth, scratch);
  Cosines<T> cos{scratch.take<T>(tile_rows * kRowBlock), nullptr, scratch.take<T>(kRowBlock), 0, 0};
  const Weighted<T> a = make_weighted(p, tile_rows, scratch), slope = make_weighted(p, tile_rows, scratch);
  RowSums<T>& s = *new (scratch.take<RowSums<T>>(1)) RowSums<T>{};
  std::fill_n(s.K, kRowGroup, T(kNoPower));
  std::fill_n(s.best, kRowGroup, -std::numeric_limits<T>::infinity());
  if (p.bf16) {  // columns beyond the tile's rows are read by the product
    std::fill_n(a.narrow, kRowBlock * stride, 0);
    std::fill_n(slope.narrow, kRowBlock * stride, 0);
  }

  const int64_t begin = cut.tiles * split / cut.splits, end = cut.tiles * (split + 1) / cut.splits;
  const int64_t first = group * kRowGroup, last = std::min(first + kRowGroup, p.padded);
  for (T* share : {out.o_red, out.o_sum})  // no class: nothing will be written
    if (begin == end && share) std::fill(share + first * p.dim, share + last * p.dim, T(0));
  for (int64_t number = begin; number < end; number++) {
    load_tile(p, number, cut.tile_classes, x.depth, p.want & kDx, tile);
    for (int64_t block = first / kRowBlock; block * kRowBlock < last; block++) {
      compute_cosines(p, products, x, tile, block, cos);
      const bool changed = weigh_forward<rule, extras>(p, tile, cos, s, cos.first - first, a, slope);
      if (!(p.want & kDx)) continue;
      T* o_red = out.o_red + cos.first * p.dim;
      if (changed && number > begin)
        for (int64_t i = 0; i < cos.columns; i++) {
          const T factor = s.factor[cos.first - first + i];
          if (factor != 1)
            for (int64_t d = 0; d < p.dim; d++) o_red[i * p.dim + d] *= factor;
        }
      add_share(p, products, tile, a, cos.columns, o_red, number > begin);
      if (p.want & kSum)
        add_share(p, products, tile, slope, cos.columns, out.o_sum + cos.first * p.dim, number > begin);
    }
  }
  if (p.bf16) products.release(true);
  for (int64_t i = first; i < last; i++) {
    const int64_t r = i - first;
    const T state[kRowState] = {s.K[r],         T(s.sum[r]),    s.best[r],    T(s.count[r]),
                                T(s.masked[r]), T(s.mean_v[r]), T(s.sum_v[r])};
    for (int64_t k = 0; k < kRowState; k++) out.state[k * p.padded + i] = state[k];
  }
}

// Adds the splits of one row, in order.
template <class T>
void merge_row(const Problem<T>& p, int64_t splits, int64_t i, const ForwardOut<T>& out) {
  const auto state = [&](int64_t split, int64_t k) {
    return partial_of(p, out.partial, split).state[k * p.padded + i];
  };
  const bool soft = p.reduction == Reduction::softplus;
  T K = T(kNoPower), best = -std::numeric_limits<T>::infinity();
  for (int64_t s = 0; s < splits; s++) {
    K = std::max(K, state(s, 0));
    best = std::max(best, state(s, 2));
  }
  const auto factor = [&](int64_t split) {
    const T down = K - state(split, 0);
    return soft ? T(1) : down < 1000 ? power_of_two(-down) : T(0);
  };
  double sum = 0, count = 0, masked = 0, mean_v = 0, sum_v = 0;
  for (int64_t s = 0; s < splits; s++) {
    sum += double(state(s, 1)) * factor(s);
    count += state(s, 3);
    masked += state(s, 4);
    mean_v += double(state(s, 5)) * factor(s);
    sum_v += state(s, 6);
  }
  const double whole = soft || sum == 0 ? 1 : sum;  // what A is divided by
  const double red = soft ? sum : std::log(sum) + (sum == 0 ? 0 : double(K) * 0.6931471805599453);
  out.red[i] = T(red);
  const T low = sum == 0 ? T(0) : T(red - out.red[i]);
  const T row[kAuxRows] = {best, T(count), T(masked), T(mean_v / whole), T(sum_v), low};
  for (int64_t k = 0; k < kAuxRows; k++) out.aux[k * p.batch + i] = row[k];
  for (int64_t s = 0; s < splits && out.o_red; s++) {
    const Partial<T> part = partial_of(p, out.partial, s);
    const T f = T(factor(s) / whole);
    T* o = out.o_red + i * p.dim;
    const T* share = part.o_red + i * p.dim;
    for (int64_t d = 0; d < p.dim; d++) o[d] = (s ? o[d] : T(0)) + f * share[d];
    if (!out.o_sum) continue;
    o = out.o_sum + i * p.dim;
    share = part.o_sum + i * p.dim;
    for (int64_t d = 0; d < p.dim; d++) o[d] = (s ? o[d] : T(0)) + share[d];
  }
}

template <class T>
struct ForwardTask {
  template <RuleCode rule, bool extras>
  static constexpr auto pointer() {
    return &forward_task<rule, extras, T>;
  }
};

template <class T>
void forward(const Problem<T>& p, const ForwardOut<T>& out, const TileProducts& products, const Parallel& parallel) {
  const Partition cut = partition(p.padded, p.classes, p.sub_centers);
  const PackedRows<T> x(p, false, parallel);
  const auto task = choose_rule<ForwardTask<T>>(p.rule, p.want & (kSum | kStats | kDscale));
  parallel(cut.groups * cut.splits, [&](int64_t n) {
    const int64_t split = n / cut.groups;
    task(p, cut, n % cut.groups, split, x, products, partial_of(p, out.partial, split));
  });
  parallel(div_up(p.batch, kRowPad), [&](int64_t strip) {
    for (int64_t i = strip * kRowPad; i < std::min((strip + 1) * kRowPad, p.batch); i++)
      merge_row(p, cut.splits, i, out);
  });
}
