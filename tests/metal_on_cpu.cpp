// What all kernels share, compiled once. A thread of a group is a fiber, which runs until it has to
// wait for the others at a shuffle or a barrier. Each time, the fibers of a group take their turns in
// another random order, so that a missing barrier shows.
#define _XOPEN_SOURCE 700
#undef _FORTIFY_SOURCE  // which refuses to jump to another stack
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "metal_on_cpu.h"

half::operator float() const {
  const uint sign = uint(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return as_type<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = std::ldexp(float(rest & 0x3ff) + (rest >> 10 ? 1024 : 0),
                                max(int(rest >> 10), 1) - 25);
  return sign ? -size : size;
}
half::half(float x) {
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

namespace fibers {
constexpr int MOST = 1024, STACK = 1 << 16;
ucontext_t contexts[MOST];
// Where a fiber waits, and where `resume` does. A jump is quick: `swapcontext` calls the system.
jmp_buf places[MOST], scheduler;
bool started[MOST];
Wait waits[MOST];
int current, turn[MOST];
float mailbox[2][MOST];
alignas(16) char stacks[MOST][STACK];
Kernel kernel;
void** buffers;
uint3 group;

void wait(Wait why) {
  waits[current] = why;
  if (!_setjmp(places[current])) _longjmp(scheduler, 1);
}
// A fiber lives on from one group to the next.
void live() {
  for (;;) {
    kernel(buffers, group, {uint(current), 0, 0});
    wait(DONE);
  }
}
// Let a fiber run until it waits.
void resume(int fiber) {
  current = fiber;
  if (_setjmp(scheduler)) return;
  if (started[fiber]) _longjmp(places[fiber], 1);
  started[fiber] = true;
  ucontext_t& context = contexts[fiber];
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[fiber];
  context.uc_stack.ss_size = STACK;
  makecontext(&context, live, 0);
  setcontext(&context);
}
// Run one group; false if its threads wait for each other at different places.
bool run(int threads, std::mt19937& random) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::fill_n(turn, threads, 0);
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
      resume(t);
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

// Run a kernel over a grid of groups; 1 if the threads of a group hang.
extern "C" int launch(Kernel kernel, void** buffers, const int* groups, int threads, int seed) {
  std::mt19937 random(seed);
  fibers::kernel = kernel;
  fibers::buffers = buffers;
  for (uint z = 0; z < groups[2]; ++z)
    for (uint y = 0; y < groups[1]; ++y)
      for (uint x = 0; x < groups[0]; ++x) {
        fibers::group = {x, y, z};
        if (fibers::run(threads, random)) continue;
        std::fill_n(fibers::started, fibers::MOST, false);  // they are in the middle of a kernel
        return 1;
      }
  return 0;
}
