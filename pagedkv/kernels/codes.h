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
// if one of it is none.
FUNCTION uint measure(thread float* x, int levels, bool active) {
  float low = active ? x[0] : LARGEST, high = active ? x[0] : -LARGEST;
  float none = 0.0f;
  UNROLL for (int i = 0; i < 8; ++i) {
    none = x[i] == x[i] ? none : 1.0f;
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
  const float range = max(high - half_number(lowest), 0.0f);
  return half_bits(min(range / float(levels), LARGEST)) | lowest << 16;
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

// Puts a team's row into a pool, if it `writes`: all lanes of a warp come here.
template <int BITS>
FUNCTION void encode(
    thread float* row, const device uint* pool, int block, int offset, int head, int seat, bool writes) {
  const bool active = D == LANES * 8 || seat * 8 < D;
  constexpr int LEVELS = (1 << BITS) - 1, WORDS = BITS / 4;
  const uint word = measure(row, LEVELS, active);
  uint made[WORDS] = {};
  UNROLL for (int i = 0; i < 8; ++i) {
    const int place = BITS == 8 ? 8 * (i % 4) : i / 2 * 4 + i % 2 * 16;
    made[BITS == 8 ? i / 4 : 0] |= code(row[i], word, LEVELS) << place;
  }
  if (!writes || !active) return;
  device uint* to = writable(pool);
  UNROLL for (int i = 0; i < WORDS; ++i)
    to[codes_of<BITS>(block, offset, head) + seat * WORDS + i] = made[i];
  if (seat == 0) to[measure_of<BITS>(block, offset, head)] = word;
}
