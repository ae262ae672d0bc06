// Vectors of the compiler's own kind, so that one source serves every instruction set: FM_VECTOR_BYTES says how wide.
// Included inside the namespace of an instruction set; never on its own.

using std::size_t;

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(FM_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(FM_VECTOR_BYTES)));
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int64_t kLanes = FM_VECTOR_BYTES / sizeof(T);

#define FM_INLINE inline __attribute__((always_inline))
#define FM_UNROLL _Pragma("GCC unroll 64")

template <class T>
FM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// Stores past the cache, of whole lines of it; other threads see them after end_streams.
constexpr bool kStreams = FM_VECTOR_BYTES == 64;
#if defined(__x86_64__) && FM_VECTOR_BYTES == 64
FM_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
FM_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
FM_INLINE void end_streams() { _mm_sfence(); }
#else
template <class T>
FM_INLINE void stream(T* p, Vec<T> v) {
  store(p, v);
}
FM_INLINE void end_streams() {}
#endif
template <class T>
FM_INLINE Vec<T> splat(T a) {
  return Vec<T>{} + a;
}
template <class M, class V>
FM_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
template <class T>
FM_INLINE T lane_sum(Vec<T> v) {
  T sum = 0;
  for (int64_t l = 0; l < kLanes<T>; l++) sum += v[l];
  return sum;
}
// The lanes in double, added up to as many as a vector has.
FM_INLINE Vec<double> widened(Vec<float> v) {
  typedef float Half __attribute__((vector_size(FM_VECTOR_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  return __builtin_convertvector(halves[0], Vec<double>) + __builtin_convertvector(halves[1], Vec<double>);
}
FM_INLINE Vec<double> widened(Vec<double> v) { return v; }

// v between -1 and 1; a NaN stays one.
template <class T>
FM_INLINE Vec<T> within_one(Vec<T> v) {
#if defined(__x86_64__) && FM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // of two operands the second one is the result where one is a NaN
    const __m512 one = _mm512_set1_ps(1.f), v512 = (__m512)v;
    return (Vec<T>)_mm512_maskz_max_ps(0xffff, -one, _mm512_maskz_min_ps(0xffff, one, v512));
  }
#endif
  const Vec<T> one = splat(T(1));
  return select(v < -one, -one, select(v > one, one, v));
}

// The nearest integer, for |v| < 2^22.
FM_INLINE Vec<float> nearest(Vec<float> v) {
  const Vec<float> magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves no room for a fraction
  return v + magic - magic;
}

// exp(v): below -87 it is 0, NaN stays; relative error 1e-7. Above 88 it is some number, not to be used.
FM_INLINE Vec<float> exponential(Vec<float> v) {
  const Vec<float> low = splat(-87.f), x = select(v < low, low, v);
  const Vec<float> k = nearest(x * 1.44269504f);
  Vec<float> r = x - k * 0.693359375f;  // ln 2 in two parts
  r = r + k * 2.12194440e-4f;
  // (exp(r) - 1 - r) / r^2 on [-0.354, 0.354]: Chebyshev fit, error 3e-10
  Vec<float> p = r * 1.990162310e-4f + 1.393545454e-3f;
  p = p * r + 8.333295604e-3f;
  p = p * r + 4.166644833e-2f;
  p = p * r + 1.666666673e-1f;
  p = p * r + 5.000000015e-1f;
  p = p * r * r + r + 1.f;
  const auto integer = __builtin_convertvector(k, VecOf<float>::integer);
  const auto power = (VecOf<float>::bits)(integer + 127) << 23;
  return select(v < low, Vec<float>{}, p * (Vec<float>)power);
}
FM_INLINE Vec<double> exponential(Vec<double> v) {
  Vec<double> e;
  for (int64_t l = 0; l < kLanes<double>; l++) e[l] = std::exp(v[l]);
  return e;
}

FM_INLINE Vec<float> root(Vec<float> v) noexcept {
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
FM_INLINE Vec<double> root(Vec<double> v) noexcept {
  for (int64_t l = 0; l < kLanes<double>; l++) v[l] = std::sqrt(v[l]);
  return v;
}

// What the formulas of rules.h and update.h need.
struct Ops {
  template <class M, class V>
  static FM_INLINE V select(M mask, V a, V b) {
    return mask ? a : b;
  }
  template <class V>
  static FM_INLINE V exponential(V v) {
    return FM_ISA::exponential(v);
  }
  template <class V>
  static FM_INLINE V root(V v) noexcept {
    return FM_ISA::root(v);
  }
};

// log(1 + t) for t in [0, 1]; relative error 1e-7.
FM_INLINE Vec<float> log1p_unit(Vec<float> t) {
  // log(1 + t) / t: Chebyshev fit, error 5e-9
  const float c[] = {9.999999954e-1f,  -4.999990399e-1f, 3.333000404e-1f,  -2.495455887e-1f, 1.967811725e-1f,
                     -1.531186309e-1f, 1.061426467e-1f,  -5.706420058e-2f, 1.990716084e-2f,  -3.256378455e-3f};
  Vec<float> p = splat(c[9]);
  for (int i = 8; i >= 0; i--) p = p * t + c[i];
  return p * t;
}
FM_INLINE Vec<double> log1p_unit(Vec<double> t) {
  Vec<double> y;
  for (int64_t l = 0; l < kLanes<double>; l++) y[l] = std::log1p(t[l]);
  return y;
}

// 2^k for a whole k in [-1000, 0]; 0 where T has no such number.
template <class T>
FM_INLINE T power_of_two(T k) {
  return std::ldexp(T(1), int(k));
}

// Transposes a square of vectors in place: v[i][j] becomes v[j][i].
template <class V, int64_t step = 1, int64_t n>
FM_INLINE void transpose(V (&v)[n]) {
  if constexpr (step < n) {
    decltype(V{} == V{}) low, high;  // which lanes of (a, b) make the new a and b
    for (int64_t l = 0; l < n; l++) {
      low[l] = (l & step) ? n + (l ^ step) : l;
      high[l] = (l & step) ? n + l : (l ^ step);
    }
    for (int64_t i = 0; i < n; i++) {
      if (i & step) continue;
      const V a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + step] = __builtin_shuffle(a, b, high);
    }
    transpose<V, step * 2, n>(v);
  }
}
