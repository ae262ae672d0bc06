// The backward of the sweep: the weights' gradient, each tile's rows finished by the task that owns them.
// Included inside the namespace of an instruction set; never on its own.

// Sums over the rows of x, a vector of partial sums for each row of the tile.
template <class T>
struct TileSums {
  Vec<T>* along;   // sum_i G_ij c_ij: what of dW points along w_hat
  Vec<T>* d_bias;  // sum_i of the gradient of u_ij
};

// From cosines to G = (g_red A + g_sum) s N', rivals only: in the place of C, or in tiles as a left operand.
template <RuleCode rule, bool extras, class T>
void weigh_backward(const Problem<T>& p, const BackwardIn<T>& in, const Tile<T>& t, const Cosines<T>& cos,
                    const Tiles& tiles, const TileSums<T>& sums, Ahead& ahead) {
  constexpr int64_t lanes = kLanes<T>;
  const bool soft = p.reduction == Reduction::softplus;
  const Vec<T> zero{};
  for (int64_t i = 0; i < cos.columns; i += lanes) {
    const int64_t row = cos.first + i;
    T* first = cos.at(i);
    const Vec<T> scale = load(p.scale + row), tau = load(p.tau + row), target = load(cos.place + i);
    const Vec<T> g_red = load(in.g_red + row), g_sum = load(in.g_sum_u + row), red = load(in.red + row);
    const Vec<T> red_low = load(in.red_low + row);
    for (int64_t j = 0; j < t.rows; j++) {
      T* at = first + j * cos.width;
      if (kTilesApart && p.pieces) ahead.ask();
      const Element<T> e = element(p, t, cos, at, j, target);
      const Rival<Vec<T>> n = rival<rule, Ops>(e.c, tau, p.args);
      const Vec<T> u = scale * n.value + t.bias[j];
      Vec<T> a, value;
      if (soft)
        softplus<T>(u, value, a);
      else
        a = exponential(u - red - red_low);
      const Vec<T> g_u = select(e.excluded, zero, g_red * a + g_sum);
      if constexpr (extras) sums.d_bias[j] += g_u;
      const Vec<T> g_c = g_u * scale * (p.unit_slope ? zero + T(1) : n.slope);
      sums.along[j] += g_c * e.c;
      if constexpr (kTiled<T>) {
        if (p.pieces) {
          put_left(tiles, j, i, g_c);
          continue;
        }
      }
      store(at, g_c);
    }
  }
}

// dW of a tile's rows: of w_hat in `sum` until the last block of rows of x, then of w in `d_w` [rows, dim].
template <class T>
struct TileGradient {
  T* sum;                                // in panels
  T* d_w;                                // as T
  T* along;                              // [rows] d w_hat . w_hat / |w|, 0 where the norm is a constant
  bool streams = false;                  // d_w is written past the cache
  bool begun = false, last_call = true;  // of several calls, whether one is in the sum already; whether it is the last
};

// dW = (dW_hat - (dW_hat . w_hat) w_hat) / |w|: a vector of row m, from column d on, which has w.
template <class T>
FM_INLINE void finish_gradient(const Problem<T>& p, const Tile<T>& t, const TileGradient<T>& g, int64_t m, int64_t d,
                               Vec<T> sum, Vec<T> w) {
  const Vec<T> d_w = (sum - g.along[m] * w) * t.inv[m];
  T* out = g.d_w + m * p.dim + d;
  if (p.dim - d >= kLanes<T>)
    g.streams ? stream(out, d_w) : store(out, d_w);
  else if (p.dim > d)
    __builtin_memcpy(out, &d_w, size_t(p.dim - d) * sizeof(T));
}

// The same for a block of 32 x 32 whose sum is complete, while those after it are summed. A unit is a row of the block.
template <class T>
class Finishing {
 public:
  Finishing(const Problem<T>& p, const Tile<T>& t, const TileGradient<T>& g) : p_(p), t_(t), g_(g) {}
  int64_t units() const { return t_.height * (round_up(p_.dim, kPad) / kPad); }

