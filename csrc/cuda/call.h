// A call of an operator: its tensors as a Problem, the device and the stream that launches go to, the errors of both.
// Torch's stable ABI only, and of it nothing that a torch without CUDA lacks: the library loads there too.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launchers.h"

namespace fused_margin {
namespace gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Where the launches of a call go; the device is the current one as long as this lives.
struct Device {
  cudaStream_t stream = nullptr;
  int64_t programs, chunk_bytes;  // at one time; of G, so that it stays in the cache
#ifdef FM_HOST_SIM
  explicit Device(const Tensor&) : programs(4), chunk_bytes(1 << 20) {}
#else
  explicit Device(const Tensor& x) : guard(x.get_device_index()) {
    // Only a torch with CUDA has it, and the stable ABI has a stream's handle from torch 2.13 on.
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto current_stream = [] {
      void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return torch ? (CurrentStream)dlsym(torch, "aoti_torch_get_current_cuda_stream") : nullptr;
    }();
    const int32_t device = x.get_device_index();
    void* current = nullptr;
    STD_TORCH_CHECK(current_stream && current_stream(device, &current) == 0,
                    "fused_margin: libtorch_cuda.so does not give the current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
    int processors = 0, cache = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
    STD_TORCH_CHECK(error == cudaSuccess, "fused_margin: ", cudaGetErrorString(error));
    programs = processors;
    chunk_bytes = cache_for_chunk(cache);
  }
  torch::stable::accelerator::DeviceGuard guard;
#endif
};

inline Cut& cut() {
  static Cut as_shipped;
  return as_shipped;
}

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      STD_TORCH_CHECK(false, "fused_margin: expected a float32, bfloat16 or float16 tensor");
  }
  return Storage::f32;
}

inline ScalarType type_of(Storage storage) {
  return storage == Storage::f32    ? ScalarType::Float
         : storage == Storage::bf16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

inline Matrix matrix_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "fused_margin: expected a matrix, got ", t.dim(), " dimensions");
  return {t.const_data_ptr(), storage_of(t), t.stride(0), t.stride(1)};
}

inline Vector vector_of(const char* name, const MaybeTensor& t, int64_t expected) {
  if (!t) return {nullptr, Storage::f32, 0};
  STD_TORCH_CHECK(t->dim() <= 1 && t->numel() == expected, "fused_margin: ", name, " has ", t->numel(),
                  " values; expected ", expected);
  return {t->const_data_ptr(), storage_of(*t), t->dim() ? t->stride(0) : 0};
}

inline Tensor make(const Tensor& like, std::vector<int64_t> shape, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, shape, type);
}

// The first rows and columns of a matrix.
inline Tensor corner(Tensor t, int64_t rows, int64_t columns) {
  Tensor of_rows = torch::stable::narrow(t, 0, 0, rows);
  return torch::stable::narrow(of_rows, 1, 0, columns);
}

inline float* floats(Tensor& t) { return t.mutable_data_ptr<float>(); }
inline int* ints(Tensor& t) { return t.mutable_data_ptr<int>(); }

// The static part of a sweep, as backends/cuda.py passes it.
struct Options {
  int64_t rule;
  bool unit_slope;
  int64_t reduction, sub_centers;
  bool normalize_x, normalize_w;
  int64_t operand, num_classes, first_class, ignore_index, want;
};

// The tensors of a sweep, as the operator has them.
struct Inputs {
  const Tensor &x, &w, &labels;
  const MaybeTensor scale, tau, bias, index, rule_args;
};

