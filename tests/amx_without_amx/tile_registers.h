// AMX's tile registers in software, so that the AMX build of the sweep runs on a CPU that has AVX-512 and bfloat16 only.
//
// Included before everything else (-include), it takes the place of the compiler's intrinsics and says that the CPU and
// the system have AMX. The numbers are those that Intel's manual defines for TDPBF16PS: even and odd products are summed
// apart, in float32, with subnormal numbers as zero. What would be a fault of the hardware ends the process.
#pragma once

#if defined(__x86_64__) && defined(__cplusplus)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace emulated_amx {

struct Unit {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config config{};
  alignas(64) unsigned char tile[8][16][64] = {};

  static Unit& here() {
    static thread_local Unit unit;
    return unit;
  }

  // Ends the process unless the register is configured, as the products take it: 16 rows of 64 bytes.
  void check(int number) const {
    if (config.palette == 1 && config.bytes[number] == 64 && config.rows[number] == 16) return;
    std::fprintf(stderr, "emulated AMX: tile register %d is used without its configuration\n", number);
    std::abort();
  }
};

inline void load_config(const void* from) {
  Unit& unit = Unit::here();
  std::memcpy(&unit.config, from, sizeof unit.config);
  std::memset(unit.tile, 0, sizeof unit.tile);  // as the instruction does
}
inline void store_config(void* to) { std::memcpy(to, &Unit::here().config, sizeof(Unit::Config)); }

inline void zero(int number) {
  Unit::here().check(number);
  std::memset(Unit::here().tile[number], 0, sizeof Unit::here().tile[number]);
}
inline void load(int number, const void* from, int64_t stride) {
  Unit::here().check(number);
  for (int64_t row = 0; row < 16; row++)
    std::memcpy(Unit::here().tile[number][row], static_cast<const char*>(from) + row * stride, 64);
}
inline void store(int number, void* to, int64_t stride) {
  Unit::here().check(number);
  for (int64_t row = 0; row < 16; row++)
    std::memcpy(static_cast<char*>(to) + row * stride, Unit::here().tile[number][row], 64);
}

// sum += left [16, 32] times right, whose rows are pairs: [16, 16, 2].
__attribute__((target("avx512f"))) inline void multiply(int sum, int left, int right) {
  Unit& unit = Unit::here();
  for (const int number : {sum, left, right}) unit.check(number);
  const unsigned int before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);  // to the nearest; subnormal numbers are zero
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  for (int row = 0; row < 16; row++) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int pair = 0; pair < 16; pair++) {
      int32_t both;
      std::memcpy(&both, unit.tile[left][row] + 4 * pair, sizeof both);
      const __m512i factors = _mm512_set1_epi32(both), line = _mm512_load_si512(unit.tile[right][pair]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(factors, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(line, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(factors, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(line, high)), odd);
    }
    float* to = reinterpret_cast<float*>(unit.tile[sum][row]);
    _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
  }
  _mm_setcsr(before);
}

// The system's answer to a request for AMX.
inline long granted(long, int, int) { return 0; }

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated_amx::load_config(from)
#define _tile_storeconfig(to) emulated_amx::store_config(to)
#define _tile_zero(number) emulated_amx::zero(number)
#define _tile_loadd(number, from, stride) emulated_amx::load(number, from, stride)
#define _tile_stored(number, to, stride) emulated_amx::store(number, to, stride)
#define _tile_dpbf16ps(sum, left, right) emulated_amx::multiply(sum, left, right)

// What csrc/cpu/dispatch.cpp asks.
#define __builtin_cpu_supports(feature) (std::strncmp(feature, "amx", 3) == 0 || __builtin_cpu_supports(feature))
#define syscall emulated_amx::granted
#endif