  void begin(int64_t m, int64_t d, const T* block) {
    finish();
    m_ = m, d_ = d, block_ = block;
    end_ = std::min(m + kPad, t_.rows);
  }
  FM_INLINE void advance(int64_t units) {
    if constexpr (kTiled<T>) {
      for (; units > 0 && m_ < end_; units--, m_++, block_ += kPad)
        for (int64_t v = 0; v < kPad; v += kLanes<T>) {
          const int64_t d = d_ + v;
          finish_gradient(p_, t_, g_, m_, d, load(block_ + v), load_part(t_.source[m_] + d, p_.dim - d));
        }
    }
  }
  void finish() { advance(kPad); }

 private:
  const Problem<T>& p_;
  const Tile<T>& t_;
  const TileGradient<T>& g_;
  const T* block_ = nullptr;
  int64_t m_ = 0, end_ = 0, d_ = 0;  // the next row of the block, the one behind its last, its first column
};

template <class T>
void add_gradient(const Problem<T>& p, const PackedRows<T>& x, const Tile<T>& t, const Cosines<T>& cos,
                  const Tiles& tiles, const TileGradient<T>& g, Ahead& ahead, Ahead& state, Loading<T>& loading) {
  const bool last = g.last_call && cos.first + cos.columns == p.padded, begun = g.begun || cos.first;
  constexpr int64_t P = kPanel<T>, lanes = kLanes<T>;
  if constexpr (kTiled<T>) {
    if (p.pieces) {
      const int64_t M = t.height, N = x.depth, K = cos.columns;
      Finishing<T> finishing(p, t, g);
      const auto done = [&](int64_t m, int64_t d, const float* block) {
        state.ask();
        if (last) finishing.begin(m, d, block);
      };
      const int64_t rows = pace(finishing, M, N, K, p.pieces), lines = pace(loading, M, N, K, p.pieces);
      const auto meanwhile = [&] {
        if (!kTilesApart) return ahead.ask();
        finishing.advance(rows), loading.advance(lines);
      };
      multiply_tiles(M, N, K, tiles, x.rows_tiles.from(0, cos.first / kTileStep), g.sum, M, begun, done, meanwhile);
      return finishing.finish();
    }
  }
  for (int64_t d0 = 0; d0 < x.depth; d0 += P) {
    const T* w = t.panels + d0 * t.rows;
    T* sums = g.sum + d0 * t.rows;
    for (int64_t k = 0; k < cos.columns; k += kProductDepth) {
      const int64_t depth = std::min(kProductDepth, cos.columns - k);
      const auto start = [&](int64_t m, int v) {
        if (v == 0) ahead.ask(), state.ask();
        return k || begun ? load(sums + m * P + v * lanes) : Vec<T>{};
      };
      const auto multiply = [&](const auto& finish) {
        multiply_strip<Summed::columns>(t.rows, depth, cos.c + k * t.rows, t.rows * P,
                                        x.rows.get() + d0 * p.padded + (cos.first + k) * P, start, finish);
      };
      if (!last || k + depth < cos.columns)
        multiply([&](int64_t m, int v, Vec<T> sum) { store(sums + m * P + v * lanes, sum); });
      else
        multiply([&](int64_t m, int v, Vec<T> sum) {
          finish_gradient(p, t, g, m, d0 + v * lanes, sum, load(w + m * P + v * lanes));
        });
    }
  }
}

template <class T>
FM_INLINE T dot(const T* a, const T* b, int64_t dim) {
  Vec<T> sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes<T> <= dim; d += 2 * kLanes<T>)
    for (int v = 0; v < 2; v++) sums[v] += load(a + d + v * kLanes<T>) * load(b + d + v * kLanes<T>);
  T sum = lane_sum<T>(sums[0] + sums[1]);
  for (; d < dim; d++) sum += a[d] * b[d];
  return sum;
}

