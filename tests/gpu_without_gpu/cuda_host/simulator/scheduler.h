// Runs a CUDA C++ kernel on the host: every thread a fiber of one OS thread, the blocks one after another.
//
// sim().seed decides which warp runs next: 0 the lowest that can, 1 the highest, odd: by a random order kept for the
// block, even: by a new one at every step; so a missing barrier gives wrong or seed-dependent results. Divergent
// barriers, deadlocks, bad masks, bad launches and what is written beside shared memory throw cusim::Error.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace cusim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State : uint8_t { ready, at_barrier, in_warp, done };

// What the lanes of a warp bring to a warp function, and where its results go; null beyond the mask.
struct Arrived {
  unsigned mask = 0;
  const void* in[32] = {};
  void* out[32] = {};
};
using Combine = void (*)(const Arrived&);

struct Copy {  // an asynchronous copy that is under way; source null: zeros
  void* target;
  const void* source;
  int bytes;
};

struct Fiber {
  Context context;
  dim3 tid;
  int number = 0;  // in the block
  State state = State::done;
  unsigned mask = 0;      // what it waits for: lanes,
  const char* what = "";  // function
  int line = 0;           // and source line
  bool vote = false;      // what it says at a barrier
  Combine combine = nullptr;
  const void* in = nullptr;
  void* out = nullptr;
  std::vector<Copy> copies;    // in the order of issue
  std::vector<size_t> groups;  // committed: how many of the copies each group takes
};

constexpr int kWarp = 32, kMostThreads = 1024;
// Fibers are kept for later blocks, as ThreadSanitizer needs a millisecond to make one. To it, a fiber has seen whatever
// happened before its last barrier in an earlier block; so neighbouring blocks never share one.
constexpr int kPools = 4;
constexpr size_t kMostShared = 227 * 1024, kSharedAlignment = 128, kGuard = 1024;
constexpr unsigned char kPoison = 0xFF;  // a NaN of every format, -1

// Takes a launch in the place of the simulator: 0 if it went well. The kernel by its address, its one argument by bytes.
using Hook = int (*)(const void* kernel, const unsigned* grid, int threads, size_t shared_bytes, const void* argument,
                     size_t argument_bytes);

struct Simulator {
  unsigned seed = 0;
  bool truncates = false;  // sums of tensor cores, see simulated_arch.h
  Hook hook = nullptr;
  std::mt19937 random;
  dim3 grid, block, index;  // index: of the running block
  std::function<void()> body;
  struct Pool {
    std::vector<Fiber*> fibers;                 // never freed: an error leaves some in the middle of a kernel
    char barrier, warps[kMostThreads / kWarp];  // what a sanitizer knows the block's barrier and its warps by
  } pools[kPools];
  Pool* pool = nullptr;
  std::vector<Fiber*> fibers;  // of the running block
  Fiber* current = nullptr;
  int alive = 0;
  bool any_vote = false;
  unsigned char* shared = nullptr;
  Context scheduler;
  std::exception_ptr error;
};
inline Simulator& sim() {
  static Simulator& s = *new Simulator;  // never destroyed: ThreadSanitizer would watch that
  return s;
}

// Fibers

inline void run_thread() {
  Simulator& s = sim();
  happens_after(&s.body);
  try {
    s.body();
    if (!s.current->copies.empty()) throw Error("cusim: a thread ends with asynchronous copies that nobody waited for");
  } catch (...) {
    s.error = std::current_exception();
  }
  happens_before(&s.fibers);
  Quiet quiet;
  s.current->state = State::done;
  s.alive--;
}

inline void body_of_fiber() {
  Simulator& s = sim();
  entered(s.scheduler);
  for (;;) {
    run_thread();
    switch_context(s.current->context, s.scheduler);
  }
}

