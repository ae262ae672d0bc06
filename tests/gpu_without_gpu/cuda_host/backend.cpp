// What the tests ask of the backend's library beside its operators: schedules, launches, allocations.
#include "allocations.h"
#include "binding.h"

CUSIM_EXPORT void simulator_hook(cusim::Hook hook) { cusim::sim().hook = hook; }

CUSIM_EXPORT void simulator_computes(int does) { cusim::computes() = does != 0; }

CUSIM_EXPORT void forget_allocations() { cusim::allocations().clear(); }

CUSIM_EXPORT int64_t count_allocations() { return int64_t(cusim::allocations().size()); }

CUSIM_EXPORT const void* allocation(int64_t number, int64_t* bytes) {
  const torch::stable::Tensor& t = cusim::allocations()[number];
  *bytes = t.numel() * int64_t(t.element_size());
  return t.const_data_ptr();
}
