// The sweep over the class weights, once for every instruction set. With each tile of rows of w, for each block of rows
// of x (Blocking):
//
//   cosines  C = w x_hat^T            [tile, rows]    norms of w from the same rows, applied to C
//   forward  A = exp(u - K ln 2) N'   O += A^T w      online softmax; K is whole, so rescaling rounds nothing
//   backward G = (g_red A + g_sum) s N'   dW = G x_hat, with the Jacobian of the norm, then the target's share
//
// C lies in panels (product.h), and so do operands of type T; those of bfloat16 pieces lie in tiles (tiles.h).
//
// Included inside the namespace of an instruction set; never on its own.

constexpr double kNoPower = -1e30;  // K of a row that has seen no rival

// x_hat in the layouts that the products read; made once a call.
template <class T>
struct PackedRows {
  std::unique_ptr<T[], Free> columns;  // x_hat^T in panels: [padded / kPanel, depth, kPanel]
  std::unique_ptr<T[], Free> rows;     // x_hat in panels: [depth / kPanel, padded, kPanel]
  Tiles columns_tiles, rows_tiles;     // or both as right operands of tiles
  int64_t depth;                       // dim, rounded up to what the products take at once

  PackedRows(const Problem<T>& p, bool backward, const Parallel& parallel)
      : depth(round_up(p.dim, p.pieces ? kPad : kPanel<T>)) {
    const int64_t n = p.padded * depth;
    if (p.pieces) {
      memory_ = make_lines<uint16_t>((backward ? 2 : 1) * n * p.pieces);
      columns_tiles = {memory_.get(), p.pieces, depth / kTileStep};
      if (backward) rows_tiles = {memory_.get() + n * p.pieces, p.pieces, p.padded / kTileStep};
    } else {
      columns = make_lines<T>(n);
      if (backward) rows = make_lines<T>(n);
    }
    parallel(p.padded / kPad, [&](int64_t strip) {
      const int64_t first = strip * kPad;
      if constexpr (kTiled<T>) {
        if (p.pieces) return tile(p, first);
      }
      for (int64_t i = first; i < first + kPad; i += kPanel<T>) pack(p, i);
    });
  }

 private:
  void pack(const Problem<T>& p, int64_t first) {
    constexpr int64_t P = kPanel<T>;
    const T* x = p.x_hat + first * p.dim;
    T* out = columns.get() + first * depth;
    for (int64_t begin = 0; begin < depth; begin += kLanes<T>) {  // a line of a row at a time, not a number of each
      const int64_t end = std::min(begin + kLanes<T>, p.dim);
      for (int64_t i = 0; i < P; i++) {
        for (int64_t d = begin; d < end; d++) out[d * P + i] = x[i * p.dim + d];
        for (int64_t d = std::max(begin, end); d < begin + kLanes<T>; d++) out[d * P + i] = 0;
      }
    }
    for (int64_t i = 0; i < P && rows; i++) pack_row(x + i * p.dim, p.dim, p.padded, rows.get() + (first + i) * P);
  }

  void tile(const Problem<T>& p, int64_t first) {
    const T* x = p.x_hat + first * p.dim;
    for (int64_t i = 0; i < kPad; i += kTileSide) put_columns_right(columns_tiles, first + i, x + i * p.dim, p.dim);
    for (int64_t i = 0; i < kPad && rows_tiles.first; i += 2)
      put_rows_right(rows_tiles, first + i, x + i * p.dim, x + (i + 1) * p.dim, p.dim);
  }

  std::unique_ptr<uint16_t[], Free> memory_;
};

// The cosines of one tile with one block of rows of x.
template <class T>
struct Cosines {
  static constexpr int64_t width = kPanel<T>;

  T* buffer;               // [height of the tile, columns]
  T* place;                // [columns] the row's target as a class of this tile, -1 if it is elsewhere
  T* c;                    // in panels, to be multiplied with `factor` of the row: `buffer`, or where they are kept
  const T* factor;         // [rows of the tile]
  int64_t columns, first;  // rows of x in this block; the first one
  int64_t height;          // of a panel

  // Column i of the tile's first row; from a row to the next it is `width`.
  T* at(int64_t i) const { return c + i / width * width * height + i % width; }
};

// Stands for the cosine of a sub-centre that is not the maximum of its class: it takes part in nothing.
template <class T>
constexpr T kLoser = T(1e30);

template <class T>
void keep_best_centers(const Problem<T>& p, const Tile<T>& t, const Cosines<T>& cos) {
  for (int64_t j = 0; j < t.classes; j++)
    for (int64_t i = 0; i < cos.columns; i++) {
      T *best = nullptr, *first = cos.at(i);
      for (int64_t r = j * p.sub_centers; r < (j + 1) * p.sub_centers; r++) {
        T* c = first + r * cos.width;
        *c *= t.inv[r];
        if (best && !exceeds(*c, *best)) {
          *c = kLoser<T>;
        } else {
          if (best) *best = kLoser<T>;
          best = c;
        }
      }
    }
}

// Whether the backward finds products in memory, with the first rows of w, or makes them again.
enum class Kept { write, read };

