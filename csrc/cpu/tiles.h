// Matrix products of bfloat16 tiles, summed in float32: on AMX (FM_TILES 2) or with the dot products of AVX-512 (1).
//
// A float32 number is three bfloat16 pieces, each the rounded rest of those before it: 24 bits. Of the nine products
// of pieces the six largest are taken; the others are below 2^-24 of the whole. Operands that are to be bfloat16 are
// one piece.
//
// An operand lies in tiles of 512 numbers, [strip of 16 rows or columns, step of 32 along the sum, piece]: a left one
// by rows [16, 32], a right one in pairs of rows [16, 16, 2], as the instructions read them. The result lies in panels
// of 32 columns (product.h), whose blocks of 32 x 32 are contiguous.
// Included inside the namespace of an instruction set; never on its own.

constexpr int64_t kTileSide = 16, kTileStep = 32, kTileNumbers = kTileSide * kTileStep;
constexpr int64_t kTileBlock = 2 * kTileSide;  // rows and columns of a block of sums
constexpr int64_t kMostPieces = 3;

// An operand, or a part of it.
struct Tiles {
  uint16_t* first = nullptr;
  int64_t pieces = 1, steps = 0;  // steps in a strip

  uint16_t* tile(int64_t strip, int64_t step, int64_t piece) const {
    return first + ((strip * steps + step) * pieces + piece) * kTileNumbers;
  }
  Tiles from(int64_t strip, int64_t step) const { return {tile(strip, step, 0), pieces, steps}; }
};

// Whether products of T may be made of pieces in this build.
template <class T>
constexpr bool kTiled = FM_TILES > 0 && sizeof(T) == 4;

// Whether products of tiles have a unit of their own, and leave the core's others to what runs between them.
constexpr bool kTilesApart = FM_TILES == 2;

#if FM_TILES > 0

static_assert(kTileBlock == kPad && kTileStep == kPad && kPanel<float> == kTileBlock, "operands are whole blocks");

// Sixteen bfloat16 numbers. Intrinsics, as the compiler takes the conversions of its own vectors apart.
using Piece = __m256i;

FM_INLINE __m512i widen(Piece piece) { return _mm512_maskz_cvtepu16_epi32(0xffff, piece); }

// The next piece of v, the nearest numbers, ties to even; v keeps the rest.
FM_INLINE Piece take_piece(Vec<float>& v) {
  const Piece piece = (Piece)_mm512_cvtneps_pbh((__m512)v);
  v -= (Vec<float>)_mm512_maskz_slli_epi32(0xffff, widen(piece), 16);
  return piece;
}

// The next pieces of v and w, one after the other.
FM_INLINE __m512i take_pieces(Vec<float>& v, Vec<float>& w) {
  const auto pieces = (__m512i)_mm512_cvtne2ps_pbh((__m512)w, (__m512)v);
  Piece halves[2];
  __builtin_memcpy(halves, &pieces, sizeof halves);
  v -= (Vec<float>)_mm512_maskz_slli_epi32(0xffff, widen(halves[0]), 16);
  w -= (Vec<float>)_mm512_maskz_slli_epi32(0xffff, widen(halves[1]), 16);
  return pieces;
}

// The first half with the second one, in pairs.
FM_INLINE __m512i interleave(__m512i pieces) {
  VecOf<float>::bits pairs;
  for (uint32_t l = 0; l < 16; l++) pairs[l] = (16 + l) << 16 | l;
  return _mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)pairs, pieces);
}

FM_INLINE void put(uint16_t* to, Piece piece) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), piece); }
FM_INLINE void put(uint16_t* to, __m512i pieces) { _mm512_storeu_si512(to, pieces); }

FM_INLINE uint16_t* left_line(const Tiles& out, int64_t m, int64_t k) {
  return out.tile(m / kTileSide, k / kTileStep, 0) + m % kTileSide * kTileStep + k % kTileStep;
}

