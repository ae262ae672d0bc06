// A margin's form as fused_margin/margins/forms.py packs it, for the operators of every backend.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "margins.h"

namespace fused_margin {

inline Form<double> read_form(const torch::stable::Tensor& packed, int64_t row) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Double && packed.is_contiguous() && packed.numel() >= 5 * (row + 1),
      "fused_margin: the forms of a margin are five float64 numbers each");
  const double* f = packed.const_data_ptr<double>() + 5 * row;
  return {TargetKind(int(f[0])), Tail(int(f[1])), f[2], f[3], f[4]};
}

}  // namespace fused_margin
