// K and V in few bits: what a team of lanes with eight numbers each makes of a row of D.
//
// A block of a pool of codes, words of 32 bits: the codes of its tokens, [BLOCK_SIZE, HKV, D * BITS / 32],
// then [HKV, BLOCK_SIZE] words of a step and the lowest number, float16 each. A number is the lowest
// and as many steps as its code says. Codes of 4 bits hold elements 2 i and 2 i + 1 of eight in bits
// 4 i and 16 + 4 i.
constexpr float LARGEST = 65504.0f;

// Multiplies by a Hadamard matrix of the largest power of two in D, which is its own inverse: a row
// without large elements loses less, and products of two rows stay what they are.
FUNCTION void rotate(thread float* x, int seat) {
  constexpr int SIZE = D & -D;
  constexpr float ROOT = SIZE == 8 ? 0.353553391f : SIZE == 16 ? 0.25f : SIZE == 32 ? 0.176776695f
      : SIZE == 64 ? 0.125f : SIZE == 128 ? 0.0883883476f : 0.0625f;
  UNROLL for (int half_size = 1; half_size < 8; half_size *= 2) {
    UNROLL for (int i = 0; i < 8; ++i) {
      if (i & half_size) continue;
      const float a = x[i], b = x[i + half_size];
      x[i] = a + b;
      x[i + half_size] = a - b;
    }
  }
  UNROLL for (int distance = 1; distance < SIZE / 8; distance *= 2) {
    UNROLL for (int i = 0; i < 8; ++i) {
      const float other = lane_xor(x[i], distance);
      x[i] = seat & distance ? other - x[i] : x[i] + other;
    }
  }
  UNROLL for (int i = 0; i < 8; ++i) x[i] *= ROOT;
}

// Returns the step and the lowest number of a row that the `active` lanes of a team have: no numbers
// if one of it is not finite.
FUNCTION uint measure(thread float* x, int levels, bool active) {
  float low = active ? x[0] : LARGEST, high = active ? x[0] : -LARGEST;
  float none = 0.0f;
  UNROLL for (int i = 0; i < 8; ++i) {
    none = !active || x[i] - x[i] == 0.0f ? none : 1.0f;
    low = active ? min(low, x[i]) : low;
    high = active ? max(high, x[i]) : high;
  }
  UNROLL for (int distance = 1; distance < LANES; distance *= 2) {
    low = min(low, lane_xor(low, distance));
    high = max(high, lane_xor(high, distance));
    none = max(none, lane_xor(none, distance));
  }
  if (none > 0.0f) return 0x7e007e00u;
  const uint lowest = half_bits(max(min(low, LARGEST), -LARGEST));
  const float range = max(max(min(high, LARGEST), -LARGEST) - half_number(lowest), 0.0f);
  return half_bits(range / float(levels)) | lowest << 16;
}

FUNCTION uint code(float x, uint word, int levels) {
  const float step = half_number(word), low = half_number(word >> 16);
  const float steps = step > 0.0f ? nearest((x - low) / step) : 0.0f;
  return uint(max(min(steps, float(levels)), 0.0f));
}

// Where a token's row of a head lies in a pool, and the word that measures it.
template <int BITS>
FUNCTION size_t codes_of(int block, int offset, int head) {
  constexpr int WIDTH = D * BITS / 32;
  return size_t(block) * (BLOCK_SIZE * HKV * (WIDTH + 1)) + (offset * HKV + head) * WIDTH;
}
template <int BITS>
FUNCTION size_t measure_of(int block, int offset, int head) {
  return codes_of<BITS>(block, BLOCK_SIZE, 0) + head * BLOCK_SIZE + offset;
}

// Puts a new row, eight numbers of which a lane has, into a pool, if it `writes`: all lanes of a warp come
// here. Leaves in `row` what its codes stand for, rotated if that is how they are kept.
template <int BITS, bool ROTATED>
FUNCTION void encode(
    thread float* row, const device uint* pool, int block, int offset, int head, int seat, bool writes) {
  const bool active = D == LANES * 8 || seat * 8 < D;
  if (ROTATED) rotate(row, seat);
  constexpr int LEVELS = (1 << BITS) - 1, WORDS = BITS / 4;
  const uint word = measure(row, LEVELS, active);
  uint made[WORDS] = {};
  UNROLL for (int i = 0; i < 8; ++i) {
    const int place = BITS == 8 ? 8 * (i % 4) : i / 2 * 4 + i % 2 * 16;
    const uint steps = code(row[i], word, LEVELS);
    made[BITS == 8 ? i / 4 : 0] |= steps << place;
    row[i] = fma(float(steps), half_number(word), half_number(word >> 16));
  }
  if (!writes || !active) return;
  device uint* to = writable(pool);
  UNROLL for (int i = 0; i < WORDS; ++i)
    to[codes_of<BITS>(block, offset, head) + seat * WORDS + i] = made[i];
  if (seat == 0) to[measure_of<BITS>(block, offset, head)] = word;
}
template <int BITS, bool ROTATED, typename E>
FUNCTION void encode(
    const device E* from, const device uint* pool, int block, int offset, int head, int seat, bool writes) {
  float row[8];
  unpack(load(from), row);
  encode<BITS, ROTATED>(row, pool, block, offset, head, seat, writes);
}

