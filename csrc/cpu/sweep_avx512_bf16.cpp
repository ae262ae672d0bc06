// The sweep built for one instruction set. AVX-512 with bfloat16 conversions and dot products.
#if defined(__x86_64__)
#include "sweep_includes.h"

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define FM_ISA avx512_bf16
#define FM_VECTOR_BYTES 64
#define FM_PRODUCT_ROWS 12
#define FM_PRODUCT_VECTORS 2
#define FM_TILES 1
#include "sweep_build.h"
#endif
