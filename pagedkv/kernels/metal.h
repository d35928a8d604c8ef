// What the kernels need of Metal.
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHARED threadgroup
#define FUNCTION inline

using Float16 = half;
using BFloat16 = bfloat16_t;
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

inline Half8 load(const device half* p) {
  return {*(const device uint4*)p};
}
inline BFloat8 load(const device bfloat16_t* p) {
  return {*(const device uint4*)p};
}
inline Float8 load(const device float* p) {
  return {((const device float4*)p)[0], ((const device float4*)p)[1]};
}

inline void unpack(Half8 x, thread float* out) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const half2 pair = as_type<half2>(x.bits[i]);
    out[2 * i] = float(pair.x);
    out[2 * i + 1] = float(pair.y);
  }
}
inline void unpack(BFloat8 x, thread float* out) {
  UNROLL for (int i = 0; i < 4; ++i) {
    out[2 * i] = as_type<float>(x.bits[i] << 16);
    out[2 * i + 1] = as_type<float>(x.bits[i] & 0xffff0000u);
  }
}
inline void unpack(Float8 x, thread float* out) {
  UNROLL for (int i = 0; i < 4; ++i) {
    out[i] = x.low[i];
    out[4 + i] = x.high[i];
  }
}

// Puts eight numbers into memory, or zeros if they are not `held`. Float16 ends at its largest number;
// what is no number stays none.
inline half in_half(float x) {
  return half(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}
inline void store(device half* to, const thread float* x, bool held) {
  UNROLL for (int i = 0; i < 8; ++i) to[i] = in_half(held ? x[i] : 0.0f);
}
template <typename E>
inline void store(device E* to, const thread float* x, bool held) {
  UNROLL for (int i = 0; i < 8; ++i) to[i] = E(held ? x[i] : 0.0f);
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
template <typename E>
inline auto load(const device E* p, Codes<0>) {
  return load(p);
}
inline Codes<8> load(const device uint* p, Codes<8>) {
  return {p[0], p[1]};
}
inline Codes<4> load(const device uint* p, Codes<4>) {
  return {p[0]};
}
inline void unpack(Codes<8> x, thread float* out) {
  UNROLL for (int i = 0; i < 4; ++i) {
    out[i] = float((x.low >> (8 * i)) & 0xffu);
    out[4 + i] = float((x.high >> (8 * i)) & 0xffu);
  }
}
inline void unpack(Codes<4> x, thread float* out) {
  UNROLL for (int i = 0; i < 4; ++i) {
    out[2 * i] = float((x.bits >> (4 * i)) & 0xfu);
    out[2 * i + 1] = float((x.bits >> (16 + 4 * i)) & 0xfu);
  }
}
inline float nearest(float x) {
  return rint(x);
}
// A number as float16 has it, by its bits and back.
inline uint half_bits(float x) {
  return as_type<ushort>(half(x));
}
inline float half_number(uint bits) {
  return float(as_type<half>(ushort(bits & 0xffffu)));
}

inline float lane_xor(float x, int mask) {
  return simd_shuffle_xor(x, ushort(mask));
}
// The value of another seat of one's own team.
#define TEAM_FROM(x, seat) simd_shuffle(x, ushort(team * LANES + (seat)))
inline bool warp_any(bool x) {
  return simd_any(x);
}
inline float exp2_fast(float x) {
  return fast::exp2(x);
}
inline float log2_fast(float x) {
  return fast::log2(x);
}
inline float as_float(int x) {
  return as_type<float>(x);
}
inline void group_barrier() {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
// For the threads of a group: what each wrote into a pool is there for all.
inline void pool_barrier() {
  threadgroup_barrier(mem_flags::mem_device);
}
template <typename E>
inline device E* writable(const device E* pool) {
  return const_cast<device E*>(pool);
}