// Numbers (m, k) .. (m, k + 15) of a left operand.
FM_INLINE void put_left(const Tiles& out, int64_t m, int64_t k, Vec<float> v) {
  uint16_t* to = left_line(out, m, k);
  if (out.pieces == 1) return put(to, (Piece)_mm512_cvtneps_pbh((__m512)v));
  put(to, take_piece(v));
  FM_UNROLL for (int64_t piece = 1; piece < kMostPieces; piece++) put(to + piece * kTileNumbers, take_piece(v));
}

// Numbers (m, k) .. (m, k + 31), a line of a tile.
FM_INLINE void put_left(const Tiles& out, int64_t m, int64_t k, Vec<float> v, Vec<float> w) {
  uint16_t* to = left_line(out, m, k);
  put(to, take_pieces(v, w));
  if (out.pieces == 1) return;
  FM_UNROLL for (int64_t piece = 1; piece < kMostPieces; piece++) put(to + piece * kTileNumbers, take_pieces(v, w));
}

// Numbers (k, n) .. (k, n + 15) of a right operand, and those of the row k + 1 after an even k.
FM_INLINE void put_right(const Tiles& out, int64_t k, int64_t n, Vec<float> even, Vec<float> odd) {
  uint16_t* to = out.tile(n / kTileSide, k / kTileStep, 0) + k % kTileStep * kTileSide;
  put(to, interleave(take_pieces(even, odd)));
  if (out.pieces == 1) return;
  FM_UNROLL for (int64_t piece = 1; piece < kMostPieces; piece++)
      put(to + piece * kTileNumbers, interleave(take_pieces(even, odd)));
}

// Up to 16 numbers, zeros for the rest.
FM_INLINE Vec<float> load_part(const float* p, int64_t count) {
  if (count >= kTileSide) return load(p);
  Vec<float> v{};
  if (count > 0) __builtin_memcpy(&v, p, size_t(count) * sizeof(float));
  return v;
}

// Two neighbouring rows [dim] of a right operand.
inline void put_rows_right(const Tiles& out, int64_t k, const float* even, const float* odd, int64_t dim) {
  for (int64_t n = 0; n < round_up(dim, kPad); n += kTileSide)
    put_right(out, k, n, load_part(even + n, dim - n), load_part(odd + n, dim - n));
}

// Rows n .. n + 15 of a matrix [.., dim], transposed: columns of a right operand.
inline void put_columns_right(const Tiles& out, int64_t n, const float* rows, int64_t dim) {
  using Bits = VecOf<float>::bits;
  for (int64_t k = 0; k < round_up(dim, kPad); k += kTileStep) {
    Bits pairs[kMostPieces][kTileSide];
    for (int64_t i = 0; i < kTileSide; i++) {
      const float* row = rows + i * dim + k;
      Vec<float> low = load_part(row, dim - k), high = load_part(row + kTileSide, dim - k - kTileSide);
      for (int64_t piece = 0; piece < out.pieces; piece++) {
        const Piece halves[2] = {take_piece(low), take_piece(high)};
        __builtin_memcpy(&pairs[piece][i], halves, sizeof halves);
      }
    }
    for (int64_t piece = 0; piece < out.pieces; piece++) {
      transpose(pairs[piece]);
      for (int64_t i = 0; i < kTileSide; i++)
        put(out.tile(n / kTileSide, k / kTileStep, piece) + i * kTileStep, (__m512i)pairs[piece][i]);
    }
  }
}

// Which pieces of the left operand meet which of the right one, so that from one pair to the next one of them stays.
template <int pieces>
constexpr int kPairs = pieces == 1 ? 1 : 6;
constexpr int kLeftPiece[] = {1, 1, 2, 0, 0, 0}, kRightPiece[] = {1, 0, 0, 0, 1, 2};

