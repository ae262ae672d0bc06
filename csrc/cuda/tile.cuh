// The main loop of both sweeps: tiles of cosines c_ij = x_hat_i . w_j / |w_j| on tensor cores.
//
// x_hat and w arrive in slices of their rows by asynchronous copies, kStages of them on their way. A thread converts
// the bytes of w that it copied itself, adds up their squares, and leaves them in the operands' type; one barrier a
// slice. The next tile's slices are fetched while a tile is finished. Both directions see the same bits of a cosine.
#pragma once

#include <cstring>

#include "arch.cuh"
#include "problem.h"

namespace fused_margin {
namespace gpu {

constexpr int kStages = 3, kWarpRows = 32, kWarpSlots = 64;
constexpr int kRowFragments = kWarpRows / 16, kSlotFragments = kWarpSlots / 8;
constexpr int kOwnRows = 2 * kRowFragments, kOwnSlots = 2 * kSlotFragments;  // of a tile, in one thread
constexpr int kOperandBytes = kRows * kSliceBytes;
constexpr int kMostChunks = 4;        // of 16 bytes of w that one thread copies for a slice, at most
constexpr float kMostOverUnit = 256;  // fp16: entries of w over their row's unit
constexpr float kLeastUnit = 0x1p-100f;

static_assert(kRows == kSlots && kThreads == 32 * (kRows / kWarpRows) * (kSlots / kWarpSlots), "8 warps make a tile");

using Accumulators = float[kRowFragments][kSlotFragments][4];

// Where a thread's numbers of a tile lie: own row r in [0, kOwnRows), own slot s in [0, kOwnSlots).
struct Place {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int warp_row = warp % (kRows / kWarpRows), warp_col = warp / (kRows / kWarpRows);

