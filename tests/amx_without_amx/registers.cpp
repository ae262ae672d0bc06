// Is tile_registers.h what Intel's manual says of TDPBF16PS? Ends with 0 if so; `unconfigured` uses a register that has no
// shape, and must not come back.
#include <cmath>
#include <cstring>
#include <random>

#include "tile_registers.h"

namespace {

float widen(uint16_t number) {
  const uint32_t bits = uint32_t(number) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

// The definition, a number at a time.
float defined(const uint16_t (&left)[16][32], const uint16_t (&right)[16][32], float sum, int row, int column) {
  float even = 0, odd = 0;
  for (int k = 0; k < 16; k++) {
    even = std::fma(widen(left[row][2 * k]), widen(right[k][2 * column]), even);
    odd = std::fma(widen(left[row][2 * k + 1]), widen(right[k][2 * column + 1]), odd);
  }
  return sum + (even + odd);
}

}  // namespace

int main(int count, char**) {
  if (count > 1) _tile_zero(0);  // ends the process
  emulated_amx::Unit::Config shape{1, 0, {}, {64, 64, 64}, {16, 16, 16}};
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  uint16_t left[16][32], right[16][32];
  float sums[16][16], got[16][16];
  const auto draw = [&](float scale) {
    const float value = scale * normal(random);
    uint16_t high;
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + 2, sizeof high);
    return high;
  };
  for (auto& row : left)
    for (uint16_t& number : row) number = draw(1);
  for (auto& row : right)
    for (uint16_t& number : row) number = draw(0x1p110f);
  for (uint16_t& number : left[0]) number &= 0x807f;  // subnormal: in the products, it would show
  for (auto& row : sums)
    for (float& sum : row) sum = normal(random);

  _tile_loadconfig(&shape);
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, left, 64);
  _tile_loadd(2, right, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, got, 64);
  int wrong = 0;
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 16; column++)
      wrong += got[row][column] != defined(left, right, sums[row][column], row, column);
  std::printf("%d of 256 sums differ from the definition\n", wrong);
  return wrong != 0;
}
