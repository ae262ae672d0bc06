// Fibers: threads of a block as contexts of one OS thread, and what the sanitizers must be told of a switch.
//
// A switch is a few instructions of assembly on x86-64; -DCUSIM_UCONTEXT takes the portable one, ten times slower.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) && !defined(CUSIM_UCONTEXT)
#define CUSIM_UCONTEXT 1
#endif
#ifdef CUSIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cusim {

// Frames are larger under a sanitizer.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Context {
#ifdef CUSIM_UCONTEXT
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // of a fiber; null for the scheduler, which has the OS thread's
  size_t stack_bytes = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Hooks are inlined by force: ThreadSanitizer keeps a call stack per fiber.
#define CUSIM_HOOK inline __attribute__((always_inline)) void

#ifdef __SANITIZE_THREAD__
CUSIM_HOOK happens_after(void* key) { __tsan_acquire(key); }
CUSIM_HOOK happens_before(void* key) { __tsan_release(key); }
CUSIM_HOOK note_read(const void* p, size_t n) { __tsan_read_range(const_cast<void*>(p), n); }
CUSIM_HOOK note_write(void* p, size_t n) { __tsan_write_range(p, n); }
struct Quiet {  // the simulator's own accesses are not the kernel's
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
CUSIM_HOOK happens_after(void*) {}
CUSIM_HOOK happens_before(void*) {}
CUSIM_HOOK note_read(const void*, size_t) {}
CUSIM_HOOK note_write(void*, size_t) {}
struct Quiet {
  Quiet() {}
};
#endif

#ifndef CUSIM_UCONTEXT
extern "C" void cusim_switch(void** save, void* load);
asm(R"(.text
.globl cusim_switch
.weak cusim_switch
.hidden cusim_switch
.type cusim_switch, @function
cusim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cusim_switch, .-cusim_switch
)");
#endif

// Leaves `from` for `to`; returns when somebody switches back.
CUSIM_HOOK switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_THREAD__
  if (!from.stack) from.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef CUSIM_UCONTEXT
  swapcontext(&from.machine, &to.machine);
#else
  cusim_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fiber does: where it came from is known to AddressSanitizer only now.
CUSIM_HOOK entered([[maybe_unused]] Context& scheduler) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &scheduler.stack_bytes);
  scheduler.stack = static_cast<char*>(const_cast<void*>(bottom));
#endif
}

// Gives the context a stack on which it starts in `entry`, which must not return.
inline void prepare(Context& c, void (*entry)()) {
  c.stack = static_cast<char*>(aligned_alloc(64, kStackBytes));
  c.stack_bytes = kStackBytes;
#ifdef CUSIM_UCONTEXT
  getcontext(&c.machine);
  c.machine.uc_stack.ss_sp = c.stack;
  c.machine.uc_stack.ss_size = kStackBytes;
  c.machine.uc_link = nullptr;
  makecontext(&c.machine, entry, 0);
#else
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(c.stack + kStackBytes) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that cusim_switch pops
  c.stack_pointer = top;
#endif
#ifdef __SANITIZE_THREAD__
  c.tsan = __tsan_create_fiber(0);
#endif
}

}  // namespace cusim