  __device__ int row(int r) const { return warp_row * kWarpRows + r * 8 + lane / 4; }
  __device__ int slot(int s) const { return warp_col * kWarpSlots + s / 2 * 8 + lane % 4 * 2 + s % 2; }
};

__device__ __forceinline__ float& own(Accumulators& a, int r, int s) { return a[r / 2][s / 2][r % 2 * 2 + s % 2]; }

__device__ __forceinline__ float read(const void* data, Storage storage, int64_t at) {
  switch (storage) {
    case Storage::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    case Storage::f16:
      return to_float(static_cast<const __half*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

__device__ __forceinline__ float inverse_norm(float square) {
  const float norm = sqrtf(square);
  return 1.0f / (norm < kEps ? kEps : norm);
}

__device__ __forceinline__ float largest_or_nan(float a, float b) { return exceeds(a, b) ? a : b; }

// The power of two below `top`, and at least kLeastUnit.
__device__ __forceinline__ float unit_below(float top) {
  return __uint_as_float(__float_as_uint(fmaxf(top, kLeastUnit)) & 0x7f800000u);
}

// Which class and sub-centre a slot holds, and its row among those read; a slot without a row repeats the last one.
struct Slot {
  int64_t class_, row;
  bool valid;
};

__device__ __forceinline__ Slot slot_of(const Problem& p, int64_t tile, int slot) {
  const int center = slot % p.group;
  const int64_t class_ = tile * (kSlots / p.group) + slot / p.group;
  const int64_t there = class_ < p.classes ? class_ : p.classes - 1;
  return {class_, there * p.sub_centers + (center < p.sub_centers ? center : p.sub_centers - 1),
          class_ < p.classes && center < p.sub_centers};
}

__device__ __forceinline__ int64_t source_row(const Problem& p, int64_t row) { return p.index ? p.index[row] : row; }

// Row `row`, 16 bytes number `chunk` of a slice: neighbouring rows are turned, so that eight of them meet no bank twice.
__device__ __forceinline__ int operand_at(int row, int chunk) {
  return row * kSliceBytes + ((chunk ^ (row / 2 % 4)) << 4);
}

// Products of one fragment; float32 in three products of tf32, without that of the two remainders.
//
// Tensor cores cut off what a sum has beyond float32 (Fasi et al. 2021, doi:10.7717/peerj-cs.330; arXiv 2512.07004): in
// one accumulator over all of a row these errors, all towards zero, would grow with the row, to 16 times those of plain
// float32 at D = 512. So three products go into a fresh accumulator, which an ordinary addition, to nearest, takes in
// (as Ootomo & Yokota 2022, doi:10.1177/10943420221090256). 16-bit operands lose more to their own rounding.
template <class T>
struct Fragments {
  uint32_t a[kRowFragments][4];

  __device__ __forceinline__ void set(int m, const uint32_t (&bits)[4]) {
    for (int i = 0; i < 4; i++) a[m][i] = bits[i];
  }
  __device__ __forceinline__ void multiply(Accumulators& acc, int n, uint32_t low, uint32_t high) {
    const uint32_t b[2] = {low, high};
#pragma unroll
    for (int m = 0; m < kRowFragments; m++) multiply_add<T>(acc[m][n], a[m], b);
  }
};

template <>
struct Fragments<float> {
  uint32_t a[kRowFragments][4], rest[kRowFragments][4];

  __device__ __forceinline__ static void split(uint32_t bits, uint32_t& whole, uint32_t& rest) {
    const float value = __uint_as_float(bits);
    whole = round_to_tf32(value);
    rest = round_to_tf32(value - __uint_as_float(whole));
  }
  __device__ __forceinline__ void set(int m, const uint32_t (&bits)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(bits[i], a[m][i], rest[m][i]);
  }
  __device__ __forceinline__ void multiply(Accumulators& acc, int n, uint32_t low, uint32_t high) {
    uint32_t b[2], b_rest[2];
    split(low, b[0], b_rest[0]);
    split(high, b[1], b_rest[1]);
#pragma unroll
    for (int m = 0; m < kRowFragments; m++) {
      float part[4] = {};
      multiply_add_tf32(part, rest[m], b);
      multiply_add_tf32(part, a[m], b_rest);
      multiply_add_tf32(part, a[m], b);
#pragma unroll
      for (int i = 0; i < 4; i++) acc[m][n][i] += part[i];
    }
  }
};

// What a tile's slots have, in shared memory.
struct SlotNumbers {
  float *inverse, *bias;  // [kSlots]: the product times `inverse` is a cosine; 0 without a bias
};

template <class T>
constexpr Storage kStorage = Storage::f32;
template <>
constexpr Storage kStorage<__nv_bfloat16> = Storage::bf16;
template <>
constexpr Storage kStorage<__half> = Storage::f16;

// A walk through the tiles of one block of rows.
template <class T>
class Tiles {
 public:
  static constexpr int kDepth = kSliceBytes / int(sizeof(T));

  static size_t shared_bytes(Storage w) {
    return size_t(kStages + 2) * kOperandBytes + 6 * kSlots * sizeof(float) +
           size_t(kStages) * kSlots * kDepth * size_of(w);
  }

  __device__ Tiles(const Problem& p, int64_t block) : p_(p), block_(block) {
    unsigned char* memory = dynamic_shared<unsigned char>();
    x_ = memory, w_ = x_ + kStages * kOperandBytes;
    numbers_ = reinterpret_cast<float*>(w_ + 2 * kOperandBytes);
    rescale_ = numbers_ + 4 * kSlots;
    raw_ = reinterpret_cast<unsigned char*>(rescale_ + 2 * kSlots);
    size_ = p.w.storage == Storage::f32 ? 4 : 2;
    chunks_ = kDepth * size_ / 16;
    own_chunks_ = kSlots * chunks_ / kThreads;
    scaled_ = kStorage<T> == Storage::f16 && p.w.storage != Storage::f16;
    copied_ = p.w.col == 1 && p.w.row * size_ % 16 == 0 && p.dim * size_ % 16 == 0 &&
              reinterpret_cast<uintptr_t>(p.w.data) % 16 == 0;
    slices_ = int(p.operand_row / kDepth);
  }

  // done(tile, x_hat . w, SlotNumbers) for each tile of [begin, end).
  template <class Done>
  __device__ void run(int64_t begin, int64_t end, Done& done) {
    Accumulators acc = {};
    fetched_tile_ = int(begin);
    for (int s = 0; s < kStages - 1; s++) fetch_next(s, int(end));
    int slice = 0, stage = 0, turn = 0;
    for (int tile = int(begin); tile < end;) {
      float* const of_tile = numbers_ + (tile & 1) * 2 * kSlots;
      const SlotNumbers numbers = {of_tile, of_tile + kSlots};
      copy_wait<kStages - 2>();
      const bool rescaled = convert(stage, slice, tile, w_ + turn * kOperandBytes, rescale_ + turn * kSlots, numbers);
      if (scaled_) {
        if (any_of_block(rescaled)) rescale(acc, rescale_ + turn * kSlots);
      } else {
        __syncthreads();
      }
      fetch_next(stage ? stage - 1 : kStages - 1, int(end));  // into what was multiplied before the barrier
      multiply(acc, x_ + stage * kOperandBytes, w_ + turn * kOperandBytes);
      turn ^= 1, stage = stage == kStages - 1 ? 0 : stage + 1;
      if (++slice == slices_) {
        done(tile, acc, numbers);
#pragma unroll
        for (int r = 0; r < kOwnRows; r++)
#pragma unroll
          for (int s = 0; s < kOwnSlots; s++) own(acc, r, s) = 0;
        slice = 0, tile++;
      }
    }
    copy_wait<0>();
  }

 private:
  __device__ int chunk() const { return int(threadIdx.x) % chunks_; }
  __device__ int slot(int i) const { return (int(threadIdx.x) + i * kThreads) / chunks_; }
  __device__ unsigned char* raw(int stage, int i) const {
    return raw_ + stage * (kSlots * kDepth * size_) + (i * kThreads + int(threadIdx.x)) * 16;
  }

  // One more group of copies, if slices are left one on its way into a stage.
  __device__ __forceinline__ void fetch_next(int stage, int end) {
    if (fetched_tile_ < end) fetch(stage);
    copy_commit();
  }

  // The next slice of x_hat and w on their way.
  __device__ __forceinline__ void fetch(int stage) {
#pragma unroll
    for (int i = 0; i < kOperandBytes / 16 / kThreads; i++) {
      const int at = int(threadIdx.x) + i * kThreads, row = at / (kSliceBytes / 16), c = at % (kSliceBytes / 16);
      const int64_t from = (block_ * kRows + row) * p_.operand_row + fetched_slice_ * kDepth;
      copy_async_16(x_ + stage * kOperandBytes + operand_at(row, c),
                    static_cast<const unsigned char*>(p_.x_hat) + from * int64_t(sizeof(T)) + c * 16);
    }
    const int first = fetched_slice_ * kDepth + chunk() * (16 / size_);
#pragma unroll
    for (int i = 0; i < kMostChunks; i++) {
      if (i >= own_chunks_) break;
      if (fetched_slice_ == 0) source_[i] = int(source_row(p_, slot_of(p_, fetched_tile_, slot(i)).row));
      const int64_t source = source_[i] * p_.w.row;
      if (copied_) {
        const bool inside = first < p_.dim;
        copy_async_16(raw(stage, i),
                      static_cast<const unsigned char*>(p_.w.data) + (source + (inside ? first : 0)) * size_, inside);
      } else {
        copy_elements(raw(stage, i), source, first);
      }
    }
    if (++fetched_slice_ == slices_) fetched_slice_ = 0, fetched_tile_++;
  }

  // The same for rows that no 16-byte copy can read.
  __device__ __forceinline__ void copy_elements(unsigned char* to, int64_t source, int first) {
    for (int e = 0; e < 16 / size_; e++) {
      const bool inside = first + e < p_.dim;
      const int64_t from = source + (first + e) * p_.w.col;
      if (size_ == 4)
        reinterpret_cast<uint32_t*>(to)[e] = inside ? static_cast<const uint32_t*>(p_.w.data)[from] : 0;
      else
        reinterpret_cast<uint16_t*>(to)[e] = inside ? static_cast<const uint16_t*>(p_.w.data)[from] : 0;
    }
  }

  // A sum or a maximum over the threads that share a slot: the same bits in each.
  __device__ __forceinline__ float over_chunks(float value, bool largest) const {
    for (int apart = 1; apart < chunks_; apart *= 2) {
      const float other = __shfl_xor_sync(~0u, value, apart);
      value = largest ? fmaxf(value, other) : value + other;
    }
    return value;
  }

  // Own bytes of a stage to the operands' type; true if a row's unit has changed. The last slice leaves the norms.
  __device__ __forceinline__ bool convert(int stage, int slice, int64_t tile, unsigned char* to, float* rescale,
                                          const SlotNumbers& numbers) {
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kMostChunks; i++) {
      if (i >= own_chunks_) break;
      float v[8];
      load_chunk(raw(stage, i), v);
      float square = slice ? square_[i] : 0.0f, top = 0;
#pragma unroll
      for (int e = 0; e < 8; e++) square = fmaf(v[e], v[e], square);
      square_[i] = square;
      float over = 1;
      if (scaled_) {
#pragma unroll
        for (int e = 0; e < 8; e++) top = fmaxf(top, fabsf(v[e]));
        top = over_chunks(top, true);
        float factor = 1;
        if (slice == 0) {
          unit_[i] = unit_below(top);
        } else if (top > kMostOverUnit * unit_[i]) {
          factor = unit_[i] / unit_below(top);
          unit_[i] = unit_below(top);
          changed = true;
        }
        if (chunk() == 0) rescale[slot(i)] = factor;
        over = 1.0f / unit_[i];
      }
      store_chunk(to, slot(i), v, over);
      if (slice == slices_ - 1) {
        square = over_chunks(square, false);
        const float unit = scaled_ ? unit_[i] : 1.0f;
        if (chunk() == 0) {
          numbers.inverse[slot(i)] = p_.normalize_w ? unit * inverse_norm(square) : unit;
          numbers.bias[slot(i)] = bias_of(tile, slot(i));
        }
      }
    }
    return changed;
  }

  __device__ __forceinline__ float bias_of(int64_t tile, int slot) const {
    if (!p_.bias.data) return 0;
    const int64_t class_ = slot_of(p_, tile, slot).class_;
    return read(p_.bias.data, p_.bias.storage, (class_ < p_.classes ? class_ : p_.classes - 1) * p_.bias.step);
  }

  __device__ __forceinline__ void load_chunk(const unsigned char* from, float (&v)[8]) const {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (p_.w.storage == Storage::f32) {
        v[k] = __uint_as_float(words[k]), v[k + 4] = 0;
      } else if (p_.w.storage == Storage::bf16) {
        v[2 * k] = __uint_as_float(words[k] << 16), v[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
      } else {
        v[2 * k] = half_value(words[k]), v[2 * k + 1] = half_value(words[k] >> 16);
      }
    }
  }

  __device__ __forceinline__ static float half_value(uint32_t bits) {
    const uint16_t low = uint16_t(bits);
    __half value;
    memcpy(&value, &low, 2);
    return to_float(value);
  }

  __device__ __forceinline__ void store_chunk(unsigned char* to, int slot, float (&v)[8], float over) const {
    const bool wide = p_.w.storage == Storage::f32;  // 4 values, not 8
    if constexpr (kStorage<T> == Storage::f32) {
      auto put = [&](int c, int e) {
        *reinterpret_cast<float4*>(to + operand_at(slot, c)) = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
      };
      if (wide) {
        put(chunk(), 0);
      } else {
        put(2 * chunk(), 0);
        put(2 * chunk() + 1, 4);
      }
    } else {
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; k++) words[k] = pack<T>(v[2 * k] * over, v[2 * k + 1] * over);
      if (wide)
        *reinterpret_cast<uint2*>(to + operand_at(slot, chunk() / 2) + chunk() % 2 * 8) =
            make_uint2(words[0], words[1]);
      else
        *reinterpret_cast<uint4*>(to + operand_at(slot, chunk())) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  __device__ __forceinline__ void rescale(Accumulators& acc, const float* factors) const {
#pragma unroll
    for (int s = 0; s < kOwnSlots; s++) {
      const float factor = factors[place_.slot(s)];
#pragma unroll
      for (int r = 0; r < kOwnRows; r++) own(acc, r, s) *= factor;
    }
  }

  __device__ __forceinline__ void multiply(Accumulators& acc, const unsigned char* x, const unsigned char* w) const {
    const int lane = place_.lane;
#pragma unroll(sizeof(T) == 4 ? 1 : kSliceBytes / 32)  // fresh accumulators take the registers of a second half
    for (int half = 0; half < kSliceBytes / 32; half++) {
      Fragments<T> fragments;
#pragma unroll
      for (int m = 0; m < kRowFragments; m++) {
        uint32_t bits[4];
        const int row = place_.warp_row * kWarpRows + m * 16 + lane % 16;
        load_matrices(bits, x + operand_at(row, half * 2 + lane / 16));
        fragments.set(m, bits);
      }
#pragma unroll
      for (int n = 0; n < kSlotFragments; n += 2) {
        uint32_t bits[4];
        const int row = place_.warp_col * kWarpSlots + n * 8 + lane / 16 * 8 + lane % 8;
        load_matrices(bits, w + operand_at(row, half * 2 + lane / 8 % 2));
        fragments.multiply(acc, n, bits[0], bits[1]);
        fragments.multiply(acc, n + 1, bits[2], bits[3]);
      }
    }
  }

  const Problem& p_;
  const int64_t block_;
  const Place place_;
  unsigned char *x_, *w_, *raw_;  // stages of x_hat; two slices of converted w; stages of w as it is
  float *numbers_, *rescale_;     // SlotNumbers of two tiles; [2, kSlots]
  int size_, chunks_, own_chunks_, slices_;
  bool scaled_, copied_;
  int fetched_tile_ = 0, fetched_slice_ = 0;
  int source_[kMostChunks];  // rows of w; where they begin is worked out again, as registers are wanted
  float square_[kMostChunks], unit_[kMostChunks];
};

}  // namespace gpu
}  // namespace fused_margin
