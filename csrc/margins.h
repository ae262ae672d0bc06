// The target transforms T and their slopes T' for a target's cosine c, as fused_margin/margins/angular.py defines them,
// and the loss of a row: z = s T(c), loss = log(1 + exp(red - z)).
//
// Shared by host and device; T is float or double.
#pragma once

#include <cmath>

#include "codes.h"

namespace fused_margin {

// fused_margin/margins/forms.py: what a margin is, in numbers.
template <class T>
struct Form {
  TargetKind kind;
  Tail tail;
  T m1, m2, m3;
};

template <class T>
struct Transformed {
  T value, slope;
};

template <class T>
constexpr T kPi = T(3.14159265358979323846);
template <class T>
constexpr T kSineFloor = T(1e-3);  // as in fused_margin/angles.py
constexpr int kLargestPolynomial = 16;

template <class T>
FM_HOST_DEVICE T sine_of(T c) {
  const T square = (T(1) - c) * (T(1) + c);
  return std::sqrt(square > T(0) ? square : T(0));
}

template <class T>
FM_HOST_DEVICE T floored(T sine) {
  return sine > kSineFloor<T> ? sine : kSineFloor<T>;
}

// cos(m1 theta + m2), and whether that angle is beyond pi.
template <class T>
FM_HOST_DEVICE Transformed<T> turned_cosine(T c, const Form<T>& f, bool& beyond) {
  const T sine = sine_of(c);
  if (f.m1 == T(1)) {  // without an angle
    const T cos_m = std::cos(f.m2), sin_m = std::sin(f.m2);
    beyond = c < -cos_m;
    return {c * cos_m - sine * sin_m, cos_m + c / floored(sine) * sin_m};
  }
  const T angle = std::acos(c) * f.m1 + f.m2;
  beyond = angle > kPi<T>;
  return {std::cos(angle), f.m1 * std::sin(angle) / floored(sine)};
}

template <class T>
FM_HOST_DEVICE Transformed<T> angle_target(T c, const Form<T>& f) {
  bool beyond = false;
  const Transformed<T> turned = turned_cosine(c, f, beyond);
  switch (f.tail) {
    case Tail::easy:
      return c > T(0) ? turned : Transformed<T>{c, T(1)};
    case Tail::linear:
      return beyond ? Transformed<T>{c - f.m2 * std::sin(f.m2), T(1)} : turned;
    case Tail::continuous:
      return beyond ? Transformed<T>{c - std::cos((kPi<T> - f.m2) / f.m1) - T(1), T(1)} : turned;
    case Tail::clamp:
      return beyond ? Transformed<T>{T(-1), T(0)} : turned;
    default:
      return turned;
  }
}

// psi = (-1)^k cos(m theta) - 2 k, k = floor(m theta / pi); of a whole m without an angle.
template <class T>
FM_HOST_DEVICE Transformed<T> multiple_target(T c, T m) {
  T value, slope;
  int k = 0;
  if (m == std::floor(m) && m <= T(kLargestPolynomial)) {
    T before = 1, d_before = 0;
    value = c, slope = 1;
    for (int i = 1; i < int(m); i++) {
      const T next = 2 * c * value - before, d_next = 2 * value + 2 * c * slope - d_before;
      before = value, d_before = slope;
      value = next, slope = d_next;
      k += c <= std::cos(T(i) * kPi<T> / m);
    }
  } else {
    const T angle = std::acos(c) * m;
    k = int(std::floor(angle / kPi<T>));
    value = std::cos(angle);
    slope = m * std::sin(angle) / floored(sine_of(c));
  }
  const T sign = k % 2 ? T(-1) : T(1);
  return {sign * value - T(2 * k), sign * slope};
}

template <class T>
FM_HOST_DEVICE Transformed<T> target(T c, const Form<T>& f) {
  switch (f.kind) {
    case TargetKind::angle: {
      const Transformed<T> t = angle_target(c, f);
      return {t.value - f.m3, t.slope};
    }
    case TargetKind::multiple:
      return multiple_target(c, f.m1);
    default:
      return {c - f.m3, T(1)};
  }
}

// log(1 + exp(u)) and its slope, right at every u.
template <class T>
FM_HOST_DEVICE Transformed<T> softplus_of(T u) {
  const T e = std::exp(u > T(0) ? -u : u);
  const T small = e / (T(1) + e);
  return {(u > T(0) ? u : T(0)) + std::log1p(e), u > T(0) ? T(1) / (T(1) + e) : small};
}

}  // namespace fused_margin
