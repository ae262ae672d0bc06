// The sweep built for one instruction set. AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "sweep_includes.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define FM_ISA avx512
#define FM_VECTOR_BYTES 64
#define FM_PRODUCT_ROWS 12
#define FM_PRODUCT_VECTORS 2
#define FM_TILES 0
#include "sweep_build.h"
#endif
