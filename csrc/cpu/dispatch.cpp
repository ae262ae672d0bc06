// Chooses the build of the sweep by the CPU's features, and looks up torch's bfloat16 products of tiles
// (at::native::cpublas::brgemm).
//
// brgemm is exported by libtorch_cpu but is not part of the stable ABI: it is looked up when first needed, tried on one
// tile against a plain loop, and left alone if it is missing, throws or is wrong. A forced path other than the best
// multiplies in float32, so that each can be tested on one machine.
#include "dispatch.h"

#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "storage.h"

namespace fused_margin {
namespace {

bool has(const char* name) {
  if (!std::strcmp(name, "portable")) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!std::strcmp(name, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512_bf16")) return &kernels_avx512_bf16();
  if (!std::strcmp(name, "avx512")) return &kernels_avx512();
  if (!std::strcmp(name, "avx2")) return &kernels_avx2();
#endif
  return &kernels_portable();
}

// Whether a product gives the right numbers: 5 x 19 = 5 x 8 times 8 x 19, added to 1.
bool works(TileProducts::Bf16 product) {
  constexpr int64_t M = 5, N = 19, K = 8;
  const auto put = [](double v) { return storage::Bf16::put(float(v)).bits; };
  const auto get = [](uint16_t v) { return double(storage::Bf16::get({v})); };
  std::vector<uint16_t> a(M * K), b(K * N);
  std::vector<float> c(M * N, 1.f);
  for (int64_t i = 0; i < M * K; i++) a[i] = put(std::sin(i));
  const auto at = [&](int64_t k, int64_t n) { return (k / 2 * N + n) * 2 + k % 2; };  // in pairs of rows
  for (int64_t k = 0; k < K; k++)
    for (int64_t n = 0; n < N; n++) b[at(k, n)] = put(std::cos(k * N + n));
  try {
    product(M, N, K, K, N, N, true, a.data(), b.data(), c.data(), true);
  } catch (...) {
    return false;
  }
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      double expected = 1;
      for (int64_t k = 0; k < K; k++) expected += get(a[m * K + k]) * get(b[at(k, n)]);
      if (!(std::fabs(expected - c[m * N + n]) < 1e-4)) return false;
    }
  return true;
}

TileProducts find_products() {
  TileProducts found;
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return found;
  const auto symbol = [&](const char* name) { return dlsym(torch, name); };
  const auto bf16 = (TileProducts::Bf16)symbol("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
  found.release = (TileProducts::Release)symbol("_ZN2at6native7cpublas14brgemm_releaseEb");
  if (!found.release) return found;
  if (bf16 && works(bf16)) found.bf16 = bf16;
  found.release(true);
  return found;
}

const CpuPath& path_named(const char* name) {
  static const char* const rising[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  static const auto make = [](const char* n, bool best) {
    return CpuPath{n, kernels(n), best ? find_products() : TileProducts{}};
  };
  static const char* const best = [] {
    const char* n = rising[0];
    for (const char* candidate : rising)
      if (has(candidate)) n = candidate;
    return n;
  }();
  static const CpuPath paths[] = {make(rising[0], best == rising[0]), make(rising[1], best == rising[1]),
                                  make(rising[2], best == rising[2]), make(rising[3], best == rising[3])};
  for (const CpuPath& path : paths)
    if (!std::strcmp(path.name, name && *name ? name : best) && has(path.name)) return path;
  throw std::runtime_error(std::string("FUSED_MARGIN_CPU_CAPABILITY = '") + name +
                           "' is unknown, or this CPU lacks it; expected portable, avx2, avx512 or avx512_bf16");
}

std::atomic<const CpuPath*> forced{nullptr};

}  // namespace

const CpuPath& cpu_path() {
  if (const CpuPath* path = forced.load()) return *path;
  return path_named(std::getenv("FUSED_MARGIN_CPU_CAPABILITY"));
}

}  // namespace fused_margin

extern "C" {

// What is wrong with FUSED_MARGIN_CPU_CAPABILITY; "" if nothing is.
__attribute__((visibility("default"))) const char* fm_cpu_error() {
  static thread_local std::string text;
  text.clear();
  try {
    fused_margin::cpu_path();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

// The path in use, for people; only where there is no error.
__attribute__((visibility("default"))) const char* fm_cpu_path() {
  static thread_local std::string text;
  const auto& path = fused_margin::cpu_path();
  text = std::string(path.name) + ", float32: own loops, bfloat16: " +
         (path.products.bf16 ? "torch's tile products (brgemm)" : "computed in float32");
  return text.c_str();
}

// Uses the path of this name from now on; "" undoes it. False if there is none on this CPU.
__attribute__((visibility("default"))) bool fm_set_capability(const char* name) {
  try {
    fused_margin::forced = *name ? &fused_margin::path_named(name) : nullptr;
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// The work of a benchmark: `repeats` products of 96 x 512 with 512 x 128 numbers in float32, on the calling thread, as
// the sweep does them. Returns the floating-point operations of one.
__attribute__((visibility("default"))) int64_t fm_multiply_tiles(int64_t repeats) {
  constexpr int64_t M = 96, N = 128, K = 512;
  const std::vector<float> a(M * K, 0.5f), b(K * N, 0.5f);
  std::vector<float> c(M * N);
  const auto multiply = fused_margin::cpu_path().kernels->multiply_f32;
  for (int64_t i = 0; i < repeats; i++) multiply(M, N, K, a.data(), b.data(), c.data());
  return 2 * M * N * K;
}
}