inline void resume(Fiber& f) {
  Simulator& s = sim();
  s.current = &f;
  switch_context(s.scheduler, f.context);
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

// The running thread waits: at a barrier, or for the other lanes of its mask.
inline void wait(State state, unsigned mask, const char* what, int line) {
  Quiet quiet;
  Simulator& s = sim();
  Fiber& f = *s.current;
  f.mask = mask;
  f.what = what;
  f.line = line;
  f.state = state;
  void* key = state == State::at_barrier ? &s.pool->barrier : &s.pool->warps[f.number / kWarp];
  happens_before(key);
  switch_context(f.context, s.scheduler);
  happens_after(key);
}

// The barrier of a block; whether any thread's vote is true.
inline bool block_barrier(bool vote, const char* what, int line) {
  {
    Quiet quiet;
    sim().current->vote = vote;
  }
  wait(State::at_barrier, 0, what, line);
  Quiet quiet;
  return sim().any_vote;
}

inline int lane() { return sim().current->number % kWarp; }

// A warp function: every lane of the mask brings `in` and waits; `combine` then makes all their `out` at once.
inline void together(unsigned mask, const void* in, void* out, Combine combine, const char* what, int line) {
  if (!(mask >> lane() & 1)) throw Error(std::string("cusim: ") + what + ": calling lane is not in its mask");
  Fiber& f = *sim().current;
  {
    Quiet quiet;
    f.in = in;
    f.out = out;
    f.combine = combine;
  }
  wait(State::in_warp, mask, what, line);
}

// The scheduler

inline bool release_block() {
  Simulator& s = sim();
  const Fiber* first = nullptr;
  int waiting = 0;
  bool mixed = false;
  for (const Fiber* f : s.fibers) {
    if (f->state != State::at_barrier) continue;
    if (!first) first = f;
    mixed |= f->line != first->line;
    waiting++;
  }
  if (!waiting || waiting != s.alive) return false;
  if (mixed) throw Error("cusim: threads of one block wait at different __syncthreads (barrier divergence)");
  s.any_vote = false;
  for (Fiber* f : s.fibers)
    if (f->state == State::at_barrier) {
      f->state = State::ready;
      s.any_vote |= f->vote;
    }
  return true;
}

inline bool release_warp(Fiber& f) {  // f waits: are all lanes of its mask at the same place?
  Simulator& s = sim();
  const size_t first = f.number / kWarp * kWarp;
  Arrived arrived;
  arrived.mask = f.mask;
  for (int k = 0; k < kWarp; k++) {
    if (!(f.mask >> k & 1)) continue;
    if (first + k >= s.fibers.size() || s.fibers[first + k]->state == State::done)
      throw Error(std::string("cusim: ") + f.what + ": mask names a lane that does not exist or has exited");
    const Fiber& g = *s.fibers[first + k];
    if (g.state != State::in_warp || g.mask != f.mask || g.line != f.line || g.what != f.what) return false;
    arrived.in[k] = g.in;
    arrived.out[k] = g.out;
  }
  if (f.combine) f.combine(arrived);
  for (int k = 0; k < kWarp; k++)
    if (arrived.mask >> k & 1) s.fibers[first + k]->state = State::ready;
  return true;
}

inline bool release() {
  bool any = release_block();
  for (Fiber* f : sim().fibers)
    if (f->state == State::in_warp) any |= release_warp(*f);
  return any;
}

inline bool run_warp(int warp) {
  Simulator& s = sim();
  bool ran = false;
  for (int k = 0; k < kWarp; k++) {
    const size_t i = warp * kWarp + (s.seed == 1 ? kWarp - 1 - k : k);
    if (i >= s.fibers.size() || s.fibers[i]->state != State::ready) continue;
    resume(*s.fibers[i]);
    ran = true;
  }
  return ran;
}

[[noreturn]] inline void report_deadlock() {
  const Simulator& s = sim();
  const auto waits = [](const Fiber* f) { return f->state != State::done; };
  const Fiber& f = **std::find_if(s.fibers.begin(), s.fibers.end(), waits);
  char text[256];
  snprintf(text, sizeof text, "cusim: deadlock: thread %d of block (%u,%u,%u) waits in %s line %d mask %08x", f.number,
           s.index.x, s.index.y, s.index.z, f.what, f.line, f.mask);
  throw Error(text);
}

// The fibers of a block of n threads, ready to run; block_number only chooses among the pools.
inline void gather(int n, unsigned block_number) {
  Simulator& s = sim();
  s.pool = &s.pools[block_number % kPools];
  while (int(s.pool->fibers.size()) < n) {
    s.pool->fibers.push_back(new Fiber);
    prepare(s.pool->fibers.back()->context, body_of_fiber);
  }
  s.fibers.assign(s.pool->fibers.begin(), s.pool->fibers.begin() + n);
  for (int i = 0; i < n; i++) {
    Fiber& f = *s.fibers[i];
    f.number = i;
    f.tid = dim3(i % s.block.x, i / s.block.x % s.block.y, i / (s.block.x * s.block.y));
    f.state = State::ready;
    f.copies.clear();
    f.groups.clear();
  }
}

inline void run_block(int n, unsigned block_number) {
  Simulator& s = sim();
  const int warps = (n + kWarp - 1) / kWarp;
  gather(n, block_number);
  s.alive = n;
  std::vector<int> order(warps);
  for (int w = 0; w < warps; w++) order[w] = s.seed == 1 ? warps - 1 - w : w;
  for (int step = 0; s.alive; step++) {
    if (s.seed > 1 && (s.seed % 2 == 0 || step == 0)) std::shuffle(order.begin(), order.end(), s.random);
    const bool ran = std::any_of(order.begin(), order.end(), run_warp);  // one warp, then look at the barriers
    if (!release() && !ran) report_deadlock();
  }
}

// Dynamic shared memory of one block: poisoned, and beyond it bytes that must stay as they are. AddressSanitizer looks
// after them itself, so that an overrun is named with its line.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    const size_t all = bytes + 2 * guard_ + kSharedAlignment;
    begin_ = static_cast<unsigned char*>(aligned_alloc(kSharedAlignment, all / kSharedAlignment * kSharedAlignment));
    memset(begin_, kPoison, all / kSharedAlignment * kSharedAlignment);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(begin_ + bytes, all / kSharedAlignment * kSharedAlignment - bytes);
#endif
  }
  ~SharedMemory() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(begin_, bytes_ + kSharedAlignment);
