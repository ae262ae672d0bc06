// Matrix products on panels, the layout in which everything that is multiplied lies. A matrix [M, N] in panels is cut
// into strips of kPanel columns, each stored row by row: [N / kPanel, M, kPanel]. A strip of one operand is read as
// vectors, the other operand a number at a time; FM_PRODUCT_ROWS x kPanel sums stay in registers.
// Included inside the namespace of an instruction set; never on its own.

template <class T>
constexpr int64_t kPanel = FM_PRODUCT_VECTORS * kLanes<T>;

constexpr int64_t kProductDepth = 256;  // of a strip at one time: its part of this depth stays in the L1 cache

// Where the operand that is read a number at a time has its summed dimension.
enum class Summed {
  columns,  // a[m, k]: along the rows of the panels, in whole panels
  rows,     // a[k, m]: down one panel
};

// sum[m][v] += sum_k a(m, k) b[k, v], for `rows` rows of one strip b [K, kPanel]; `next`: from a panel of a to the next.
template <Summed summed, class T, int rows>
FM_INLINE void multiply_block(Vec<T> (&sum)[rows][FM_PRODUCT_VECTORS], int64_t K, const T* a, int64_t next,
                              const T* b) {
  constexpr int64_t P = kPanel<T>, chunk = summed == Summed::columns ? P : 1;
  constexpr int64_t row_step = summed == Summed::columns ? P : 1;
  for (int64_t k = 0; k < K; k += chunk) {
    FM_UNROLL for (int64_t c = 0; c < chunk; c++) {
      Vec<T> row[FM_PRODUCT_VECTORS];
      FM_UNROLL for (int v = 0; v < FM_PRODUCT_VECTORS; v++) row[v] = load(b + c * P + v * kLanes<T>);
      FM_UNROLL for (int m = 0; m < rows; m++) {
        const T factor = a[m * row_step + c];
        FM_UNROLL for (int v = 0; v < FM_PRODUCT_VECTORS; v++) sum[m][v] += factor * row[v];
      }
    }
    a += summed == Summed::columns ? next : P;
    b += chunk * P;
  }
}

// The product of M rows of a with one strip b. Sums start with start(m, v) and go to finish(m, v, sum).
template <Summed summed, int rows, class T, class Start, class Finish>
FM_INLINE void multiply_rows(int64_t& m, int64_t K, const T* a, int64_t next, const T* b, const Start& start,
                             const Finish& finish) {
  Vec<T> sum[rows][FM_PRODUCT_VECTORS];
  FM_UNROLL for (int r = 0; r < rows; r++) {
    FM_UNROLL for (int v = 0; v < FM_PRODUCT_VECTORS; v++) sum[r][v] = start(m + r, v);
  }
  multiply_block<summed>(sum, K, a + m * (summed == Summed::columns ? kPanel<T> : 1), next, b);
  FM_UNROLL for (int r = 0; r < rows; r++) {
    FM_UNROLL for (int v = 0; v < FM_PRODUCT_VECTORS; v++) finish(m + r, v, sum[r][v]);
  }
  m += rows;
}

template <Summed summed, class T, class Start, class Finish>
FM_INLINE void multiply_strip(int64_t M, int64_t K, const T* a, int64_t next, const T* b, const Start& start,
                              const Finish& finish) {
  constexpr int full = FM_PRODUCT_ROWS;
  int64_t m = 0;
  // Two blocks of four keep more sums in flight than a full one and two rows.
  while (M - m >= full && M - m != full + 2) multiply_rows<summed, full>(m, K, a, next, b, start, finish);
  while (M - m >= 4) multiply_rows<summed, 4>(m, K, a, next, b, start, finish);
  while (M - m > 0) multiply_rows<summed, 1>(m, K, a, next, b, start, finish);
}

// One row into its place in a matrix of `rows` rows in panels, with zeros up to a whole panel.
template <class T>
void pack_row(const T* row, int64_t dim, int64_t rows, T* out) {
  constexpr int64_t P = kPanel<T>;
  int64_t d = 0;
  for (; d + P <= dim; d += P, out += rows * P)
    FM_UNROLL for (int v = 0; v < FM_PRODUCT_VECTORS; v++) store(out + v * kLanes<T>, load(row + d + v * kLanes<T>));
  for (int64_t k = d; k < round_up(dim, P); k++) out[k - d] = k < dim ? row[k] : T(0);
}

// c [M, N] = a [M, K] b [K, N], all in panels (K a multiple of kPanel); panels of c have `rows` rows.
// meanwhile() runs before each row of a block of sums.
template <class T, class Meanwhile>
void multiply_panels(int64_t M, int64_t N, int64_t K, const T* a, const T* b, T* c, int64_t rows,
                     const Meanwhile& meanwhile) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t n = 0; n < N; n += P, b += K * P, c += rows * P)
    for (int64_t k = 0; k < K; k += kProductDepth) {
      const auto at = [&](int64_t m, int v) { return c + m * P + v * kLanes<T>; };
      multiply_strip<Summed::columns>(
          M, std::min(kProductDepth, K - k), a + k * M, M * P, b + k * P,
          [&](int64_t m, int v) {
            if (v == 0) meanwhile();
            return k ? load(at(m, v)) : Vec<T>{};
          },
          [&](int64_t m, int v, Vec<T> sum) { store(at(m, v), sum); });
    }
}
