// What the CUDA kernels work on, as raw device pointers, and how a sweep is cut: plain C++, for the host as well.
//
//   u_ij = scale_i N(c_ij) + bias_j for every class j but the row's target;  red_i = log sum_j exp(u_ij)
//
// A tile is kRows rows of x by kSlots slots, a slot being one row of w: class x sub-centre, where a class takes `group`
// slots, the power of two that holds its sub-centres.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../codes.h"

namespace fused_margin {
namespace gpu {

enum Want { kDx = 1, kSum = 2, kStats = 4, kDscale = 8 };  // as in fused_margin/spec.py
enum LossReduction { kMean, kTotal, kNone };               // as in fused_margin/backends/cuda.py
enum Need { kX = 1, kW = 2, kScale = 4, kBias = 8 };
enum class Storage { f32, bf16, f16 };

constexpr int kRows = 128, kSlots = 128, kThreads = 256;
constexpr int kSliceBytes = 64;  // of a row of operands, at a time
constexpr int kStates =
    9;  // of a row in a part: K, sum, its compensation, best, count, masked, mean v, sum v, sum bias
constexpr int kPartsOfSplit = 2;  // a row of a tile is split between two warps
constexpr int kAuxRows = 6;       // of spec.Aux
constexpr int kCoefficients = 7;
constexpr int64_t kMostChunkRows = 131072, kLeastChunkRows = 4096;
constexpr int64_t kMostWaves = 8;
constexpr int kMostSubCenters = 16;
constexpr float kNoPower = -1e30f;  // K of a row that has seen no rival
constexpr float kHalfUnit = 1024;   // fp16 tiles of A N' hold this multiple: A ~ 1 / C would be subnormal
constexpr float kEps = 1e-12f;      // norms are clamped from below, as in torch.nn.functional.normalize
constexpr float kLog2e = 1.4426950408889634f;

inline int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return div_up(n, to) * to; }
inline int size_of(Storage s) { return s == Storage::f32 ? 4 : 2; }

// A matrix as it lies in memory; steps in elements.
struct Matrix {
  const void* data;
  Storage storage;
  int64_t row, col;
};
struct Vector {
  const void* data;  // or null
  Storage storage;
  int64_t step;
};

struct Problem {
  int64_t batch, dim, classes;
  int sub_centers, group;
  Storage operand;
  Matrix x, w;
  const int64_t* index;  // rows of w that are read, or null
  const int64_t* labels;
  int64_t label_step;
  Vector scale, tau, bias;
  const float* args;  // of the rule
  RuleCode rule;
  Reduction reduction;
  bool unit_slope, normalize_x, normalize_w;
  int64_t first_class, ignore_index;
  int want;
  // Made by the prologue:
  int64_t padded;       // rows, a whole number of tiles
  int64_t operand_row;  // elements of a row of x_hat, a whole number of slices
  void* x_hat;          // [padded, operand_row] of the operands' type
  int* target;          // [padded] the class here, or -1
  float* constants;     // [4, padded] scale * log2(e) in two parts, tau, scale
};

// How a sweep is cut. A function of shapes and of the number of multiprocessors only, never of values.
struct Plan {
  int64_t programs;                     // at one time
  int64_t padded, operand_row, blocks;  // blocks of rows of x
  int tile_classes;
  int64_t tiles;   // of classes
  int64_t splits;  // of the tiles, in the forward
  int64_t chunk;   // classes of the backward at a time, whole tiles
};

// What tests may change; 0 is as shipped.
struct Cut {
  int64_t programs = 0, chunk_classes = 0;
};

inline int group_of(int sub_centers) {
  int group = 1;
  while (group < sub_centers) group *= 2;
  return group;
}

// When the last program of a sweep ends, in quarters of a tile: `programs` run at one time, which makes waves, and each
// has as many tiles as the longest part. To begin is taken to cost a quarter.
inline int64_t time_of(int64_t tiles, int64_t splits, int64_t blocks, int64_t programs) {
  return div_up(blocks * splits, programs) * (4 * div_up(tiles, splits) + 1);
}

// f(splits) for what fills 1, 2, ... waves, as far as there are tiles: one wave leaves multiprocessors idle where blocks
// do not divide them.
template <class F>
void each_full_wave(int64_t tiles, int64_t blocks, int64_t programs, const F& f) {
  const int64_t fewest = div_up(blocks, programs);
  for (int64_t waves = fewest; waves < fewest + kMostWaves; waves++)
    f(std::max<int64_t>(1, std::min(tiles, waves * programs / blocks)));
}

// Parts of the tiles [0, tiles) for each block of rows, so that the sweep ends soonest; no more than their longest needs.
inline int64_t splits_of(int64_t tiles, int64_t blocks, int64_t programs) {
  int64_t best = 1, least = time_of(tiles, 1, blocks, programs);
  each_full_wave(tiles, blocks, programs, [&](int64_t most) {
    const int64_t splits = div_up(std::max<int64_t>(tiles, 1), std::max<int64_t>(div_up(tiles, most), 1));
    const int64_t time = time_of(tiles, splits, blocks, programs);
    if (time < least) best = splits, least = time;
  });
  return best;
}

// Tiles of a chunk, at most so many, that are done quickest for their number: parts of one length that fill waves.
inline int64_t chunk_tiles(int64_t most, int64_t blocks, int64_t programs) {
  int64_t best = 1, least = time_of(1, 1, blocks, programs);
  each_full_wave(most, blocks, programs, [&](int64_t splits) {
    const int64_t tiles = most / splits * splits, time = time_of(tiles, splits, blocks, programs);
    if (time * best < least * tiles) best = tiles, least = time;
  });
  return best;
}

// Of G, beside the rows of w that stream through an L2 cache of this size.
inline int64_t cache_for_chunk(int64_t l2_bytes) { return std::min<int64_t>(l2_bytes / 3, 32 << 20); }

inline Plan plan(int64_t batch, int64_t dim, int64_t classes, int sub_centers, Storage operand, int64_t programs,
                 int64_t cache_bytes, const Cut& cut = {}) {
  Plan p;
  p.blocks = std::max<int64_t>(div_up(batch, kRows), 1);
  p.padded = p.blocks * kRows;
  p.operand_row = round_up(std::max<int64_t>(dim, 1), kSliceBytes / size_of(operand));
  p.tile_classes = kSlots / group_of(sub_centers);
  p.tiles = div_up(classes, p.tile_classes);
  p.programs = cut.programs ? cut.programs : programs;
  p.splits = splits_of(p.tiles, p.blocks, p.programs);
  const int64_t classes_of_rows = std::max<int64_t>(kMostChunkRows / sub_centers, p.tile_classes);
  const int64_t one_wave = div_up(p.programs, p.blocks) * p.tile_classes;
  const int64_t least = std::min(std::max(kLeastChunkRows / sub_centers, one_wave), classes_of_rows);
  const int64_t fits = cache_bytes / std::max<int64_t>(batch * size_of(operand) * sub_centers, 1);
  const int64_t most = cut.chunk_classes ? cut.chunk_classes : std::clamp(fits, least, classes_of_rows);
  const int64_t tiles = std::min(div_up(most, p.tile_classes), std::max<int64_t>(p.tiles, 1));
  const bool whole = cut.chunk_classes || tiles == p.tiles;
  p.chunk = (whole ? tiles : chunk_tiles(tiles, p.blocks, p.programs)) * p.tile_classes;
  return p;
}

}  // namespace gpu
}  // namespace fused_margin
