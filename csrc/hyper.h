// What an optimizer's step is told, as fused_margin/update_rules.py has it in its Update. The formulas: update.h.
#pragma once

namespace fused_margin {

enum class Optimizer { sgd, adamw };  // the order is that of OPTIMIZERS in fused_margin/update_rules.py

struct Hyper {
  Optimizer optimizer;
  double lr, weight_decay, momentum, dampening;
  bool nesterov;
  double beta1, beta2, eps;
};

}  // namespace fused_margin
