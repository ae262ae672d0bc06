// Included before an operator layer: the tensors that it makes by torch::stable::new_empty are poisoned, and noted until
// forget_allocations(), so that an emulator knows what a kernel may touch. Where launches are only looked at, numbers
// are not needed, and neither poison nor products made.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

namespace cusim {

inline std::vector<torch::stable::Tensor>& allocations() {
  static auto& made = *new std::vector<torch::stable::Tensor>;
  return made;
}

inline bool& computes() {
  static bool does = true;
  return does;
}

}  // namespace cusim

namespace torch::stable {

inline Tensor noted_new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                              std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  Tensor made = new_empty(like, size, type);
  if (cusim::computes() && made.numel())
    memset(made.mutable_data_ptr(), 0xFF, size_t(made.numel()) * made.element_size());
  cusim::allocations().push_back(made);
  return made;
}

inline Tensor noted_new_zeros(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                              std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  Tensor made = new_zeros(like, size, type);
  cusim::allocations().push_back(made);
  return made;
}

}  // namespace torch::stable

#define new_empty noted_new_empty
#define new_zeros noted_new_zeros