// They lie in panels as in Cosines, but of all rows that are kept: [padded / width, kept_rows, width].
template <class T>
T* kept_at(const Problem<T>& p, const Tile<T>& t, int64_t column) {
  return p.kept + column * p.kept_rows + t.first_class * p.sub_centers * Cosines<T>::width;
}

template <Kept direction, class T>
void move_kept(const Problem<T>& p, const Tile<T>& t, const Cosines<T>& cos) {
  const int64_t rows = std::min(t.rows, p.kept_rows - t.first_class * p.sub_centers);
  for (int64_t i = 0; i < cos.columns && rows > 0; i += cos.width) {
    T *here = cos.at(i), *there = kept_at(p, t, cos.first + i);
    const size_t bytes = size_t(rows * cos.width) * sizeof(T);
    if constexpr (direction == Kept::write)
      std::memcpy(there, here, bytes);
    else
      std::memcpy(here, there, bytes);
  }
}

// Whether the products of all of the tile's rows are kept.
template <class T>
bool all_kept(const Problem<T>& p, const Tile<T>& t) {
  return t.first_class * p.sub_centers + t.rows <= p.kept_rows;
}

template <class T, class Work>
void multiply_rows_of_x(const Problem<T>& p, const PackedRows<T>& x, const Tile<T>& t, const Cosines<T>& out,
                        Work& work, Ahead& ahead) {
  if constexpr (kTiled<T>) {
    if (p.pieces) {
      const int64_t M = t.height, N = out.columns, units = pace(work, M, N, x.depth, p.pieces);
      return multiply_tiles(
          M, N, x.depth, t.left, x.columns_tiles.from(out.first / kTileSide, 0), out.c, out.height, false,
          [](int64_t, int64_t, float*) {}, [&] { kTilesApart ? work.advance(units) : ahead.ask(); });
    }
  }
  multiply_panels(t.rows, out.columns, x.depth, t.panels, x.columns.get() + out.first * x.depth, out.c, out.height,
                  [&] { ahead.ask(); });
}

template <Kept direction, class T, class Work>
void compute_cosines(const Problem<T>& p, const PackedRows<T>& x, const Tile<T>& t, int64_t first, int64_t block,
                     Cosines<T>& out, Work& work, Ahead& ahead) {
  const bool whole = all_kept(p, t), known = direction == Kept::read && whole;
  // Where they are kept, products are made at once, if nobody overwrites them there: neither sub-centres nor rows below
  // the tile's. In the backward, a copy is read faster than memory itself.
  const bool in_place = direction == Kept::write && whole && t.rows == t.height && p.sub_centers == 1;
  out.first = first;
  out.c = in_place ? kept_at(p, t, first) : out.buffer;
  out.height = in_place ? p.kept_rows : t.height;
  const int64_t n = out.columns = std::min(block, p.padded - first);
  if (!known) multiply_rows_of_x(p, x, t, out, work, ahead);
  if (!in_place && (known || direction == Kept::write)) move_kept<direction>(p, t, out);
  for (int64_t i = 0; i < n; i++) {
    const int64_t target = p.target[first + i], j = target - t.first_class;
    out.place[i] = target >= 0 && j >= 0 && j < t.classes ? T(j) : T(-1);
  }
  out.factor = p.sub_centers == 1 ? t.inv : t.ones;
  if (p.sub_centers > 1) keep_best_centers(p, t, out);
}

// The cosine of one row of w with a vector of rows of x, and whether it counts: neither target nor a lesser sub-centre.
template <class T>
struct Element {
  Vec<T> c;
  decltype(Vec<T>{} == Vec<T>{}) excluded;
};

template <class T>
FM_INLINE Element<T> element(const Problem<T>& p, const Tile<T>& t, const Cosines<T>& cos, const T* at, int64_t r,
                             Vec<T> target) {
  Vec<T> c = load(at);
  auto excluded = target == splat(t.label[r]);
  if (p.sub_centers > 1) {
    const auto loser = c == splat(kLoser<T>);
    excluded |= loser;
    c = select(loser, Vec<T>{}, c);
  }
  c *= cos.factor[r];
  if (p.clamp) c = within_one<T>(c);
  return {c, excluded};
}

template <class T>
FM_INLINE void softplus(Vec<T> u, Vec<T>& value, Vec<T>& slope) {
  const Vec<T> zero{}, one = zero + T(1), e = exponential(select(u < zero, u, -u));
  value = select(u > zero, u, zero) + log1p_unit(e);
  slope = select(u < zero, e, one) / (one + e);
}

// The instance of a task for a rule, and for whether the rarer outputs are wanted.
template <class Task>
auto choose_rule(RuleCode rule, bool extras) {
#define FM_RULE(name)  \
  case RuleCode::name: \
    return extras ? Task::template pointer<RuleCode::name, true>() : Task::template pointer<RuleCode::name, false>();
  switch (rule) {
    FM_RULE(hard)
    FM_RULE(curricular)
    FM_RULE(clip)
    FM_RULE(filter)
    FM_RULE(gauss)
    FM_RULE(circle)
    FM_RULE(power)
    default:
      FM_RULE(identity)
  }
#undef FM_RULE
}
