// The sweep built for one instruction set. Portable: 16-byte vectors, which every 64-bit CPU has.
#include "sweep_includes.h"
#define FM_ISA portable
#define FM_VECTOR_BYTES 16
#define FM_PRODUCT_ROWS 4
#define FM_PRODUCT_VECTORS 2
#define FM_TILES 0
#include "sweep_build.h"
