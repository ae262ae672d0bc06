// An optimizer's step on rows of the class weights and of its own state, as raw pointers. Its formulas: ../update.h.
#pragma once

#include "../hyper.h"
#include "problem.h"

namespace fused_margin {

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