// How far a block of sums goes along the sum at one time, in steps. Short ways leave two strips of one operand in the
// L1 cache while those of the other one pass: worth it for one piece in AMX. For three, sums that come and go cost more
// than strips from the L2 cache (288 GFLOP/s with 2 steps, 371 with 16, 390 where nothing is loaded, side by side), and
// so they do with the dot products of AVX-512 (a forward takes 5 % less with 16 than with 8).
template <int pieces>
constexpr int64_t kDepthSteps = pieces == 1 && kTilesApart ? 8 : 16;

#if FM_TILES == 2

// Compilers believe that these instructions read or write less memory than they do.
FM_INLINE void see_memory() { asm volatile("" ::: "memory"); }

// While it lives, the thread's tile registers have the shape that the products need.
class TileUnit {
 public:
  explicit TileUnit(bool needed) : needed_(needed) {
    if (!needed) return;
    _tile_storeconfig(found_);
    _tile_loadconfig(&kShape);
  }
  ~TileUnit() {
    if (!needed_) return;
    see_memory();
    _tile_loadconfig(found_);  // whoever had configured them need not know
  }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static constexpr Shape kShape{
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};  // of the eight registers

  const bool needed_;
  alignas(64) char found_[64];
};

// c [32, 32] = or += two strips of left times two strips of right. Registers 0 to 3: c; 4, 5: left; 6, 7: right.
template <int pieces, class Meanwhile>
FM_INLINE void multiply_tile_block(const Tiles& left, const Tiles& right, int64_t steps, float* c, bool add,
                                   Meanwhile& meanwhile) {
  constexpr int64_t line = kTileStep * sizeof(uint16_t), row = kTileBlock * sizeof(float);
  constexpr int64_t next = pieces * kTileNumbers;
  float* low = c + kTileSide * kTileBlock;
  if (add) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + kTileSide, row);
    _tile_loadd(2, low, row);
    _tile_loadd(3, low + kTileSide, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t *a0 = left.tile(0, 0, 0), *a1 = left.tile(1, 0, 0), *b0 = right.tile(0, 0, 0),
                 *b1 = right.tile(1, 0, 0);
  for (int64_t step = 0; step < steps; step++) {
    FM_UNROLL for (int pair = 0; pair < kPairs<pieces>; pair++) {
      const int l = pieces == 1 ? 0 : kLeftPiece[pair], r = pieces == 1 ? 0 : kRightPiece[pair];
      if (pair == 0 || l != kLeftPiece[pair - 1]) {
        _tile_loadd(4, a0 + l * kTileNumbers, line);
        _tile_loadd(5, a1 + l * kTileNumbers, line);
      }
      if (pair == 0 || r != kRightPiece[pair - 1]) {
        _tile_loadd(6, b0 + r * kTileNumbers, line);
        _tile_loadd(7, b1 + r * kTileNumbers, line);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      meanwhile();
    }
    a0 += next, a1 += next, b0 += next, b1 += next;
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c + kTileSide, row);
  _tile_stored(2, low, row);
  _tile_stored(3, low + kTileSide, row);
}

#else

FM_INLINE void see_memory() {}

constexpr int kTileRows = 8;

// The same, some rows of c at a time in registers. The unit for vectors has time for asking for memory only.
template <int pieces, class Meanwhile>
FM_INLINE void multiply_tile_block(const Tiles& left, const Tiles& right, int64_t steps, float* c, bool add,
                                   Meanwhile& meanwhile) {
  constexpr int rows = kTileRows;
  for (int64_t m = 0; m < kTileBlock; m += rows) {
    __m512 sum[rows][2];
    FM_UNROLL for (int r = 0; r < rows; r++) {
      FM_UNROLL for (int v = 0; v < 2; v++) sum[r][v] =
          add ? _mm512_loadu_ps(c + (m + r) * kTileBlock + v * kTileSide) : _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < steps; step++) {
      meanwhile();
      for (int pair = 0; pair < kPairs<pieces>; pair++) {
        const int l = pieces == 1 ? 0 : kLeftPiece[pair], r = pieces == 1 ? 0 : kRightPiece[pair];
        const uint16_t* a = left.tile(m / kTileSide, step, l) + m % kTileSide * kTileStep;
        const uint16_t *b0 = right.tile(0, step, r), *b1 = right.tile(1, step, r);
        for (int64_t k = 0; k < kTileStep; k += 2) {
          const auto v0 = (__m512bh)_mm512_loadu_si512(b0 + k * kTileSide);
          const auto v1 = (__m512bh)_mm512_loadu_si512(b1 + k * kTileSide);
          FM_UNROLL for (int i = 0; i < rows; i++) {
            int32_t both;
            __builtin_memcpy(&both, a + i * kTileStep + k, sizeof both);
            const auto factor = (__m512bh)_mm512_set1_epi32(both);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], factor, v0);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], factor, v1);
          }
        }
      }
    }
    FM_UNROLL for (int r = 0; r < rows; r++) {
      FM_UNROLL for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + (m + r) * kTileBlock + v * kTileSide, sum[r][v]);
    }
  }
}

