// What the kernels need of CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define UNROLL _Pragma("unroll")
#define SHARED __shared__
#define FUNCTION __device__ __forceinline__
// Metal's words for where a pointer leads.
#define device
#define thread

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

// Puts eight numbers into memory, or zeros if they are not `held`. Float16 ends at its largest number;
// what is no number stays none.
__device__ __forceinline__ float in_half(float x) {
  return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
}
__device__ __forceinline__ void store(__half* to, const float* x, bool held) {
  alignas(16) __half2 pairs[4];
  UNROLL for (int i = 0; i < 4; ++i)
    pairs[i] = __floats2half2_rn(held ? in_half(x[2 * i]) : 0.0f, held ? in_half(x[2 * i + 1]) : 0.0f);
  *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(pairs);
}
__device__ __forceinline__ void store(__nv_bfloat16* to, const float* x, bool held) {
  alignas(16) __nv_bfloat162 pairs[4];
  UNROLL for (int i = 0; i < 4; ++i)
    pairs[i] = __floats2bfloat162_rn(held ? x[2 * i] : 0.0f, held ? x[2 * i + 1] : 0.0f);
  *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(pairs);
}
__device__ __forceinline__ void store(float* to, const float* x, bool held) {
  UNROLL for (int i = 0; i < 8; ++i) to[i] = held ? x[i] : 0.0f;
}

// Eight codes of 8 or 4 bits; of no bits: numbers as they are.
template <int BITS>
struct Codes {};
template <>
struct Codes<8> {
  uint low, high;
};
template <>
struct Codes<4> {
  uint bits;
};
template <typename P>
__device__ __forceinline__ auto load(P p, Codes<0>) {
  return load(p);
}
__device__ __forceinline__ Codes<8> load(const uint* p, Codes<8>) {
  Codes<8> x;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.low), "=r"(x.high)
               : "l"(p));
  return x;
}
__device__ __forceinline__ Codes<4> load(const uint* p, Codes<4>) {
  Codes<4> x;
  asm volatile("ld.global.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(x.bits) : "l"(p));
  return x;
}
// Codes are put into the digits of 1024 in float16, which is quicker than to convert an integer.
__device__ __forceinline__ void unpack_pair(uint pair, __half2 factor, __half2 offset, float* out) {
  const float2 numbers = __half22float2(__hfma2(reinterpret_cast<const __half2&>(pair), factor, offset));
  out[0] = numbers.x;
  out[1] = numbers.y;
}
__device__ __forceinline__ void unpack(Codes<8> x, float* out) {
  const __half2 one = __float2half2_rn(1.0f), base = __float2half2_rn(-1024.0f);
  unpack_pair(__byte_perm(x.low, 0x64646464u, 0x4140), one, base, out);
  unpack_pair(__byte_perm(x.low, 0x64646464u, 0x4342), one, base, out + 2);
  unpack_pair(__byte_perm(x.high, 0x64646464u, 0x4140), one, base, out + 4);
  unpack_pair(__byte_perm(x.high, 0x64646464u, 0x4342), one, base, out + 6);
}
__device__ __forceinline__ void unpack(Codes<4> x, float* out) {
  const __half2 one = __float2half2_rn(1.0f), base = __float2half2_rn(-1024.0f);
  const __half2 part = __float2half2_rn(0.0625f), part_base = __float2half2_rn(-64.0f);
  UNROLL for (int i = 0; i < 2; ++i) {
    const uint word = x.bits >> 8 * i;
    unpack_pair((word & 0x000f000fu) | 0x64006400u, one, base, out + 4 * i);
    unpack_pair((word & 0x00f000f0u) | 0x64006400u, part, part_base, out + 4 * i + 2);
  }
}
__device__ __forceinline__ float nearest(float x) {
  return rintf(x);
}
// A number as float16 has it, by its bits and back.
__device__ __forceinline__ uint half_bits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ float half_number(uint bits) {
  return __half2float(__ushort_as_half(bits & 0xffffu));
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
template <typename E>
__device__ __forceinline__ E* writable(const E* pool) {
  return const_cast<E*>(pool);
}
