// What the kernels' Metal text uses of Metal, declared for a compiler that knows address spaces
// (C++ for OpenCL). Nothing here runs: it checks types, const and address spaces as Metal would.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
// Metal's constant is read-only memory of its own; a pointer to it is no pointer to device memory.
#undef as_float

struct bfloat16_t {
  ushort bits;
  explicit bfloat16_t(float x);
  bfloat16_t() = default;
  operator float() const __generic;
};

template <typename To, typename From>
To as_type(From x) {
  return __builtin_astype(x, To);
}
float simd_shuffle_xor(float x, ushort mask);
float simd_shuffle(float x, ushort lane);
bool simd_any(bool x);
namespace fast {
float exp2(float x);
float log2(float x);
}  // namespace fast
enum class mem_flags { mem_threadgroup, mem_device };
void threadgroup_barrier(mem_flags flags);
