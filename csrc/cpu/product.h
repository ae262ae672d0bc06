// C [M, N] = A [M, K] B [K, N], or += : our own loops, for where torch's tile products are missing or have no such type.
// Included inside the namespace of an instruction set; never on its own.

template <class T, int rows, int vectors>
FM_INLINE void product_block(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  Vec<T> sum[rows][vectors] = {};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> row[vectors];
    for (int v = 0; v < vectors; v++) row[v] = load(b + k * ldb + v * kLanes<T>);
    for (int m = 0; m < rows; m++) {
      const T factor = a[m * lda + k];
      for (int v = 0; v < vectors; v++) sum[m][v] += factor * row[v];
    }
  }
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < vectors; v++) {
      T* out = c + m * ldc + v * kLanes<T>;
      store(out, add ? load(out) + sum[m][v] : sum[m][v]);
    }
}

template <class T, int vectors>
void product_columns(int64_t M, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                     bool add) {
  constexpr int rows = FM_PRODUCT_ROWS;
  int64_t m = 0;
  for (; m + rows <= M; m += rows) product_block<T, rows, vectors>(K, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
  for (; m < M; m++) product_block<T, 1, vectors>(K, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
}

template <class T>
void product(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
             bool add) {
  constexpr int vectors = FM_PRODUCT_VECTORS;
  int64_t n = 0;
  for (; n + vectors * kLanes<T> <= N; n += vectors * kLanes<T>)
    product_columns<T, vectors>(M, K, a, lda, b + n, ldb, c + n, ldc, add);
  for (; n + kLanes<T> <= N; n += kLanes<T>) product_columns<T, 1>(M, K, a, lda, b + n, ldb, c + n, ldc, add);
  if (n == N) return;
  for (int64_t m = 0; m < M; m++) {  // the columns that do not fill a vector
    T sum[kLanes<T>] = {};
    for (int64_t k = 0; k < K; k++)
      for (int64_t j = n; j < N; j++) sum[j - n] += a[m * lda + k] * b[k * ldb + j];
    for (int64_t j = n; j < N; j++) c[m * ldc + j] = (add ? c[m * ldc + j] : T(0)) + sum[j - n];
  }
}
