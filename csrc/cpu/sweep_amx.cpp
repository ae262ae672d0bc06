// The sweep built for one instruction set. AVX-512 with AMX, which multiplies tiles of bfloat16.
#include "sweep_includes.h"
#if defined(FM_HAS_AMX)

#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define FM_ISA amx
#define FM_VECTOR_BYTES 64
#define FM_PRODUCT_ROWS 12
#define FM_PRODUCT_VECTORS 2
#define FM_TILES 2
#include "sweep_build.h"
#endif
