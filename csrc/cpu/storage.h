// Rows of the class weights in any storage type, read as float or double, and written back.
#pragma once

#include <cstring>

#include "problem.h"

namespace fused_margin {
namespace storage {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

struct Bf16 {
  uint16_t bits;
  static float get(Bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
  static Bf16 put(float f) {  // to nearest, ties to even
    const uint32_t u = float_to_bits(f);
    return {uint16_t(f != f ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
  }
};

struct F16 {
  uint16_t bits;
  static float get(F16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float magnitude = bits_to_float(rest << 13) * bits_to_float(0x77800000);  // * 2^112, right for subnormals too
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  static F16 put(float f) {  // to nearest, ties to even; overflow gives infinity
    const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more
    if (rest < 0x38800000) {                                   // below 2^-14: the sum's last place is 2^-24
      return {uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000))};
    }
    return {uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1)) - 0x38000000) >> 13)};
  }
};

struct F32 {
  float value;
  static float get(F32 v) { return v.value; }
  static F32 put(float f) { return {f}; }
};
struct F64 {
  double value;
  static double get(F64 v) { return v.value; }
  static F64 put(double f) { return {f}; }
};

// Calls f with a value of the type that s names.
template <class F>
inline void visit(Storage s, F f) {
  switch (s) {
    case Storage::f32:
      return f(F32{});
    case Storage::f64:
      return f(F64{});
    case Storage::bf16:
      return f(Bf16{});
    case Storage::f16:
      return f(F16{});
  }
}

}  // namespace storage

inline int64_t size_of(Storage s) { return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : 2; }

inline int64_t row_number(const Weights& w, int64_t r) { return w.index ? w.index[r] : r; }

// Row r of w (of the subset, if there is one) as T.
template <class T>
inline void read_row(const Weights& w, int64_t r, int64_t dim, T* out) {
  const int64_t row = row_number(w, r);
  storage::visit(w.storage, [&](auto type) {
    using S = decltype(type);
    const S* in = static_cast<const S*>(w.data) + row * w.row_stride;
    if (w.col_stride == 1)
      for (int64_t d = 0; d < dim; d++) out[d] = T(S::get(in[d]));
    else
      for (int64_t d = 0; d < dim; d++) out[d] = T(S::get(in[d * w.col_stride]));
  });
}

// The same, where it lies if it is contiguous and of type T, else through `copy` [dim].
template <class T>
inline const T* row_of(const Weights& w, int64_t r, int64_t dim, T* copy) {
  if (w.storage == (sizeof(T) == 8 ? Storage::f64 : Storage::f32) && w.col_stride == 1)
    return static_cast<const T*>(w.data) + row_number(w, r) * w.row_stride;
  read_row(w, r, dim, copy);
  return copy;
}

template <class T>
inline void write_row(Storage s, const T* in, int64_t dim, void* base, int64_t row) {
  storage::visit(s, [&](auto type) {
    using S = decltype(type);
    S* out = static_cast<S*>(base) + row * dim;
    for (int64_t d = 0; d < dim; d++) out[d] = S::put(in[d]);
  });
}

}  // namespace fused_margin
