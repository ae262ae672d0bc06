// An optimizer's step on rows of the class weights and of its own state, as raw pointers.
//
//   sgd    g += decay w    m = momentum m + (1 - dampening) g    w -= lr (nesterov ? g + momentum m : m)
//   adamw  w -= lr decay w    m += (1 - beta1) (g - m)    v = beta2 v + (1 - beta2) g^2
//          w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)        t: the steps that the row has seen
#pragma once

#include "problem.h"

namespace fused_margin {

enum class Optimizer { sgd, adamw };  // as in fused_margin/updates.py

struct Hyper {
  Optimizer optimizer;
  double lr, weight_decay, momentum, dampening;
  bool nesterov;
  double beta1, beta2, eps;
};

// T is the type of the state and of the arithmetic; 16-bit weights are rounded to nearest, ties to even.
template <class T>
struct RowUpdate {
  Hyper h;
  Weights w;         // with `index`, row r here is row index[r] of w and of the state
  void* out;         // where w lies, to write
  T *m, *v;          // [rows of w, dim] or null
  float* step;       // [rows of w / together] or null
  int64_t together;  // rows, one after the other, that have their steps in common: a class's sub-centres
};

}  // namespace fused_margin