// Fetches eight numbers of a row that codes stand for; all lanes of a warp come here.
template <int BITS, bool ROTATED>
FUNCTION void decode(const device uint* pool, int block, int offset, int head, int seat, thread float* row) {
  const int own = D == LANES * 8 || seat * 8 < D ? seat : 0;
  unpack(load(pool + codes_of<BITS>(block, offset, head) + own * (BITS / 4), Codes<BITS>()), row);
  const uint word = pool[measure_of<BITS>(block, offset, head)];
  const float step = half_number(word), low = half_number(word >> 16);
  UNROLL for (int i = 0; i < 8; ++i) row[i] = fma(row[i], step, low);
  if (ROTATED) rotate(row, seat);
}

#ifdef MATRIX
// For tensor.h, which only CUDA has.
FUNCTION uint bits_of_pair(__half2 pair) {
  return reinterpret_cast<const uint&>(pair);
}
template <int WORDS>
FUNCTION void load_words(const uint* from, uint* to) {
  if constexpr (WORDS % 4 == 0) {
    UNROLL for (int i = 0; i < WORDS; i += 4) {
      const uint4 x = stream(from + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  } else if constexpr (WORDS == 2) {
    const Codes<8> x = load(from, Codes<8>());
    to[0] = x.low, to[1] = x.high;
  } else {
    to[0] = load(from, Codes<4>()).bits;
  }
}
// sums [16, 8] += rows [16, 16] times columns [16, 8], in float16.
FUNCTION void multiply(float* sums, const uint* rows, uint first, uint second) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(first), "r"(second));
}
// A matrix [8, 8] in float16, two of a row in each lane.
FUNCTION uint transposed(uint x) {
  uint y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// Codes in the digits of 1024 in float16.
constexpr uint BASE = 0x64006400u;
FUNCTION uint less_base(uint pair, float factor, float base) {
  const __half2 numbers = reinterpret_cast<const __half2&>(pair);
  return bits_of_pair(__hfma2(numbers, __float2half2_rn(factor), __float2half2_rn(base)));
}
// Four codes of one token, from 4 * step on, and 1024; of 4 bits the latter two times 16.
template <int BITS>
FUNCTION void unpack_columns(const uint* words, int step, uint& first, uint& second) {
  if constexpr (BITS == 8) {
    first = __byte_perm(words[step], BASE, 0x5150);
    second = __byte_perm(words[step], BASE, 0x5352);
  } else {
    const uint word = words[step / 2] >> (step % 2 * 8);
    first = (word & 0x000f000fu) | BASE;
    second = (word & 0x00f000f0u) | BASE;
  }
}
// Four codes of each of two tokens, from `some` on, as pairs of both.
template <int BITS>
FUNCTION void unpack_tokens(
    const uint* one, const uint* other, int some, uint& first, uint& second, uint& third, uint& fourth) {
  if constexpr (BITS == 8) {
    const uint low = __byte_perm(one[some / 4], other[some / 4], 0x5140);
    const uint high = __byte_perm(one[some / 4], other[some / 4], 0x7362);
    first = less_base(__byte_perm(low, BASE, 0x5150), 1.0f, -1024.0f);
    second = less_base(__byte_perm(low, BASE, 0x5352), 1.0f, -1024.0f);
    third = less_base(__byte_perm(high, BASE, 0x5150), 1.0f, -1024.0f);
    fourth = less_base(__byte_perm(high, BASE, 0x5352), 1.0f, -1024.0f);
  } else {
    const uint shift = some % 8 * 2;
    const uint even = __byte_perm(one[some / 8], other[some / 8], 0x5410) >> shift;
    const uint odd = __byte_perm(one[some / 8], other[some / 8], 0x7632) >> shift;
    first = less_base((even & 0x000f000fu) | BASE, 1.0f, -1024.0f);
    second = less_base((odd & 0x000f000fu) | BASE, 1.0f, -1024.0f);
    third = less_base((even & 0x00f000f0u) | BASE, 0.0625f, -64.0f);
    fourth = less_base((odd & 0x00f000f0u) | BASE, 0.0625f, -64.0f);
  }
}
#endif