template <class T>
bool has_slope(const Problem<T>& p, T inv) {  // a norm that is not taken, or clamped, is a constant
  return p.normalize_w && inv < T(1 / kEps);
}

// The target's share, in full precision and in the order of the rows: dW_y += g_cos_y d cos_y / d w_y.
template <class T>
void add_targets(const Problem<T>& p, const BackwardIn<T>& in, const Tile<T>& t, T* d_w) {
  const int64_t first = t.first_class * p.sub_centers;
  const int64_t* end = in.by_target + p.batch;
  const int64_t* it = std::lower_bound(in.by_target, end, first,
                                       [&](int64_t row, int64_t value) { return in.target_row[row] < value; });
  for (; it != end && in.target_row[*it] < first + t.rows; ++it) {
    const int64_t r = in.target_row[*it] - first;
    const T *x = p.x_hat + *it * p.dim, *w = t.source[r], g = in.g_cos_y[*it] * t.inv[r];
    const T along = has_slope(p, t.inv[r]) ? dot(x, w, p.dim) * t.inv[r] * t.inv[r] : T(0);
    T* out = d_w + r * p.dim;
    for (int64_t d = 0; d < p.dim; d++) out[d] += g * (x[d] - along * w[d]);
  }
}

// From here on a gradient is written past the cache. At 205 MB that saves a fourth of a backward in bfloat16 (44 to 32
// ms at 128 x 100,000 with AMX), at 2 to 60 MB 2 to 9 % of a step in float32, SGD with momentum included (Zen 4); a
// small one is better left where the optimizer will look for it.
constexpr int64_t kStreamedBytes = int64_t(1) << 20;

// What a task does with the rows of a tile once their gradient is finished: here it is the result.
template <class T>
struct StoreGradient {
  const BackwardOut<T>& out;
  Storage storage;

  bool in_place() const { return storage == (sizeof(T) == 8 ? Storage::f64 : Storage::f32); }
  bool streams(const T* place, int64_t rows, int64_t dim) const {
    const int64_t bytes = dim * int64_t(sizeof(T));
    return kStreams && in_place() && uintptr_t(place) % 64 == 0 && bytes % 64 == 0 && rows * bytes >= kStreamedBytes;
  }
  Ahead state(const Tile<T>&, int64_t, int64_t) const { return {}; }
  T* place(int64_t row, int64_t dim, T* buffer) const {
    return in_place() ? static_cast<T*>(out.d_w) + row * dim : buffer;
  }
  void finish(const Tile<T>& t, int64_t first, int64_t dim, T* d_w) const {
    for (int64_t r = 0; r < t.rows && !in_place(); r++) write_row(storage, d_w + r * dim, dim, out.d_w, first + r);
  }
};

// Or an optimizer takes its step with them, while they and the weights are in the cache: there is no other gradient.
template <class T>
struct UpdateWeights {
  const RowUpdate<T>& update;

  // The first state of the tile's rows, to be read ahead.
  Ahead state(const Tile<T>& t, int64_t first, int64_t dim) const {
    const int64_t bytes = dim * int64_t(sizeof(T));
    return update.m ? Ahead(update.m, bytes, bytes, update.w.index, first, first + t.rows) : Ahead();
  }
  bool streams(const T*, int64_t, int64_t) const { return false; }
  T* place(int64_t, int64_t, T* buffer) const { return buffer; }
  void finish(const Tile<T>& t, int64_t first, int64_t dim, T* d_w) const {
    LastCorrection<T> correction;
    for (int64_t r = 0; r < t.rows; r++)
      update_row(update, first + r, dim, d_w + r * dim, const_cast<T*>(t.source[r]), correction);
  }
};

