// For libraries of simulated kernels that Python loads by ctypes: functions return null, or the text of the error.
#pragma once

#include "scheduler.h"

#define CUSIM_EXPORT extern "C" __attribute__((visibility("default")))

CUSIM_EXPORT void simulator_seed(unsigned seed) { cusim::sim().seed = seed; }

CUSIM_EXPORT void simulator_truncates(bool truncates) { cusim::sim().truncates = truncates; }

template <class F>
const char* guarded(F f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}
