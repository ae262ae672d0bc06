// The sweep built for one instruction set. AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "sweep_includes.h"

#pragma GCC target("avx2,fma,f16c,bmi2")
#define FM_ISA avx2
#define FM_VECTOR_BYTES 32
#define FM_PRODUCT_ROWS 6
#define FM_PRODUCT_VECTORS 2
#define FM_TILES 0
#include "sweep_build.h"
#endif