#endif

// How often multiply_tiles calls meanwhile().
inline int64_t calls_meanwhile(int64_t M, int64_t N, int64_t K, int64_t pieces) {
  const int64_t blocks = M / kTileBlock * (N / kTileBlock), steps = K / kTileStep;
#if FM_TILES == 2
  return blocks * steps * (pieces == 1 ? kPairs<1> : kPairs<kMostPieces>);
#else
  return blocks * steps * pieces * (kTileBlock / kTileRows);
#endif
}

// c [M, N] = or += left [M, K] right [K, N], M, N and K multiples of 32; panels of c have `rows` rows.
// done(m, n, block) follows when the block of 32 x 32 from there on is complete. meanwhile() is called between products of
// tiles: where these have a unit of their own, some tens of instructions there cost no time, elsewhere a few.
template <int pieces, class Done, class Meanwhile>
void multiply_pieces(int64_t M, int64_t N, int64_t K, const Tiles& left, const Tiles& right, float* c, int64_t rows,
                     bool add, const Done& done, Meanwhile& meanwhile) {
  const int64_t steps = K / kTileStep;
  see_memory();
  for (int64_t step = 0; step < steps; step += kDepthSteps<pieces>) {
    const int64_t depth = std::min(kDepthSteps<pieces>, steps - step);
    for (int64_t n = 0; n < N; n += kTileBlock)
      for (int64_t m = 0; m < M; m += kTileBlock) {
        float* block = c + n * rows + m * kTileBlock;
        multiply_tile_block<pieces>(left.from(m / kTileSide, step), right.from(n / kTileSide, step), depth, block,
                                    add || step, meanwhile);
        if (step + depth == steps) done(m, n, block);
      }
  }
  see_memory();
}

template <class Done, class Meanwhile>
void multiply_tiles(int64_t M, int64_t N, int64_t K, const Tiles& left, const Tiles& right, float* c, int64_t rows,
                    bool add, const Done& done, Meanwhile&& meanwhile) {
  if (FM_TILES == 1 || left.pieces == 1)
    multiply_pieces<1>(M, N, K, left, right, c, rows, add, done, meanwhile);
  else
    multiply_pieces<kMostPieces>(M, N, K, left, right, c, rows, add, done, meanwhile);
}

// Units of work for each call, so that it ends with the product.
template <class Work>
int64_t pace(const Work& work, int64_t M, int64_t N, int64_t K, int64_t pieces) {
  return div_up(work.units(), std::max<int64_t>(1, calls_meanwhile(M, N, K, pieces)));
}

#endif

#if FM_TILES < 2
struct TileUnit {
  explicit TileUnit(bool) {}
};
#endif
#if FM_TILES == 0
inline int64_t calls_meanwhile(int64_t, int64_t, int64_t, int64_t) { return 0; }
#endif
