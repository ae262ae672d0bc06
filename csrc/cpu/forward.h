// The forward of the sweep: online softmax over a range of tiles, with O = sum_j A_ij N'_ij w_hat_j on the way.
// Included inside the namespace of an instruction set; never on its own.

// What a task knows of its rows so far, [kRowGroup] each; sums over tiles in double.
template <class T>
struct RowSums {
  T K[kRowGroup], best[kRowGroup], factor[kRowGroup];
  double sum[kRowGroup], mean_v[kRowGroup], sum_v[kRowGroup], count[kRowGroup], masked[kRowGroup];
};

// A or N' for the products with w: as T in panels of the tile's rows (A where C lies that is not kept), in tiles as a
// left operand, transposed.
template <class T>
struct Weighted {
  T* wide;
  Tiles tiles;
};

// A square of lanes x lanes: rows of w from j0 on, columns from i on.
template <class T>
FM_INLINE void store_square(Vec<T> (&a)[kLanes<T>], const Cosines<T>& cos, int64_t rows, const Weighted<T>& out,
                            int64_t i, int64_t j0) {
  if constexpr (kTiled<T>) {
    if (out.tiles.first) {
      transpose(a);
      for (int64_t l = 0; l < kLanes<T>; l++) put_left(out.tiles, i + l, j0, a[l]);
      return;
    }
  }
  T* to = out.wide + i / cos.width * cos.width * rows + i % cos.width + j0 * cos.width;
  for (int64_t l = 0; l < std::min(kLanes<T>, rows - j0); l++) store(to + l * cos.width, a[l]);
}

// Powers of two that exponentials may have above K: it is raised only where they have more, so that it seldom is.
constexpr double kSlack = 32;

// The whole number next to a logit, in powers of two.
template <class T>
FM_INLINE T power_next_to(T logit) {
  return std::nearbyint(logit * T(1.4426950408889634));
}

template <class T>
FM_INLINE bool too_low(const T* K, Vec<T> top) {
  bool low = false;
  for (int64_t l = 0; l < kLanes<T>; l++) low |= power_next_to(top[l]) > K[l] + T(kSlack);
  return low;
}