// A call of the sweep, as the tasks of its backward need it.
template <class T>
struct BackwardPart {
  using Weigh = void (*)(const Problem<T>&, const BackwardIn<T>&, const Tile<T>&, const Cosines<T>&, const Tiles&,
                         const TileSums<T>&, Ahead&);
  const Problem<T>& p;
  const BackwardIn<T>& in;
  PackedRows<T> x;
  Weigh weigh;
};

template <class T>
struct WeighBackward {
  template <RuleCode rule, bool extras>
  static constexpr auto pointer() {
    return &weigh_backward<rule, extras, T>;
  }
};

// How often the next tile is asked for while one is multiplied, as in the forward.
template <class T>
int64_t asks_of_backward(const Problem<T>& p, int64_t rows, int64_t depth, bool made_again, bool want_d_w) {
  if (p.pieces && kTilesApart) return rows * p.padded / kLanes<T>;
  return (made_again ? asks_in_product(p, rows, p.padded, depth) : 0) +
         (want_d_w ? asks_in_product(p, rows, depth, p.padded) : 0);
}

// The tiles [begin, end), all rows of x of all calls. d_bias: of the only call, or null. sink: null if nobody wants dW.
template <class T, class Sink>
void backward_task(const BackwardPart<T>* parts, int64_t count, const Partition& cut, int64_t begin, int64_t end,
                   const Sink* sink, T* d_bias) {
  using S = Scratch;
  const Problem<T>& p = parts[0].p;  // of the weights, what any call says
  const TileUnit unit(p.pieces);
  const int64_t rows = cut.tile_rows, height = cut.height, depth = parts[0].x.depth;
  int64_t columns = 0;
  for (int64_t k = 0; k < count; k++) columns = std::max(columns, std::min(cut.block, parts[k].p.padded));
  const int64_t n = height * columns;
  const auto made_again = [&](const Tile<T>& t) {
    return !std::all_of(parts, parts + count, [&](const BackwardPart<T>& part) { return all_kept(part.p, t); });
  };
  using Queue = TileQueue<T, decltype(made_again)>;
  S scratch(Queue::room(p, rows, depth) + S::room<T>(n) + S::room<T>(cut.block) + S::room<uint16_t>(n * p.pieces) +
            S::room<T>(rows) + 2 * S::room<Vec<T>>(rows) + S::room<T>(height * depth) + S::room<T>(rows * p.dim));
  Queue queue(p, cut, depth, end, scratch, made_again);
  Cosines<T> cos{scratch.take<T>(n), scratch.take<T>(cut.block), nullptr, nullptr, 0, 0, 0};
  const Tiles tiles{scratch.take<uint16_t>(n * p.pieces), p.pieces, columns / kTileStep};
  TileGradient<T> g{nullptr, nullptr, scratch.take<T>(rows)};
  const TileSums<T> sums{scratch.take<Vec<T>>(rows), scratch.take<Vec<T>>(rows)};
  g.sum = scratch.take<T>(height * depth);
  T* buffer = scratch.take<T>(rows * p.dim);

  for (int64_t number = begin; number < end; number++) {
    Tile<T>& tile = queue.take(number);
    const int64_t asks = asks_of_backward(p, rows, depth, made_again(tile), sink != nullptr);
    Ahead ahead = tile_ahead(p, number + 1 < end ? number + 1 : cut.tiles, rows, asks);
    const int64_t first = tile.first_class * p.sub_centers;
    Ahead state = sink ? sink->state(tile, first, p.dim) : Ahead();
    const int64_t blocks = height / kPad * (depth / kPad);
    state.spread(p.pieces ? blocks : asks, p.pieces ? kAskedLinesOfBlock : kAskedLines);
    if (sink) g.d_w = sink->place(first, p.dim, buffer);
    g.streams = sink && sink->streams(g.d_w, p.classes * p.sub_centers, p.dim);
    std::fill_n(sums.along, tile.rows, Vec<T>{});
    std::fill_n(sums.d_bias, tile.rows, Vec<T>{});
    for (int64_t k = 0; k < count; k++) {
      const BackwardPart<T>& part = parts[k];
      if (k) load_bias(part.p, tile);
      g.begun = k > 0;
      g.last_call = k + 1 == count;
      for (int64_t block = 0; block < part.p.padded; block += cut.block) {
        Nothing nothing;
        compute_cosines<Kept::read>(part.p, part.x, tile, block, cut.block, cos, nothing, ahead);
        part.weigh(part.p, part.in, tile, cos, tiles, sums, ahead);
        for (int64_t r = 0; r < tile.rows; r++)
          g.along[r] = has_slope(p, tile.inv[r]) ? lane_sum<T>(sums.along[r]) * tile.inv[r] : T(0);
        if (!sink) continue;
        if (g.last_call && block + cos.columns == part.p.padded) queue.start(number + 1);
        add_gradient(part.p, part.x, tile, cos, tiles, g, ahead, state, queue.loading());
      }
    }
    for (int64_t j = 0; j < tile.classes && d_bias; j++) {
      T& sum = d_bias[tile.first_class + j] = 0;  // no gradient where a sub-centre is not the maximum
      for (int64_t r = j * p.sub_centers; r < (j + 1) * p.sub_centers; r++) sum += lane_sum<T>(sums.d_bias[r]);
    }
    if (!sink) continue;
    if (!p.padded) std::fill_n(g.d_w, tile.rows * p.dim, T(0));
    for (int64_t k = 0; k < count; k++) add_targets(parts[k].p, parts[k].in, tile, g.d_w);
    sink->finish(tile, first, p.dim, g.d_w);
    if (g.streams) end_streams();
  }
}

