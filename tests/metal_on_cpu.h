// What the Metal dialect and MLX's generated signature use of Metal, on a CPU: a thread of a group is a
// fiber, which runs until it has to wait for the others at a shuffle or a barrier. Each time, the
// fibers of a group take their turns in another random order, so that a missing barrier shows.
#define _XOPEN_SOURCE 700
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

using std::fma;
using std::max;
using std::min;
using uint = uint32_t;
using ushort = uint16_t;

template <typename To, typename From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To out;
  memcpy(&out, &x, sizeof out);
  return out;
}

struct half {
  uint16_t bits;
  operator float() const {
    const uint sign = uint(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return as_type<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float size = std::ldexp(float(rest & 0x3ff) + (rest >> 10 ? 1024 : 0),
                                  max(int(rest >> 10), 1) - 25);
    return sign ? -size : size;
  }
  half() = default;
  explicit half(float x) {
    if (std::isnan(x) || std::fabs(x) >= 65520.0f) {
      bits = std::isnan(x) ? 0x7e00 : 0x7c00;
    } else {
      int exponent;
      std::frexp(x, &exponent);
      exponent = x == 0.0f ? -14 : max(exponent - 1, -14);
      // Steps of the last place, rounded to even; a carry runs on into the exponent.
      const int steps = int(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)));
      bits = uint16_t(steps + ((exponent + 14) << 10));
    }
    if (std::signbit(x)) bits |= 0x8000;
  }
};
struct bfloat16_t {
  uint16_t bits;
  operator float() const { return as_type<float>(uint(bits) << 16); }
  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    const uint word = as_type<uint>(x);
    bits = std::isnan(x) ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
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
inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
}  // namespace fast
enum class mem_flags { mem_threadgroup, mem_device };

namespace fibers {
constexpr int MOST = 1024, STACK = 1 << 16;
enum Wait { RUNNING, SHUFFLE, BARRIER, DONE };
ucontext_t scheduler, contexts[MOST];
Wait waits[MOST];
int current, turn[MOST];
float mailbox[2][MOST];
std::vector<char> stacks(size_t(MOST) * STACK);
std::function<void(int)> body;

void wait(Wait why) {
  waits[current] = why;
  swapcontext(&contexts[current], &scheduler);
}
void enter() {
  body(current);
  waits[current] = DONE;
}
// Run one group; false if its threads wait for each other at different places.
bool run(int threads, std::mt19937& random) {
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) {
    order[t] = t;
    turn[t] = 0;
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = &stacks[size_t(t) * STACK];
    contexts[t].uc_stack.ss_size = STACK;
    contexts[t].uc_link = &scheduler;
    makecontext(&contexts[t], enter, 0);
  }
  const auto all = [&](int first, int last, Wait why) {
    return std::all_of(waits + first, waits + last, [&](Wait wait) { return wait == why; });
  };
  std::fill_n(waits, threads, RUNNING);
  while (!all(0, threads, DONE)) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (int t : order) {
      if (waits[t] != RUNNING) continue;
      progress = true;
      current = t;
      swapcontext(&scheduler, &contexts[t]);
    }
    if (!progress) return false;
    if (all(0, threads, BARRIER)) std::fill_n(waits, threads, RUNNING);
    for (int warp = 0; warp < threads; warp += 32)
      if (all(warp, warp + 32, SHUFFLE)) std::fill_n(waits + warp, 32, RUNNING);
  }
  return true;
}
float exchange(float x, int lane) {
  const int me = current, slot = turn[me]++ & 1;
  mailbox[slot][me] = x;
  wait(SHUFFLE);
  return mailbox[slot][(me & ~31) | lane];
}
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
