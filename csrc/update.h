// An optimizer's step on numbers of a row of weights and of its state, as fused_margin/update_rules.py defines it.
//
//   sgd    g += decay w    m = momentum m + (1 - dampening) g    w -= lr (nesterov ? g + momentum m : m)
//   adamw  w -= lr decay w    m += (1 - beta1) (g - m)    v = beta2 v + (1 - beta2) g^2
//          w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)        t: the steps that the row has seen
//
// Shared by host and device: V is a scalar or a vector type of T, Ops has `root(v)` for it. On the CPU, include it after
// the instruction set is chosen. noexcept: what might throw splits a loop's body, and g++ contracts to fma within parts.
#pragma once

#include "codes.h"
#include "hyper.h"

namespace fused_margin {

template <class T>
struct SgdNumbers {
  T lr, decay, momentum, own;  // own: of the gradient in the momentum
  bool nesterov;
};

// `first`: the step is the first one that the row sees, and nothing is dampened.
template <class T>
FM_HOST_DEVICE SgdNumbers<T> sgd_numbers(const Hyper& h, bool first) {
  return {T(h.lr), T(h.weight_decay), T(h.momentum), first ? T(1) : T(1 - h.dampening), h.nesterov};
}

template <class V, class T>
FM_HOST_DEVICE void update_sgd(const SgdNumbers<T>& n, bool has_mean, V grad, V& w, V& mean) noexcept {
  grad += n.decay * w;
  if (has_mean) {
    mean = n.momentum * mean + n.own * grad;
    grad = n.nesterov ? grad + n.momentum * mean : mean;
  }
  w -= n.lr * grad;
}

template <class T>
struct AdamwNumbers {
  T keep, own1, beta2, own2, eps;
};

template <class T>
FM_HOST_DEVICE AdamwNumbers<T> adamw_numbers(const Hyper& h) {
  return {T(1 - h.lr * h.weight_decay), T(1 - h.beta1), T(h.beta2), T(1 - h.beta2), T(h.eps)};
}

// What depends on a row's number of steps alone.
template <class T>
struct Correction {
  T size, root_scale;  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};

template <class Ops, class V, class T>
FM_HOST_DEVICE void update_adamw(const AdamwNumbers<T>& n, const Correction<T>& c, V grad, V& w, V& mean,
                                 V& square) noexcept {
  w *= n.keep;
  mean += n.own1 * (grad - mean);
  square = n.beta2 * square + n.own2 * grad * grad;
  w -= c.size * mean / (Ops::root(square) * c.root_scale + n.eps);
}

}  // namespace fused_margin