// Raises K to the largest logit where it is too low, and says by which factor sums shrink; true if any does.
template <class T>
bool raise_power(Vec<T> top, T* K, T* factor, double* sum, double* mean_v) {
  bool changed = false;
  for (int64_t l = 0; l < kLanes<T>; l++) {
    const T power = power_next_to(top[l]);
    if (!(power > K[l] + T(kSlack))) continue;
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

// From cosines to A; true if a row of O has to shrink by `factor` first.
template <RuleCode rule, bool extras, class T>
bool weigh_forward(const Problem<T>& p, const Tile<T>& t, const Cosines<T>& cos, RowSums<T>& s, int64_t s_first,
                   const Weighted<T>& a_out, const Weighted<T>& slope_out, Ahead& ahead) {
  constexpr int64_t lanes = kLanes<T>;
  const bool soft = p.reduction == Reduction::softplus;
  const Vec<T> zero{}, lowest = splat(-std::numeric_limits<T>::infinity());
  bool changed = false;
  for (int64_t i = 0; i < cos.columns; i += lanes) {
    const int64_t row = cos.first + i, r = s_first + i;
    const T* first = cos.at(i);
    const Vec<T> scale = load(p.scale + row), tau = load(p.tau + row), target = load(cos.place + i);
    Vec<T> top, best, count, masked, sum_v;
    const auto look = [&] {
      top = best = lowest, count = masked = sum_v = zero;
      for (int64_t j = 0; j < t.rows; j++) {
        const Element<T> e = element(p, t, cos, first + j * cos.width, j, target);
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
    };
    Vec<T> sum, mean_v;
    const auto weigh = [&] {
      const Vec<T> K = load(s.K + r);
      sum = mean_v = zero, top = lowest;
      for (int64_t j0 = 0; j0 < t.height; j0 += lanes) {      // below the rows of w there are zeros
        Vec<T> a_square[lanes], slope_square[lanes], part{};  // many equal rivals round alike: sums of sums
        for (int64_t l = 0; l < lanes; l++) {
          const int64_t j = j0 + l;
          if (kTilesApart && p.pieces) ahead.ask();
          a_square[l] = slope_square[l] = zero;
          if (j >= t.rows) continue;
          const Element<T> e = element(p, t, cos, first + j * cos.width, j, target);
          const Rival<Vec<T>> n = rival<rule, Ops>(e.c, tau, p.args);
          const Vec<T> u = scale * n.value + t.bias[j];
          top = select(e.excluded, top, select(u > top, u, top));
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
        store_square<T>(a_square, cos, t.rows, a_out, i, j0);
        if constexpr (extras) {
          if (p.want & kSum) store_square<T>(slope_square, cos, t.rows, slope_out, i, j0);
        }
      }
    };
    // Where A does not take the place of C, whether K is too low may turn out in weighing: then it was in vain.
    const bool stays = p.pieces || cos.c != a_out.wide || !(p.want & kDx);
    const bool at_once = !extras && (soft || (stays && s.K[r] > T(kNoPower)));
    at_once ? weigh() : look();
    std::fill_n(s.factor + r, lanes, T(1));
    const bool low = !soft && too_low<T>(s.K + r, top);
    if (low) changed |= raise_power<T>(top, s.K + r, s.factor + r, s.sum + r, s.mean_v + r);
    if (low || !at_once) weigh();
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

// A split's share of O: [padded, depth] in panels, in memory of its own.
template <class T>
struct Share {
  static constexpr int64_t width = kPanel<T>;

  T* o;
  int64_t padded, strips;
  T* at(int64_t i, int64_t strip) const { return o + (strip * padded + i) * width; }
};

// What a split leaves behind for its rows: states [kRowState, padded], and its shares of o_red and o_sum.
template <class T>
struct Partial {
  T* state;
  Share<T> o_red, o_sum;
};
template <class T>
Partial<T> partial_of(const Problem<T>& p, T* base, int64_t split) {
  const int64_t shares = shares_of(p), room = round_up(p.dim, kPad);
  T* state = base + split * p.padded * (kRowState + shares * room);
  T* o_red = state + kRowState * p.padded;
  const int64_t strips = div_up(p.dim, kPanel<T>);
  return {state,
          {shares > 0 ? o_red : nullptr, p.padded, strips},
          {shares > 1 ? o_red + p.padded * room : nullptr, p.padded, strips}};
}

// O += A^T w for one block; `add` is false where O holds nothing yet.
template <class T>
void add_share(const Problem<T>& p, const Tile<T>& t, const Cosines<T>& cos, const Weighted<T>& a,
               const Share<T>& share, bool add, Ahead& ahead, Loading<T>& loading) {
  if constexpr (kTiled<T>) {
    if (p.pieces) {
      const int64_t M = cos.columns, N = round_up(p.dim, kPad), K = t.height, lines = pace(loading, M, N, K, p.pieces);
      return multiply_tiles(
          M, N, K, a.tiles, t.right, share.at(cos.first, 0), p.padded, add, [](int64_t, int64_t, float*) {},
          [&] { kTilesApart ? loading.advance(lines) : ahead.ask(); });
    }
  }
  constexpr int64_t P = kPanel<T>;
  for (int64_t strip = 0; strip < share.strips; strip++)
    for (int64_t i = 0; i < cos.columns; i += P) {
      T* out = share.at(cos.first + i, strip);
      const auto at = [&](int64_t m, int v) { return out + m * P + v * kLanes<T>; };
      multiply_strip<Summed::rows>(
          P, t.rows, a.wide + i * t.rows, 0, t.panels + strip * t.rows * P,
          [&](int64_t m, int v) {
            if (v == 0) ahead.ask();
            return add ? load(at(m, v)) : Vec<T>{};
          },
          [&](int64_t m, int v, Vec<T> sum) { store(at(m, v), sum); });
    }
}

template <class T>
void scale_share(const Cosines<T>& cos, const T* factor, const Share<T>& share) {
  for (int64_t i = 0; i < cos.columns; i++) {
    if (factor[i] == 1) continue;
    for (int64_t strip = 0; strip < share.strips; strip++) {
      T* o = share.at(cos.first + i, strip);
      for (int64_t d = 0; d < share.width; d++) o[d] *= factor[i];
    }
  }
}

// How often the next tile is asked for while one is multiplied with so many rows of x. Where products of tiles have a
// unit of their own, rows are read beside them, and weighing asks.
template <class T>
int64_t asks_of_forward(const Problem<T>& p, int64_t rows, int64_t rows_of_x, int64_t depth) {
  if (p.pieces && kTilesApart) return rows * rows_of_x / kLanes<T>;
  return asks_in_product(p, rows, rows_of_x, depth) + shares_of(p) * asks_in_product(p, rows_of_x, depth, rows);
}

// One group of rows with one range of tiles.
template <RuleCode rule, bool extras, class T>
void forward_task(const Problem<T>& p, const Partition& cut, int64_t group, int64_t split, const PackedRows<T>& x,
                  const Partial<T>& out) {
  using S = Scratch;
  const TileUnit unit(p.pieces);
  const int64_t height = cut.height, n = cut.block * height;
  const auto always = [](const Tile<T>&) { return true; };
  using Queue = TileQueue<T, decltype(always)>;
  S scratch(Queue::room(p, cut.tile_rows, x.depth) + S::room<T>(n) + S::room<T>(cut.block) +
            2 * S::room<uint16_t>(n * p.pieces) + S::room<T>(n) + S::room<RowSums<T>>(1));
  Cosines<T> cos{scratch.take<T>(n), scratch.take<T>(cut.block), nullptr, nullptr, 0, 0, 0};
  Weighted<T> a{cos.buffer, {}}, slope{nullptr, {}};
  if (p.pieces) {
    a.tiles = {scratch.take<uint16_t>(n * p.pieces), p.pieces, height / kTileStep};
    slope.tiles = {scratch.take<uint16_t>(n * p.pieces), p.pieces, height / kTileStep};
  } else {
    slope.wide = scratch.take<T>(n);
  }
  RowSums<T>& s = *new (scratch.take<RowSums<T>>(1)) RowSums<T>{};
  std::fill_n(s.K, kRowGroup, T(kNoPower));
  std::fill_n(s.best, kRowGroup, -std::numeric_limits<T>::infinity());

  const int64_t begin = cut.tiles * split / cut.splits, end = cut.tiles * (split + 1) / cut.splits;
  const int64_t first = group * kRowGroup, last = std::min(first + kRowGroup, p.padded);
  const int64_t asks = asks_of_forward(p, cut.tile_rows, last - first, x.depth);
  Queue queue(p, cut, x.depth, end, scratch, always);
  for (const Share<T>& share : {out.o_red, out.o_sum})  // no class: nothing will be written
    for (int64_t strip = 0; begin == end && share.o && strip < share.strips; strip++)
      std::fill(share.at(first, strip), share.at(last, strip), T(0));
  for (int64_t number = begin; number < end; number++) {
    const Tile<T>& tile = queue.take(number);
    Turning<T> turning(p, tile, p.pieces && (p.want & kDx));
    Ahead ahead = tile_ahead(p, number + 1 < end ? number + 1 : cut.tiles, cut.tile_rows, asks);
    for (int64_t block = first; block < last; block += cut.block) {
      const int64_t columns = std::min(cut.block, last - block);
      compute_cosines<Kept::write>(p, x, tile, block, columns, cos, turning, ahead);
      turning.finish();
      const bool changed = weigh_forward<rule, extras>(p, tile, cos, s, cos.first - first, a, slope, ahead);
      if (!(p.want & kDx)) continue;
      if (changed && number > begin) scale_share(cos, s.factor + cos.first - first, out.o_red);
      if (block + columns == last) queue.start(number + 1);
      add_share(p, tile, cos, a, out.o_red, number > begin, ahead, queue.loading());
      if (p.want & kSum) add_share(p, tile, cos, slope, out.o_sum, number > begin, ahead, queue.loading());
    }
  }
  for (int64_t i = first; i < last; i++) {
    const int64_t r = i - first;
    const T state[kRowState] = {s.K[r],         T(s.sum[r]),    s.best[r],    T(s.count[r]),
                                T(s.masked[r]), T(s.mean_v[r]), T(s.sum_v[r])};
    for (int64_t k = 0; k < kRowState; k++) out.state[k * p.padded + i] = state[k];
  }
}

// o [batch, dim] of the rows [begin, end): the splits' shares, each times its factor, added in order. A strip of all rows
// lies together in a share, so that one follows the other.
template <class T, class Of, class Factor>
void merge_shares(const Problem<T>& p, int64_t splits, int64_t begin, int64_t end, const Of& share_of,
                  const Factor& factor, T* o) {
  constexpr int64_t width = Share<T>::width, vectors = width / kLanes<T>;
  for (int64_t d = 0; d < p.dim; d += width)
    for (int64_t i = begin; i < end; i++) {
      T* out = o + i * p.dim + d;
      Vec<T> sums[vectors] = {};
      for (int64_t s = 0; s < splits; s++) {
        const T f = factor(i, s), *in = share_of(s).at(i, d / width);
        FM_UNROLL for (int v = 0; v < vectors; v++) sums[v] += f * load(in + v * kLanes<T>);
      }
      T sum[width];
      T* to = d + width <= p.dim ? out : sum;
      for (int v = 0; v < vectors; v++) store(to + v * kLanes<T>, sums[v]);
      if (to == sum) std::copy_n(sum, p.dim - d, out);
    }
}

// Adds the splits of one row, in order. factors [splits]: what their shares of o_red are to be multiplied with.
template <class T>
void merge_row(const Problem<T>& p, int64_t splits, int64_t i, const ForwardOut<T>& out, T* factors) {
  const auto partial = [&](int64_t split) { return partial_of(p, out.partial, split); };
  const auto state = [&](int64_t split, int64_t k) { return partial(split).state[k * p.padded + i]; };
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
  for (int64_t s = 0; s < splits; s++) factors[s] = T(factor(s) / whole);
}

template <class T>
void merge_rows(const Problem<T>& p, int64_t splits, int64_t begin, int64_t end, const ForwardOut<T>& out) {
  const auto memory = make_lines<T>((end - begin) * splits);
  T* factors = memory.get();
  for (int64_t i = begin; i < end; i++) merge_row(p, splits, i, out, factors + (i - begin) * splits);
  const auto partial = [&](int64_t split) { return partial_of(p, out.partial, split); };
  if (out.o_red)
    merge_shares(
        p, splits, begin, end, [&](int64_t s) { return partial(s).o_red; },
        [&](int64_t i, int64_t s) { return factors[(i - begin) * splits + s]; }, out.o_red);
  if (out.o_sum)
    merge_shares(
        p, splits, begin, end, [&](int64_t s) { return partial(s).o_sum; }, [](int64_t, int64_t) { return T(1); },
        out.o_sum);
}

template <class T>
struct ForwardTask {
  template <RuleCode rule, bool extras>
  static constexpr auto pointer() {
    return &forward_task<rule, extras, T>;
  }
};

template <class T>
void forward(const Problem<T>& p, const ForwardOut<T>& out, const Parallel& parallel) {
  const Partition cut = partition(p, kForwardBlocking);
  const PackedRows<T> x(p, false, parallel);
  const auto task = choose_rule<ForwardTask<T>>(p.rule, p.want & (kSum | kStats | kDscale));
  parallel(cut.groups * cut.splits, [&](int64_t n) {
    const int64_t split = n / cut.groups;
    task(p, cut, n % cut.groups, split, x, partial_of(p, out.partial, split));
  });
  parallel(div_up(p.batch, kPad),
           [&](int64_t strip) { merge_rows(p, cut.splits, strip * kPad, std::min((strip + 1) * kPad, p.batch), out); });
}
