// Kernels of test_ptx_nvcc.py: a block reduction (BUG_NO_SYNC leaves out a barrier), a tensor-core product, opcodes,
// a struct as parameter and functions that are called.
#include <cstdint>
#include <cuda_bf16.h>

template <class F>
__device__ float block_reduce(float v, float init, float* shared, F f) {  // shared: 32 floats
  for (int o = 16; o; o >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!lane) shared[warp] = v;
  __syncthreads();
  v = lane < (int)(blockDim.x / 32) ? shared[lane] : init;
  for (int o = 16; o; o >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
#ifndef BUG_NO_SYNC
  __syncthreads();  // shared is used again by the next reduction
#endif
  return v;
}

// One row of cosines a block: loss = log sum_j exp(s (c_j - m [j == y])) - s (c_y - m)
__global__ void margin_ce_row(const float* cos, const int64_t* y, float* loss, float* total, int C, float s, float m) {
  extern __shared__ float shared[];
  int64_t row = blockIdx.x, target = y[row];
  const float* c = cos + row * C;
  float top = -INFINITY;
  for (int j = threadIdx.x; j < C; j += blockDim.x) top = fmaxf(top, s * (c[j] - (j == target ? m : 0.f)));
  top = block_reduce(top, -INFINITY, shared, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.f;
  for (int j = threadIdx.x; j < C; j += blockDim.x) sum += __expf(s * (c[j] - (j == target ? m : 0.f)) - top);
  sum = block_reduce(sum, 0.f, shared, [](float a, float b) { return a + b; });
  if (!threadIdx.x) {
    loss[row] = top + logf(sum) - s * (c[target] - m);
    atomicAdd(total, loss[row]);
  }
}

// D[M, N] = A[M, K] B[N, K]^T in bf16 with fp32 sums; M % 16 == N % 8 == K % 16 == 0; one warp a tile of 16 x 8
__global__ void gemm_bf16(const uint16_t* A, const uint16_t* B, float* D, int N, int K) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int r0 = blockIdx.x * 16, c0 = blockIdx.y * 8;
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < K; k += 16) {
    auto pair = [&](const uint16_t* p, int row, int kk) { return *(const uint32_t*)(p + (int64_t)row * K + k + kk); };
    uint32_t a[4] = {pair(A, r0 + g, 2 * t), pair(A, r0 + g + 8, 2 * t), pair(A, r0 + g, 2 * t + 8),
                     pair(A, r0 + g + 8, 2 * t + 8)};
    uint32_t b[2] = {pair(B, c0 + g, 2 * t), pair(B, c0 + g, 2 * t + 8)};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  for (int e = 0; e < 4; e++) D[(int64_t)(r0 + g + (e >> 1) * 8) * N + c0 + 2 * t + (e & 1)] = d[e];
}

// What is easy to get silently wrong: directed rounding, 64-bit division, high halves, bf16
__global__ void opcodes(const float* x, const long long* k, float* f, long long* i) {
  int t = threadIdx.x, n = blockDim.x;
  float a = x[t], b = x[n + t];
  long long p = k[t], q = k[n + t];
  f[t] = expf(a);
  f[n + t] = floorf(a) + ceilf(b) + truncf(a) + rintf(b);
  f[2 * n + t] = __fadd_rd(a, b);
  f[3 * n + t] = __fmul_rz(a, b);
  f[4 * n + t] = __bfloat162float(__float2bfloat16(a) + __float2bfloat16(b));
  f[5 * n + t] = fmaxf(fminf(a, b), 0.f) / b;
  f[6 * n + t] = log1pf(fabsf(a));
  i[t] = p / q;
  i[n + t] = p % q;
  i[2 * n + t] = __mul64hi(p, q);
  i[3 * n + t] = __mulhi((int)p, (int)q);
  i[4 * n + t] = __popcll(p) + __clz((int)q);
  i[5 * n + t] = __byte_perm((unsigned)p, (unsigned)q, 0x3715);
  i[6 * n + t] = (p >> (t & 63)) ^ ((unsigned long long)q >> 7) ^ (p << 3);
  i[7 * n + t] = (long long)(int)a + (long long)b;
}

struct Numbers {
  const double* x;
  double *sine, *power;
  int* any;
  int exponent;
  double factor;
};

__device__ __noinline__ double2 raised(double x, int n) {
  double2 r = make_double2(1, x);
  for (int i = 0; i < n; i++) r.x *= x;
  return r;
}

// What libdevice and __noinline__ bring: calls, parameters in memory, tables, registers of an inner scope, votes.
__global__ void calls(Numbers n) {
  const int t = threadIdx.x;
  const double x = n.x[t];
  n.sine[t] = sin(x * n.factor);
  double2 r = make_double2(0, 0);
  if (x > 0) r = raised(x, n.exponent);
  n.power[t] = r.x + 2 * r.y;
  n.any[t] = __syncthreads_or(x > 1.9) + 2 * __syncthreads_count(x > 0) + 256 * __syncthreads_and(x > -3);
}
