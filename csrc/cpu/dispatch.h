// Which build of the sweep runs on this CPU.
#pragma once

#include "problem.h"

namespace fused_margin {

struct CpuPath {
  const char* name = nullptr;  // "portable", "avx2", "avx512", "avx512_bf16", "amx"
  const Kernels* kernels = nullptr;
};

// The best path of this CPU, or the one that FUSED_MARGIN_CPU_CAPABILITY or set_capability names.
const CpuPath& cpu_path();

}  // namespace fused_margin
