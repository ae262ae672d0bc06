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
enum LossReduction { kMean, kTotal, kNone };               // as in fused_margin/backends/cpu.py
enum Need { kX = 1, kW = 2, kScale = 4, kBias = 8 };

constexpr int64_t kRuleArgs = 2;       // at most
constexpr int64_t kPad = 32;           // rows, and the dimension inside the sweep, are padded to a multiple of this
constexpr int64_t kRowGroup = 512;     // rows that one task of the forward carries through its classes
constexpr int64_t kForwardTasks = 32;  // at most; a fixed number, so that sums do not depend on the thread count
constexpr int64_t kTilesPerTask = 2;   // at least, in the forward

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
  bool normalize_w, clamp;  // clamp: cosines to [-1, 1]
  int64_t pieces;           // bfloat16 numbers that an operand of the products consists of (tiles.h); 0: it is a T
  RuleCode rule;
  bool unit_slope;
  Reduction reduction;
  int want;
  const T* x_hat;         // [padded, dim], normalised if x is
  const int64_t* target;  // [padded] class of the row here, or kElsewhere, or kIgnored
  const T *scale, *tau;   // [padded]
  const T* bias;          // [classes] or null
  const T* args;          // of the rule
  T* kept;                // products that the forward leaves for the backward (Kept in sweep.h), or null
  int64_t kept_rows;      // of how many rows of w, the first ones
};

template <class T>
struct ForwardOut {
  T* red;                // [batch]
  T* aux;                // [kAuxRows, batch], the rows of spec.Aux
  T *o_red, *o_sum;      // [batch, dim] or null
  T* partial = nullptr;  // forward_workspace() elements
};

template <class T>
struct BackwardIn {
  const T *g_red, *g_cos_y, *g_sum_u;  // [padded]
  const T *red, *red_low;              // [padded], red in two parts
  const int64_t* target_row;           // [batch] the row of w that is the row's target, or -1
  const int64_t* by_target;            // [batch] row numbers in rising order of (target_row, row number)
};

// One call of the sweep with what comes into its backward. Several with the same weights make one step of an optimizer.
template <class T>
struct BackwardCall {
  const Problem<T>* p;
  BackwardIn<T> in;
};

template <class T>
struct RowUpdate;  // update.h

template <class T>
struct BackwardOut {
  void* d_w;  // [classes * sub_centers, dim] of the storage type of w, or null
  T* d_bias;  // [classes] or null
};

// Runs task 0 .. tasks - 1, in any order and on any of its threads. No sum may depend on how many these are.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t tasks, const std::function<void(int64_t)>& task)> run;

  void operator()(int64_t tasks, const std::function<void(int64_t)>& task) const { run(tasks, task); }
};

// What exists at one time: a tile of rows of w, and its cosines with a block of rows of x. Both stay in a core's L2
// cache beside what streams by. The backward has no sums over classes to carry, so that its tiles may be lower and its
// blocks longer: up to 512 rows, a row of dW is finished as soon as it is summed.
struct Blocking {
  int64_t tile_rows, block;
};
struct Blockings {
  Blocking own, pieces;  // where operands are of type T, and where they are bfloat16 pieces
};
constexpr Blockings kForwardBlocking{{96, 128}, {96, 128}}, kBackwardBlocking{{48, 512}, {64, 512}};

// How a sweep is cut: tiles of classes, and in the forward groups of rows x ranges of tiles, each a task.
struct Partition {
  int64_t tile_classes, tile_rows, height, block, tiles, groups, splits;  // height: tile_rows, as they are multiplied
};
// Rows of a tile as the products take them.
template <class T>
int64_t multiplied_rows(const Problem<T>& p, int64_t rows) {
  return p.pieces ? round_up(rows, kPad) : rows;
}

template <class T>
Partition partition(const Problem<T>& p, const Blockings& blockings) {
  const Blocking& b = p.pieces ? blockings.pieces : blockings.own;
  Partition cut;
  cut.tile_classes = std::max<int64_t>(1, b.tile_rows / p.sub_centers);
  cut.tile_rows = cut.tile_classes * p.sub_centers;
  cut.height = multiplied_rows(p, cut.tile_rows);
  cut.block = b.block;
  cut.tiles = div_up(p.classes, cut.tile_classes);
  cut.groups = div_up(p.padded, kRowGroup);
  const int64_t most = kForwardTasks / std::max<int64_t>(cut.groups, 1);
  cut.splits = std::max<int64_t>(1, std::min(most, div_up(cut.tiles, kTilesPerTask)));
  return cut;
}

// Partial sums of one row in one split: K (the power of two taken out), sum, best, count, masked sum, mean v, sum v.
constexpr int64_t kRowState = 7;
constexpr int64_t kAuxRows = 6;

// Shares of O in a split: none, of o_red, or of o_red and o_sum.
template <class T>
int64_t shares_of(const Problem<T>& p) {
  return (p.want & kDx) ? ((p.want & kSum) ? 2 : 1) : 0;
}

// Elements of ForwardOut::partial: for each split and row, its state and its shares of O.
template <class T>
int64_t forward_workspace(const Problem<T>& p) {
  return partition(p, kForwardBlocking).splits * p.padded * (kRowState + shares_of(p) * round_up(p.dim, kPad));
}

// One instruction set's build of the sweep.
struct Kernels {
  void (*forward_f32)(const Problem<float>&, const ForwardOut<float>&, const Parallel&);
  void (*forward_f64)(const Problem<double>&, const ForwardOut<double>&, const Parallel&);
  void (*backward_f32)(const Problem<float>&, const BackwardIn<float>&, const BackwardOut<float>&, const Parallel&);
  void (*backward_f64)(const Problem<double>&, const BackwardIn<double>&, const BackwardOut<double>&, const Parallel&);
  void (*step_f32)(const BackwardCall<float>* calls, int64_t count, const RowUpdate<float>&, const Parallel&);
  void (*step_f64)(const BackwardCall<double>* calls, int64_t count, const RowUpdate<double>&, const Parallel&);
  void (*update_f32)(const RowUpdate<float>&, const Weights& grad, int64_t rows, int64_t dim, const Parallel&);
  void (*update_f64)(const RowUpdate<double>&, const Weights& grad, int64_t rows, int64_t dim, const Parallel&);
  int64_t (*multiply)(int64_t pieces, int64_t repeats);  // the work of a benchmark (rate.h)
  int64_t pieces_f32, pieces_bf16;                       // Problem::pieces for operands of float32 and of bfloat16
};

const Kernels& kernels_portable();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#if __has_include(<amxbf16intrin.h>)
#define FM_HAS_AMX  // of the compiler, from GCC 11 on
const Kernels& kernels_amx();
#endif
#endif

}  // namespace fused_margin