#endif
    free(begin_);
  }
  SharedMemory(const SharedMemory&) = delete;

  unsigned char* start() const { return begin_ + guard_; }
  void check() const {
    const auto touched = [](unsigned char b) { return b != kPoison; };
    if (std::any_of(begin_, start(), touched) || std::any_of(start() + bytes_, start() + bytes_ + guard_, touched))
      throw Error("cusim: a thread wrote beside dynamic shared memory");
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t guard_ = 0;
#else
  static constexpr size_t guard_ = kGuard;
#endif
  size_t bytes_;
  unsigned char* begin_;
};

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  Simulator& s = sim();
  const unsigned n = block.x * block.y * block.z;
  if (n < 1 || n > kMostThreads) throw Error("cusim: bad block size");
  if (shared_bytes > kMostShared) throw Error("cusim: too much dynamic shared memory");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("cusim: bad grid");
  Quiet quiet;
  s.random.seed(s.seed);
  s.grid = grid;
  s.block = block;
  s.body = std::move(body);
  unsigned number = 0;
  happens_before(&s.body);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        s.index = dim3(x, y, z);
        const SharedMemory shared(shared_bytes);
        s.shared = shared.start();
        try {
          run_block(n, number++);
        } catch (...) {  // some fibers stay where they are
          s.pool->fibers.clear();
          throw;
        }
        shared.check();
      }
  happens_after(&s.fibers);
}

}  // namespace cusim
