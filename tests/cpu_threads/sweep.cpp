// The CPU kernels without torch, their tasks on std::threads, for ThreadSanitizer (which does not know OpenMP's).
//
// Forward, backward and an optimizer's step, for the bits of one thread and of several, which must be the same.
// `sweep race` has tasks that share a number on purpose.
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "cpu/rows.h"
#include "cpu/update.h"

using namespace fused_margin;

namespace {

// Each thread takes every count-th task: a common counter would order tasks, and hide their races.
Parallel on_threads(int count) {
  return {count, [count](int64_t tasks, const std::function<void(int64_t)>& task) {
            std::vector<std::thread> threads;
            for (int t = 0; t < count; t++)
              threads.emplace_back([=, &task] {
                for (int64_t i = t; i < tasks; i += count) task(i);
              });
            for (std::thread& t : threads) t.join();
          }};
}

struct Sweep {
  static constexpr int64_t batch = 70, dim = 48, classes = 33000;
  std::vector<float> x, w, scale, tau, args{1.2f, 0.2f}, x_hat, inv, cos_y;
  std::vector<int64_t> target, target_row, by_target;
  Problem<float> p{};

  Sweep() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    const auto draw = [&](int64_t n) {
      std::vector<float> v(n);
      for (float& value : v) value = normal(random);
      return v;
    };
    p.batch = batch, p.dim = dim, p.classes = classes, p.sub_centers = 1, p.padded = round_up(batch, kPad);
    x = draw(batch * dim), w = draw(classes * dim);
    scale.assign(p.padded, 0), tau.assign(p.padded, 0), target.assign(p.padded, kElsewhere);
    for (int64_t i = 0; i < batch; i++) scale[i] = 30, tau[i] = 0.1f, target[i] = random() % classes;
    x_hat.resize(p.padded * dim), inv.resize(p.padded), cos_y.resize(p.padded), target_row.assign(p.padded, -1);
    p.w = {w.data(), Storage::f32, dim, 1, nullptr};
    p.normalize_w = p.clamp = true;
    p.rule = RuleCode::hard, p.reduction = Reduction::logsumexp, p.want = kDx | kSum | kStats | kDscale;
    p.x_hat = x_hat.data(), p.target = target.data(), p.scale = scale.data(), p.tau = tau.data(), p.args = args.data();
    const RowsIn in{{x.data(), Storage::f32, dim, 1, nullptr}, true};
    prepare_rows(p, in, RowsOut<float>{x_hat.data(), inv.data(), cos_y.data(), target_row.data()}, 0, batch);
    by_target.resize(batch);
    for (int64_t i = 0; i < batch; i++) by_target[i] = i;
    std::stable_sort(by_target.begin(), by_target.end(),
                     [&](int64_t a, int64_t b) { return target_row[a] < target_row[b]; });
  }

  // Everything that the kernels make, one after the other.
  std::vector<float> run(const Kernels& kernels, const Parallel& parallel) const {
    std::vector<float> red(p.padded, 1e30f), aux(kAuxRows * batch), o(batch * dim), o_sum(batch * dim);
    std::vector<float> partial(forward_workspace(p)), d_w(classes * dim), updated = w, momentum(classes * dim);
    std::vector<float> g(p.padded, 0), red_low(p.padded, 0);
    for (int64_t i = 0; i < batch; i++) g[i] = 0.01f * float(i % 7 - 3);
    kernels.forward_f32(p, {red.data(), aux.data(), o.data(), o_sum.data(), partial.data()}, parallel);
    const BackwardIn<float> in{g.data(),       g.data(),          g.data(),        red.data(),
                               red_low.data(), target_row.data(), by_target.data()};
    kernels.backward_f32(p, in, {d_w.data(), nullptr}, parallel);
    Problem<float> stepped = p;
    stepped.w.data = updated.data();
    const BackwardCall<float> call{&stepped, in};
    const Hyper sgd{Optimizer::sgd, 0.1, 5e-4, 0.9, 0, false, 0, 0, 0};
    kernels.step_f32(&call, 1, {sgd, stepped.w, updated.data(), momentum.data(), nullptr, nullptr, 1}, parallel);
    std::vector<float> all;
    for (const auto* v : {&red, &aux, &o, &o_sum, &d_w, &updated, &momentum})
      all.insert(all.end(), v->begin(), v->end());
    return all;
  }
};

void race() {
  int shared = 0;
  on_threads(4)(64, [&](int64_t i) { shared += int(i); });
  printf("%d\n", shared);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "race") return race(), 0;
  const Sweep sweep;
  const std::vector<float> one = sweep.run(kernels_portable(), on_threads(1));
  for (const float v : one)
    if (v != v) return puts("a result is not a number"), 1;
  for (int threads : {2, 3, 4}) {
    const std::vector<float> several = sweep.run(kernels_portable(), on_threads(threads));
    if (memcmp(one.data(), several.data(), one.size() * sizeof(float)))
      return printf("%d threads: other bits\n", threads), 1;
  }
  puts("the same bits");
}