class Call {
 public:
  Call(const Inputs& in, const Options& o) : x(in.x), device(in.x) {
    p = {};
    p.x = matrix_of(in.x), p.w = matrix_of(in.w);
    p.batch = in.x.size(0), p.dim = in.x.size(1);
    const int64_t rows = in.index ? in.index->size(0) : in.w.size(0);
    STD_TORCH_CHECK(in.w.size(1) == p.dim, "fused_margin: embeddings have ", p.dim, " columns, the weight ",
                    in.w.size(1));
    STD_TORCH_CHECK(o.sub_centers >= 1 && o.sub_centers <= kMostSubCenters && rows % o.sub_centers == 0,
                    "fused_margin: ", rows, " rows of weights make no classes of ", o.sub_centers, " each");
    STD_TORCH_CHECK(p.batch < kMostNumber && in.w.size(0) < kMostNumber && rows < kMostNumber && p.dim < kMostNumber,
                    "fused_margin: a dimension is beyond 2^31 - 2^20");
    p.classes = rows / o.sub_centers;
    p.sub_centers = int(o.sub_centers), p.group = group_of(p.sub_centers);
    p.operand = Storage(o.operand);
    STD_TORCH_CHECK(!in.index || (in.index->scalar_type() == ScalarType::Long && in.index->is_contiguous()),
                    "fused_margin: index must be contiguous and int64");
    p.index = in.index ? in.index->const_data_ptr<int64_t>() : nullptr;
    STD_TORCH_CHECK(in.labels.scalar_type() == ScalarType::Long && in.labels.dim() == 1 && in.labels.size(0) == p.batch,
                    "fused_margin: expected ", p.batch, " int64 labels");
    p.labels = in.labels.const_data_ptr<int64_t>(), p.label_step = in.labels.stride(0);
    p.scale = vector_of("scale", in.scale, p.batch), p.tau = vector_of("tau", in.tau, p.batch);
    p.bias = vector_of("bias", in.bias, p.classes);
    if (in.rule_args && in.rule_args->numel()) {
      STD_TORCH_CHECK(in.rule_args->scalar_type() == ScalarType::Float && in.rule_args->is_contiguous(),
                      "fused_margin: the arguments of a rule must be contiguous and float32");
      p.args = in.rule_args->const_data_ptr<float>();
    }
    p.rule = RuleCode(o.rule), p.reduction = Reduction(o.reduction), p.unit_slope = o.unit_slope;
    p.normalize_x = o.normalize_x, p.normalize_w = o.normalize_w;
    p.first_class = o.first_class, p.ignore_index = o.ignore_index, p.want = int(o.want);
    plan = gpu::plan(p.batch, p.dim, p.classes, p.sub_centers, p.operand, device.programs, device.chunk_bytes, cut());
  }

  // Room for what the prologue leaves to a sweep.
  void make_operands() {
    p.padded = plan.padded, p.operand_row = plan.operand_row;
    x_hat_ = make(x, {p.padded, p.operand_row}, type_of(p.operand));
    target_ = make(x, {p.padded}, ScalarType::Int);
    constants_ = make(x, {4, p.padded});
    p.x_hat = x_hat_->mutable_data_ptr(), p.target = ints(*target_), p.constants = floats(*constants_);
  }

  // One kernel's launches, or an error that names it.
  template <class Args>
  void run(const char* name, const Args& args) const {
    const cudaError_t error = gpu::run(args, device.stream);
    STD_TORCH_CHECK(error == cudaSuccess, "fused_margin: ", name, " of ", p.batch, " x ", p.classes, " x ", p.dim,
                    " (rows x classes x dimension): ", cudaGetErrorString(error));
  }

  const Tensor& x;
  Device device;
  Problem p;
  Plan plan;

 private:
  static constexpr int64_t kMostNumber = (int64_t(1) << 31) - (1 << 20);
  std::optional<Tensor> x_hat_, target_, constants_;
};

// out = a b in float32, by torch's library.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  const auto call = [](const char* overload, auto... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  };
#ifdef FM_HOST_SIM  // torch's products of 16 bit with sums in float32 are for GPUs only
  if (cusim::computes())
    call("out", torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float), out);
#else
  if (a.scalar_type() == ScalarType::Float)
    call("out", a, b, out);
  else
    call("dtype_out", a, b, ScalarType::Float, out);
#endif
}

}  // namespace gpu
}  // namespace fused_margin
