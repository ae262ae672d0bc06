// bfloat16 and half as CUDA names them: storage, conversions to nearest even. Arithmetic goes by way of float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cusim {

inline uint16_t bf16_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float bf16_value(uint16_t bits) {
  const uint32_t u = uint32_t(bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// A half is a whole number of steps; a step is 2^-10 of the power of two below it, at least 2^-24.
inline uint16_t half_bits(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (f != f) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return sign | uint16_t(((exponent + 14) << 10) + steps);
}
inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                    : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -size : size;
}

// What a tensor core sees of a float register.
inline float tf32_value(uint32_t bits) {
  bits &= 0xffffe000;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

}  // namespace cusim

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) : bits(cusim::bf16_bits(f)) {}
  operator float() const { return cusim::bf16_value(bits); }
};
struct __half {
  uint16_t bits;
  __half() = default;
  __half(float f) : bits(cusim::half_bits(f)) {}
  operator float() const { return cusim::half_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __half __float2half_rn(float f) { return f; }
inline __half __float2half(float f) { return f; }
inline float __half2float(__half v) { return v; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