// Where the tasks' ranges begin, and the last one's end. In a range the next tile is read while one is multiplied, so
// they are long; the last ones are short, so that threads end together.
inline std::vector<int64_t> ranges_of_tiles(int64_t tiles, int64_t threads) {
  std::vector<int64_t> begins{0};
  while (begins.back() < tiles) {
    const int64_t share = (tiles - begins.back()) / (4 * threads);
    begins.push_back(begins.back() + std::max<int64_t>(1, std::min<int64_t>(16, share)));
  }
  return begins;
}

// All tiles; calls with no rows are not among several.
template <class T, class Sink>
void backward_tiles(const BackwardPart<T>* parts, int64_t count, const Sink* sink, T* d_bias,
                    const Parallel& parallel) {
  const Partition cut = partition(parts[0].p, kBackwardBlocking);
  const std::vector<int64_t> begins = ranges_of_tiles(cut.tiles, parallel.threads);
  parallel(int64_t(begins.size()) - 1,
           [&](int64_t n) { backward_task(parts, count, cut, begins[n], begins[n + 1], sink, d_bias); });
}

template <class T>
void backward(const Problem<T>& p, const BackwardIn<T>& in, const BackwardOut<T>& out, const Parallel& parallel) {
  const BackwardPart<T> part{p, in, {p, true, parallel}, choose_rule<WeighBackward<T>>(p.rule, out.d_bias != nullptr)};
  const StoreGradient<T> sink{out, p.w.storage};
  backward_tiles(&part, 1, out.d_w ? &sink : nullptr, out.d_bias, parallel);
}

template <class T>
void step(const BackwardCall<T>* calls, int64_t count, const RowUpdate<T>& update, const Parallel& parallel) {
  std::vector<BackwardPart<T>> parts;
  for (int64_t k = 0; k < count; k++) {
    const Problem<T>& p = *calls[k].p;
    parts.push_back({p, calls[k].in, {p, true, parallel}, choose_rule<WeighBackward<T>>(p.rule, false)});
  }
  const UpdateWeights<T> sink{update};
  backward_tiles<T>(parts.data(), count, &sink, nullptr, parallel);
}
