// Chooses the build of the sweep by the CPU's features.
#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fused_margin {
namespace {

// AMX's registers are 8 KB a thread: Linux wants to be asked by a process before it uses them.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

struct Build {
  const char* name;
  const Kernels& (*kernels)();
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#if defined(FM_HAS_AMX)
bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_amx();
}
#endif
#endif

constexpr Build kRising[] = {
    {"portable", &kernels_portable, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &kernels_avx2, &has_avx2},
    {"avx512", &kernels_avx512, &has_avx512},
    {"avx512_bf16", &kernels_avx512_bf16, &has_avx512_bf16},
#if defined(FM_HAS_AMX)
    {"amx", &kernels_amx, &has_amx},
#endif
#endif
};
constexpr int kBuilds = sizeof(kRising) / sizeof(kRising[0]);

// The best build, or the one of this name. No other is asked whether it runs here: AMX is not asked for in vain.
const CpuPath& path_named(const char* name) {
  static CpuPath paths[kBuilds];
  static std::once_flag asked[kBuilds];
  for (int i = kBuilds; i-- > 0;) {
    if (name && *name && std::strcmp(kRising[i].name, name)) continue;
    std::call_once(asked[i], [&] {
      if (kRising[i].runs_here()) paths[i] = {kRising[i].name, &kRising[i].kernels()};
    });
    if (paths[i].kernels) return paths[i];
  }
  throw std::runtime_error(std::string("FUSED_MARGIN_CPU_CAPABILITY = '") + name +
                           "' is unknown, or this CPU lacks it; expected portable, avx2, avx512, avx512_bf16 or amx");
}

std::atomic<const CpuPath*> forced{nullptr};

}  // namespace

const CpuPath& cpu_path() {
  if (const CpuPath* path = forced.load()) return *path;
  // Read once, when the library is loaded: Python changes the environment while threads compute, and what a forward keeps
  // must find the same build in the backward.
  static const CpuPath& chosen = path_named(std::getenv("FUSED_MARGIN_CPU_CAPABILITY"));
  return chosen;
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
  text = std::string(path.name) +
         ", float32: " + (path.kernels->pieces_f32 ? "products of three bfloat16 pieces" : "products in float32") +
         ", bfloat16: " + (path.kernels->pieces_bf16 ? "products of bfloat16" : "computed in float32");
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

// The work of a benchmark: products of a tile, as the sweep does them for operands of float32 or bfloat16, on the
// calling thread. Returns the floating-point operations of one.
__attribute__((visibility("default"))) int64_t fm_multiply_tiles(int64_t repeats, bool bf16) {
  const auto& kernels = *fused_margin::cpu_path().kernels;
  return kernels.multiply(bf16 ? kernels.pieces_bf16 : kernels.pieces_f32, repeats);
}
}
