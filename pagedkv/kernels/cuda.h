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
  uint4 low, high;
};

// K and V are read once, row after row: past the first cache, and the second is told to fetch on.
// It must not be one of the loads for what no kernel writes: some of it this kernel has just written.
__device__ __forceinline__ uint4 stream(const void* p) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}
__device__ __forceinline__ Half8 load(const __half* p) {
  return {stream(p)};
}
__device__ __forceinline__ BFloat8 load(const __nv_bfloat16* p) {
  return {stream(p)};
}
__device__ __forceinline__ Float8 load(const float* p) {
  return {stream(p), stream(p + 4)};
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
  const unsigned words[8] = {x.low.x, x.low.y, x.low.z, x.low.w, x.high.x, x.high.y, x.high.z, x.high.w};
  UNROLL for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(words[i]);
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
