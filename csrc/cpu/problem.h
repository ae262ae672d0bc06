// What a sweep works on, as raw pointers: no torch type below this line of the library.
//
//   u_ij = scale_i * N(c_ij) + bias_j for every class j but the row's target;  red_i = log sum_j exp(u_ij)
//
// T is the type of cosines and sums (float, or double for float64 tensors). Row arrays [rows] hold `padded` entries,
// zero beyond `batch`, so that a vector of rows may always be loaded.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "../codes.h"

namespace fused_margin {

enum Want { kDx = 1, kSum = 2, kStats = 4, kDscale = 8 };  // as in fused_margin/spec.py
enum Need { kX = 1, kW = 2, kScale = 4, kBias = 8 };

constexpr int64_t kRuleArgs = 2;           // at most
constexpr int64_t kRowPad = 16;            // rows are padded to a multiple of this
constexpr int64_t kRowBlock = 128;         // rows whose cosines with one class tile exist at one time
constexpr int64_t kRowGroup = 256;         // rows that one task of the forward carries through its classes
constexpr int64_t kTileRows = 128;         // rows of w that make one tile
constexpr int64_t kForwardTasks = 32;      // at most; a fixed number, so that sums do not depend on the thread count
constexpr int64_t kTilesPerTask = 4;       // at least, in the forward
constexpr int64_t kBackwardTileGroup = 4;  // tiles per task in the backward

constexpr int64_t kElsewhere = -1;  // the row's target is no class of this shard
constexpr int64_t kIgnored = -2;    // the row takes no part: its embedding counts as 0, even if it holds NaN

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

enum class Storage { f32, f64, bf16, f16 };

// The class weights as they lie in memory: any strides, optionally the rows that `index` names.
struct Weights {
  const void* data;
  Storage storage;
  int64_t row_stride, col_stride;  // in elements
  const int64_t* index;            // or null
};

template <class T>
struct Problem {
  int64_t batch, padded, dim, classes, sub_centers;
  Weights w;
  bool normalize_w, clamp, bf16;  // clamp: cosines to [-1, 1]; bf16: operands of the products
  RuleCode rule;
  bool unit_slope;
  Reduction reduction;
  int want;
  const T* x_hat;         // [padded, dim], normalised if x is
  const int64_t* target;  // [padded] class of the row here, or kElsewhere, or kIgnored
  const T *scale, *tau;   // [padded]
  const T* bias;          // [classes] or null
  const T* args;          // of the rule
};

template <class T>
struct ForwardOut {
  T* red;            // [batch]
  T* aux;            // [kAuxRows, batch], the rows of spec.Aux
  T *o_red, *o_sum;  // [batch, dim] or null
  T* partial;        // forward_workspace() elements
};

template <class T>
struct BackwardIn {
  const T *g_red, *g_cos_y, *g_sum_u;  // [padded]
  const T *red, *red_low;              // [padded], red in two parts
  const int64_t* target_row;           // [batch] the row of w that is the row's target, or -1
  const int64_t* by_target;            // [batch] row numbers in rising order of (target_row, row number)
};

template <class T>
struct BackwardOut {
  void* d_w;  // [classes * sub_centers, dim] of the storage type of w, or null
  T* d_bias;  // [classes] or null
};

// Runs task 0 .. tasks - 1, in any order and on any thread.
using Parallel = std::function<void(int64_t tasks, const std::function<void(int64_t)>& task)>;

// How the forward is cut into tasks: groups of rows x ranges of class tiles.
struct Partition {
  int64_t tile_classes, tiles, groups, splits;
};
inline Partition partition(int64_t padded, int64_t classes, int64_t sub_centers) {
  Partition p;
  p.tile_classes = kTileRows / sub_centers > 1 ? kTileRows / sub_centers : 1;
  p.tiles = div_up(classes, p.tile_classes);
  p.groups = div_up(padded, kRowGroup);
  const int64_t most = kForwardTasks / std::max<int64_t>(p.groups, 1);
  p.splits = std::max<int64_t>(1, std::min(most, div_up(p.tiles, kTilesPerTask)));
  return p;
}

// Partial sums of one row in one split: K (the power of two taken out), sum, best, count, masked sum, mean v, sum v.
constexpr int64_t kRowState = 7;
constexpr int64_t kAuxRows = 6;

// Elements of ForwardOut::partial: for each split and row, its state and its share of o_red and o_sum.
template <class T>
int64_t forward_workspace(const Problem<T>& p) {
  const Partition cut = partition(p.padded, p.classes, p.sub_centers);
  const int64_t outputs = (p.want & kDx) ? ((p.want & kSum) ? 2 : 1) : 0;
  return cut.splits * p.padded * (kRowState + outputs * p.dim);
}

// The products that torch's library computes on a tile; null where it has none, then our own loops do.
struct TileProducts {
  using F32 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*,
                       bool);
  using Bf16 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const uint16_t*, const uint16_t*,
                        float*, bool);
  using Release = void (*)(bool);
  F32 f32 = nullptr;
  Bf16 bf16 = nullptr;
  Release release = nullptr;  // gives the tile unit back; each thread that used bf16 calls it
};

// One instruction set's build of the sweep.
struct Kernels {
  void (*forward_f32)(const Problem<float>&, const ForwardOut<float>&, const TileProducts&, const Parallel&);
  void (*forward_f64)(const Problem<double>&, const ForwardOut<double>&, const TileProducts&, const Parallel&);
  void (*backward_f32)(const Problem<float>&, const BackwardIn<float>&, const BackwardOut<float>&, const TileProducts&,
                       const Parallel&);
  void (*backward_f64)(const Problem<double>&, const BackwardIn<double>&, const BackwardOut<double>&,
                       const TileProducts&, const Parallel&);
};

const Kernels& kernels_portable();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#endif

}  // namespace fused_margin
