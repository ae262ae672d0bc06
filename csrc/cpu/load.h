// Tiles of rows of w: their memory, how their rows are read ahead, measured and laid out for the products, and how a
// task goes from one to the next. In panels (product.h) that is done at once, in tiles (tiles.h) beside products.
// Included inside the namespace of an instruction set; never on its own.

constexpr double kEps = 1e-12;  // norms are clamped from below, as in torch.nn.functional.normalize

// Memory that a thread keeps for the next call: fresh pages would cost more than the work on a small tile.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    thread_local Held held;
    if (bytes > held.size) {
      std::free(held.memory);
      held.size = 0;
      held.memory = static_cast<char*>(std::aligned_alloc(64, size_t(round_up(bytes, 64))));
      if (!held.memory) throw std::bad_alloc();
      held.size = bytes;
    }
    next_ = held.memory;
  }
  template <class V>
  V* take(int64_t n) {
    V* p = reinterpret_cast<V*>(next_);
    next_ += room<V>(n);
    return p;
  }
  template <class V>
  static int64_t room(int64_t n) {
    return round_up(n * int64_t(sizeof(V)), 64);
  }

 private:
  struct Held {
    char* memory = nullptr;
    int64_t size = 0;
    ~Held() { std::free(memory); }
  };
  char* next_;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that begins with a cache line.
template <class T>
std::unique_ptr<T[], Free> make_lines(int64_t n) {
  T* p = static_cast<T*>(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(n, 1) * int64_t(sizeof(T)), 64))));
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(p);
}

// The rows of w that one tile holds, and what is computed from them.
template <class T>
struct Tile {
  int64_t first_class, classes, rows;
  int64_t height;     // rows of what is multiplied: `rows`, or a multiple of 32
  const T** source;   // [rows] the rows of w as T
  T* copy;            // [rows, dim] for those that cannot be read in place
  T *inv, *ones;      // [rows] 1 / max(|w_r|, eps), or 1; 1
  T *label, *bias;    // [rows] the row's class, counted from first_class; its bias, or 0
  T* panels;          // w in panels [depth / kPanel, rows, kPanel]
  Tiles left, right;  // or as the left operand of the product with x_hat, and as the right one of that with A
};

template <class T>
int64_t tile_rows_room(const Problem<T>& p, int64_t rows) {
  using S = Scratch;
  return S::room<const T*>(rows) + S::room<T>(rows * p.dim) + 4 * S::room<T>(rows);
}

// A tile without operands.
template <class T>
Tile<T> make_tile_rows(const Problem<T>& p, int64_t rows, Scratch& scratch) {
  Tile<T> t{};
  t.source = scratch.take<const T*>(rows);
  t.copy = scratch.take<T>(rows * p.dim);
  t.inv = scratch.take<T>(rows);
  t.ones = scratch.take<T>(rows);
  t.label = scratch.take<T>(rows);
  t.bias = scratch.take<T>(rows);
  return t;
}

template <class T>
double sum_of_squares(const T* row, int64_t dim) {
  Vec<T> sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes<T> <= dim; d += 4 * kLanes<T>)
    for (int v = 0; v < 4; v++) {
      const Vec<T> a = load(row + d + v * kLanes<T>);
      sums[v] += a * a;
    }
  Vec<double> wide{};  // the norm's error is one of every cosine of the class
  for (int v = 0; v < 4; v++) wide += widened(sums[v]);
  double sum = lane_sum<double>(wide);
  for (; d < dim; d++) sum += double(row[d]) * double(row[d]);
  return sum;
}

constexpr int64_t kAskedLines = 4;          // at most at one time: with more, what goes on beside waits for memory
constexpr int64_t kAskedLinesOfBlock = 32;  // beside a product of 32 x 32 in tiles, which takes longer

// Rows that will be read soon, asked for a few lines at a time while something else is computed.
class Ahead {
 public:
  // Nothing.
  Ahead() = default;

  // Rows [first, last) of w, where they can be read in place.
  Ahead(const Weights& w, int64_t dim, int64_t first, int64_t last) {
    const int64_t size = size_of(w.storage);
    if (w.col_stride == 1) *this = Ahead(w.data, w.row_stride * size, dim * size, w.index, first, last);
  }

  // Of a matrix whose rows lie `step` bytes apart and have `bytes` each; row r is index[r], if there is one.
  Ahead(const void* base, int64_t step, int64_t bytes, const int64_t* index, int64_t first, int64_t last)
      : base_(static_cast<const char*>(base)), index_(index), step_(step), bytes_(bytes), row_(first), end_(last) {
    next_row();
  }

