// The plan of csrc/cuda/problem.h for Python.
#include "binding.h"
#include "cuda/problem.h"

using namespace fused_margin::gpu;

CUSIM_EXPORT int64_t cache_of(int64_t l2_bytes) { return cache_for_chunk(l2_bytes); }

CUSIM_EXPORT int64_t splits(int64_t tiles, int64_t blocks, int64_t programs) {
  return splits_of(tiles, blocks, programs);
}

CUSIM_EXPORT void plan_of(int64_t batch, int64_t dim, int64_t classes, int sub_centers, int operand, int64_t programs,
                          int64_t cache_bytes, int64_t* out) {
  const Plan p = plan(batch, dim, classes, sub_centers, Storage(operand), programs, cache_bytes);
  const int64_t found[] = {p.padded, p.operand_row, p.blocks, p.tile_classes, p.tiles, p.splits, p.chunk};
  std::copy(std::begin(found), std::end(found), out);
}
