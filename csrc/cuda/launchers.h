// The launches of the CUDA backend: what each is given, as raw device pointers, and on which stream it goes. No torch.
#pragma once

#include "../margins.h"
#include "../update.h"
#include "arch.cuh"
#include "problem.h"

namespace fused_margin {
namespace gpu {

// Before the sweep: cos_y [batch] (or null), and unless `p.padded` is 0 what the sweep reads of x (Problem's last part).
struct Prologue {
  Problem p;
  float* cos_y;
  bool has_threshold;
  Form<double> threshold;  // tau is this transform of the target's cosine
};

// The forward: each block of rows through `splits` parts of the tiles.
struct Forward {
  Problem p;
  int64_t tiles, splits;
  float* state;  // [padded, kPartsOfSplit * splits, kStates]
};

// After it: the parts merged in their order.
struct Merge {
  Problem p;
  const float* state;
  int64_t parts;
  float *red, *sum_u, *aux;  // [batch], [batch], [kAuxRows, batch]
};

// Losses [batch] and spec.Rows [6, batch] of a built-in margin.
struct Loss {
  Problem p;
  Form<double> form;
  LossReduction reduction;
  const float *cos_y, *red, *red_low, *tau;
  float *losses, *rows;
  float* reduced;  // one number, unless `reduction` is kNone
};

// Before the backward's sweep: G_ij = f_i (p_i A_ij + q_i) N'_ij with |p|, |q| <= 1; `scaled` gets f_i x_hat_i.
struct BackwardRows {
  Problem p;
  Vector g_red, g_sum, red, red_low;
  const float* aux;     // [kAuxRows, batch]
  void* scaled;         // [padded, operand_row] of the operands' type
  float* coefficients;  // [kCoefficients, padded] power, rest, p, q, f, f / s, s g_red
  float* unit;          // what f was divided by, one number
  float* inverse_x;     // [padded]
  int* target_row;      // [padded] among the rows read, or -1
  int* order;           // [batch] rows in the order of their targets' classes
  int* sorted_class;    // [batch]
  Vector d_scale;       // or null
};

// G of the tiles [first_tile, first_tile + tiles).
struct Gradient {
  Problem p;
  const float* coefficients;
  int64_t first_tile, tiles, splits;
  void* gradient;  // [batch, columns] of the operands' type, or null
  int64_t columns;
  float* bias_parts;  // [kBiasParts * blocks, tiles * kSlots], or null
};
constexpr int kBiasParts = 4;

// Rows [first_row, first_row + rows) of those read, normalised, for the product with G that gives dX.
struct UnitWeights {
  Problem p;
  int64_t first_row, rows;
  void* w_hat;  // [rows, dim] of the operands' type
};

// The gradients of these rows: what the product with G left in `products` (which is used up), and the targets' share.
struct FinishWeights {
  Problem p;
  int64_t first_row, rows;
  float* products;  // [rows, dim]; may be d_w
  const float *unit, *inverse_x;
  const int *order, *sorted_class, *target_row;
  Vector g_cos_y;
  const float* earlier;  // [rows, dim] gradients of other calls, which are added; or null. It may be d_w
  Matrix d_w;            // its first of these rows
};

// An optimizer's step on rows of w and of its state; with `index`, row r is row index[r] of both.
struct Update {
  Matrix w;
  const int64_t* index;  // rising: a row that came twice would have two writers
  float *m, *v;          // [rows of w, dim] or null
  float* step;           // [rows of w / together] or null; updates read counts that have this step in them
  int64_t together;      // rows, one after the other, that have their steps in common: a class's sub-centres
  Optimizer optimizer;
  SgdNumbers<float> sgd;  // of a row that has had a step before
  AdamwNumbers<float> adamw;
  float lr, log_beta1, log_beta2;
};

// One more step for the counts of these rows.
struct CountSteps {
  Update update;
  int64_t rows;
};

// The gradients in memory, row r of `grad` being that of row r.
struct UpdateRows {
  Update update;
  int64_t rows, dim;
  Matrix grad;
};

// The gradients are finished, and used up at once; `finish.d_w` is not read.
struct UpdateWeights {
  FinishWeights finish;
  Update update;
};

struct FinishBias {
  Problem p;
  int64_t first_class, classes, parts, slots;
  const float* bias_parts;
  Vector d_bias;
};

// dX = (h - (h . x_hat) x_hat) / |x|,  h = f O + g_cos_y w_hat_y.
struct FinishX {
  Problem p;
  const float *o, *factors;  // [batch, dim] sum_j G_ij w_hat_j without f, f [batch]
  Vector g_cos_y;
  const int* target_row;
  Matrix d_x;
};

// sum += part
struct Add {
  float* sum;
  const float* part;
  int64_t count;
};

cudaError_t run(const Prologue&, cudaStream_t);
cudaError_t run(const Merge&, cudaStream_t);
cudaError_t run(const Loss&, cudaStream_t);
cudaError_t run(const BackwardRows&, cudaStream_t);
cudaError_t run(const UnitWeights&, cudaStream_t);
cudaError_t run(const FinishWeights&, cudaStream_t);
cudaError_t run(const CountSteps&, cudaStream_t);
cudaError_t run(const UpdateRows&, cudaStream_t);
cudaError_t run(const UpdateWeights&, cudaStream_t);
cudaError_t run(const FinishBias&, cudaStream_t);
cudaError_t run(const FinishX&, cudaStream_t);
cudaError_t run(const Add&, cudaStream_t);
cudaError_t run(const Forward&, cudaStream_t);
cudaError_t run(const Gradient&, cudaStream_t);

// One build of the sweeps for each type of operands, in a file of its own.
template <class T>
cudaError_t run_forward(const Forward&, cudaStream_t);
template <class T>
cudaError_t run_gradient(const Gradient&, cudaStream_t);

}  // namespace gpu
}  // namespace fused_margin