  // All of it in so many calls of ask(), if that is not more than `most` lines at one time. Before the first of them.
  Ahead& spread(int64_t asks, int64_t most = kAskedLines) {
    const int64_t rows = end_ - row_ + 1, lines = rows * div_up(bytes_, 64);  // row_ is the next one already
    lines_ = std::min(most, div_up(lines, std::max<int64_t>(asks, 1)));
    return *this;
  }
  FM_INLINE void ask() {
    for (int64_t lines = lines_; lines > 0 && next_ < stop_;) {
      const char *next = next_, *const end = std::min(stop_, next + 64 * lines);
      for (; next < end; next += 64, lines--) __builtin_prefetch(next, 0, 2);
      next_ = next;
      if (next >= stop_) next_row();
    }
  }

 private:
  void next_row() {
    if (row_ >= end_) return;
    next_ = base_ + (index_ ? index_[row_] : row_) * step_;
    stop_ = next_ + bytes_;
    row_++;
  }

  const char *base_ = nullptr, *next_ = nullptr, *stop_ = nullptr;  // the line to ask for; the end of its row
  const int64_t* index_ = nullptr;
  int64_t step_ = 0, bytes_ = 0, row_ = 0, end_ = 0, lines_ = 0;
};

// The rows of w of the tile with this number, of tiles of so many rows, to be asked for in so many calls.
template <class T>
Ahead tile_ahead(const Problem<T>& p, int64_t number, int64_t tile_rows, int64_t asks) {
  const int64_t first = number * tile_rows;
  return Ahead(p.w, p.dim, first, std::min(first + tile_rows, p.classes * p.sub_centers)).spread(asks);
}

// How often something can be asked for while a product [M, K] x [K, N] runs.
template <class T>
int64_t asks_in_product(const Problem<T>& p, int64_t M, int64_t N, int64_t K) {
  if (p.pieces) return calls_meanwhile(round_up(M, kPad), round_up(N, kPad), round_up(K, kPad), p.pieces);
  return M * div_up(N, kPanel<T>) * div_up(K, kProductDepth);  // rows of blocks of sums
}

template <class T>
void load_bias(const Problem<T>& p, Tile<T>& t) {
  for (int64_t r = 0; r < t.rows; r++) t.bias[r] = p.bias ? p.bias[t.first_class + r / p.sub_centers] : T(0);
}

// The tile with this number: which rows it holds.
template <class T>
void place_tile(const Problem<T>& p, int64_t number, int64_t tile_classes, Tile<T>& t) {
  t.first_class = number * tile_classes;
  t.classes = std::min(tile_classes, p.classes - t.first_class);
  t.rows = t.classes * p.sub_centers;
  t.height = multiplied_rows(p, t.rows);
}

template <class T>
const T* load_source(const Problem<T>& p, Tile<T>& t, int64_t r) {
  t.ones[r] = 1;
  t.label[r] = T(r / p.sub_centers);
  return t.source[r] = row_of(p.w, t.first_class * p.sub_centers + r, p.dim, t.copy + r * p.dim);
}

template <class T>
T inverse(double squares) {
  const double norm = std::sqrt(squares);
  return T(1 / (norm < kEps ? kEps : norm));
}

// The tile with this number, in panels.
template <class T>
void load_tile(const Problem<T>& p, int64_t number, int64_t tile_classes, Tile<T>& t) {
  place_tile(p, number, tile_classes, t);
  for (int64_t r = 0; r < t.rows; r++) {
    const T* row = load_source(p, t, r);
    t.inv[r] = p.normalize_w ? inverse<T>(sum_of_squares(row, p.dim)) : T(1);
    pack_row(row, p.dim, t.rows, t.panels + r * kPanel<T>);
  }
  load_bias(p, t);
}

// Work that can go on while products run, some units of it at a time. Here there is none.
struct Nothing {
  int64_t units() const { return 0; }
  FM_INLINE void advance(int64_t) {}
  void finish() {}
};

// A tile in tiles: norms, and the left operand if it is wanted. A unit is a line of a tile.
template <class T>
class Loading {
 public:
  Loading() = default;
  Loading(const Problem<T>& p, int64_t number, int64_t tile_classes, Tile<T>& t) : p_(&p), t_(&t), number_(number) {
    place_tile(p, number, tile_classes, t);
    rows_ = t.rows;
    width_ = round_up(p.dim, kPad);
  }
  void want_left() { left_ = t_->left; }
  int64_t number() const { return number_; }
  int64_t units() const { return rows_ * (width_ / kTileStep); }

  FM_INLINE void advance(int64_t units) {
    while (units > 0 && row_ < rows_) units -= advance_in_row(units);
  }
  void finish() {
    advance(units());
    load_bias(*p_, *t_);
  }

