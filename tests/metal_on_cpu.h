// What the Metal dialect and MLX's generated signature use of Metal, on a CPU. Every kernel's text
// compiles with it, so it includes little; `metal_on_cpu.cpp` does what takes more.
#pragma once
#include <stddef.h>
#include <stdint.h>

using uint = uint32_t;
using ushort = uint16_t;

inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float rint(float x) { return __builtin_rintf(x); }
template <typename T>
T max(T x, T y) {
  return x < y ? y : x;
}
template <typename T>
T min(T x, T y) {
  return y < x ? y : x;
}

template <typename To, typename From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To out;
  __builtin_memcpy(&out, &x, sizeof out);
  return out;
}

struct half {
  uint16_t bits;
  operator float() const;
  half() = default;
  explicit half(float x);
};
struct bfloat16_t {
  uint16_t bits;
  operator float() const { return as_type<float>(uint(bits) << 16); }
  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    const uint word = as_type<uint>(x);
    bits = __builtin_isnan(x) ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
};
struct half2 { half x, y; };
struct uint3 { uint x, y, z; };
struct uint4 {
  uint words[4];
  uint operator[](int i) const { return words[i]; }
};
struct float4 {
  float words[4];
  float operator[](int i) const { return words[i]; }
};
namespace fast {
inline float exp2(float x) { return __builtin_exp2f(x); }
inline float log2(float x) { return __builtin_log2f(x); }
}  // namespace fast
enum class mem_flags { mem_threadgroup, mem_device };

using Kernel = void (*)(void** buffers, uint3 group, uint3 thread);

namespace fibers {
enum Wait { RUNNING, SHUFFLE, BARRIER, DONE };
extern int current;
void wait(Wait why);
float exchange(float x, int lane);
}  // namespace fibers

inline float simd_shuffle_xor(float x, ushort mask) {
  return fibers::exchange(x, (fibers::current & 31) ^ mask);
}
inline float simd_shuffle(float x, ushort lane) { return fibers::exchange(x, lane); }
inline bool simd_any(bool x) {
  for (int mask = 1; mask < 32; mask *= 2) x |= simd_shuffle_xor(x, mask) != 0.0f;
  return x;
}
inline void threadgroup_barrier(mem_flags) { fibers::wait(fibers::BARRIER); }

#define device
#define thread
#define constant
#define threadgroup static
