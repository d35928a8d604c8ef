// What the kernels need of CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// MLX writes the signature. This is how the size of a group gets into it: without it the compiler may
// spend more registers on a thread than so many threads can have, and the launch fails.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(WARPS * 32)

#define UNROLL _Pragma("unroll")
#define SHARED __shared__

using uint = unsigned;
using Float16 = __half;
using BFloat16 = __nv_bfloat16;
using Float32 = float;

// Eight elements as they lie in memory.
struct Half8 {
  uint4 bits;
};
struct BFloat8 {
  uint4 bits;
};
struct Float8 {
  float4 low, high;
};

// K and V are read once: streaming loads leave the cache to what is read again.
__device__ __forceinline__ Half8 load(const __half* p) {
  return {__ldcs(reinterpret_cast<const uint4*>(p))};
}
__device__ __forceinline__ BFloat8 load(const __nv_bfloat16* p) {
  return {__ldcs(reinterpret_cast<const uint4*>(p))};
}
__device__ __forceinline__ Float8 load(const float* p) {
  auto q = reinterpret_cast<const float4*>(p);
  return {__ldcs(q), __ldcs(q + 1)};
}

__device__ __forceinline__ void unpack(Half8 x, float* out) {
  const unsigned words[4] = {x.bits.x, x.bits.y, x.bits.z, x.bits.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ void unpack(BFloat8 x, float* out) {
  const unsigned words[4] = {x.bits.x, x.bits.y, x.bits.z, x.bits.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(Float8 x, float* out) {
  out[0] = x.low.x, out[1] = x.low.y, out[2] = x.low.z, out[3] = x.low.w;
  out[4] = x.high.x, out[5] = x.high.y, out[6] = x.high.z, out[7] = x.high.w;
}

__device__ __forceinline__ float lane_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
// The value of another seat of one's own team.
#define TEAM_FROM(x, seat) __shfl_sync(0xffffffffu, x, seat, LANES)
__device__ __forceinline__ bool warp_any(bool x) {
  return __any_sync(0xffffffffu, x);
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  return __log2f(x);
}
__device__ __forceinline__ float as_float(int x) {
  return __int_as_float(x);
}
__device__ __forceinline__ void group_barrier() {
  __syncthreads();
}
// For the threads of a group: what each wrote into a pool is there for all.
__device__ __forceinline__ void pool_barrier() {
  __syncthreads();
}
#define WRITABLE(pool) const_cast<T*>(pool)