 private:
  // The next units of the row, at most so many; how many they are.
  FM_INLINE int64_t advance_in_row(int64_t most) {
    if (column_ == 0) source_ = load_source(*p_, *t_, row_);
    const int64_t first = column_, last = std::min(width_, first + most * kTileStep), dim = p_->dim;
    if constexpr (kTiled<T>) {
      const Tiles left = left_;
      const T* source = source_;
      Vec<T> low = low_, high = high_;
      for (int64_t d = first; d < last; d += kTileStep) {
        const Vec<T> v = load_part(source + d, dim - d), w = load_part(source + d + kTileSide, dim - d - kTileSide);
        if (left.first) put_left(left, row_, d, v, w);
        low += v * v;
        high += w * w;
      }
      low_ = low, high_ = high;
    }
    column_ = last;
    if (last == width_) end_row();
    return (last - first) / kTileStep;
  }
  void end_row() {
    const double sum = lane_sum<double>(widened(low_) + widened(high_));
    low_ = high_ = Vec<T>{};
    t_->inv[row_] = p_->normalize_w ? inverse<T>(sum) : T(1);
    column_ = 0;
    row_++;
  }

  const Problem<T>* p_ = nullptr;
  Tile<T>* t_ = nullptr;
  int64_t number_ = -1;  // of the tile; none yet
  Tiles left_;
  const T* source_ = nullptr;
  int64_t rows_ = 0, width_ = 0;
  int64_t row_ = 0, column_ = 0;  // of the next unit
  Vec<T> low_{}, high_{};         // sums of squares of the row
};

// The rows of a loaded tile as a right operand, with zeros below. A unit is a vector of two rows.
template <class T>
class Turning {
 public:
  Turning(const Problem<T>& p, const Tile<T>& t, bool wanted)
      : t_(t), dim_(p.dim), width_(round_up(p.dim, kPad)), end_(wanted ? t.height : 0) {}
  int64_t units() const { return end_ / 2 * (width_ / kLanes<T>); }

  FM_INLINE void advance(int64_t units) {
    while (units > 0 && row_ < end_) units -= advance_in_row(units);
  }
  void finish() { advance(units()); }

 private:
  FM_INLINE int64_t advance_in_row(int64_t most) {
    const int64_t first = column_, last = std::min(width_, first + most * kLanes<T>), dim = dim_;
    if constexpr (kTiled<T>) {
      const Tiles right = t_.right;
      const bool has_even = row_ < t_.rows, has_odd = row_ + 1 < t_.rows;
      const T *even = has_even ? t_.source[row_] : nullptr, *odd = has_odd ? t_.source[row_ + 1] : nullptr;
      for (int64_t d = first; d < last; d += kLanes<T>)
        put_right(right, row_, d, has_even ? load_part(even + d, dim - d) : Vec<T>{},
                  has_odd ? load_part(odd + d, dim - d) : Vec<T>{});
    }
    column_ = last;
    if (last == width_) column_ = 0, row_ += 2;
    return (last - first) / kLanes<T>;
  }

  const Tile<T>& t_;
  const int64_t dim_, width_, end_;
  int64_t row_ = 0, column_ = 0;  // of the next unit
};

// The tiles of a task, one after the other. Those in tiles have the same operands: the next one is made, while products
// with the one before run, as soon as they are free. want_left(tile) says whether the left one is needed.
template <class T, class WantLeft>
class TileQueue {
 public:
  TileQueue(const Problem<T>& p, const Partition& cut, int64_t depth, int64_t end, Scratch& scratch, WantLeft want_left)
      : p_(p), tile_classes_(cut.tile_classes), end_(end), want_left_(want_left) {
    const int64_t rows = cut.tile_rows, height = round_up(rows, kPad), n = height * depth * p.pieces;
    T* panels = scratch.take<T>(p.pieces ? 0 : rows * depth);
    const Tiles left{scratch.take<uint16_t>(n), p.pieces, depth / kTileStep};
    const Tiles right{scratch.take<uint16_t>(n), p.pieces, height / kTileStep};
    for (Tile<T>& t : tiles_) {
      t = make_tile_rows(p, rows, scratch);
      t.panels = panels, t.left = left, t.right = right;
    }
  }
  static int64_t room(const Problem<T>& p, int64_t rows, int64_t depth) {
    using S = Scratch;
    return 2 * tile_rows_room(p, rows) + S::room<T>(p.pieces ? 0 : rows * depth) +
           2 * S::room<uint16_t>(round_up(rows, kPad) * depth * p.pieces);
  }

  // The tile with this number, ready to be worked with.
  Tile<T>& take(int64_t number) {
    Tile<T>& t = tiles_[number % 2];
    if (!p_.pieces) {
      load_tile(p_, number, tile_classes_, t);
      return t;
    }
    if (loading_.number() != number) start(number);
    loading_.finish();
    return t;
  }

  // The left operand is free for the tile with this number, if the task has one.
  void start(int64_t number) {
    if (!p_.pieces || number >= end_) return;
    Tile<T>& t = tiles_[number % 2];
    loading_ = Loading<T>(p_, number, tile_classes_, t);
    if (want_left_(t)) loading_.want_left();
  }
  Loading<T>& loading() { return loading_; }

 private:
  const Problem<T>& p_;
  const int64_t tile_classes_, end_;
  const WantLeft want_left_;
  Tile<T> tiles_[2];
  Loading<T> loading_;
};
