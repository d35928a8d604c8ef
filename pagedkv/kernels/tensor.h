// Grid (Hkv * CHUNKS, work items, 1) groups of WARPS * 32 threads.
//
// What split.h does, over pools of codes and on CUDA's matrix units, which multiply codes as float16.
// A warp takes 16 tokens a trip and up to 8 query rows, the columns of both products: K times queries, by
// 16 elements a step, and V times weights, by 16 tokens. Which element is which is free, so a lane has
// those that lie together: of K D / 4 of two tokens, of V D / 8 of four.
//
// Codes come as 1024 and their steps. Of K that is taken from the sums: 1024 times the sum of the query.
// Weights have in them the step of their token's V, over the largest step so far.
//
// What the next trip needs is read before this one is computed if there are registers for it (AHEAD),
// else K while V are multiplied, and V while K are.
constexpr float LOG2E = 1.44269504f, NOTHING = -1e30f, MASKED = -2e30f;
constexpr int ROWS = G * Q, R = 8, TILE = 16, TRIP = WARPS * TILE;
constexpr int KEY_WIDTH = D * KEY_BITS / 32, VALUE_WIDTH = D * VALUE_BITS / 32;  // words of a row
constexpr int KEY_ROW = HKV * KEY_WIDTH, VALUE_ROW = HKV * VALUE_WIDTH;
constexpr int KEY_BLOCK = BLOCK_SIZE * (KEY_ROW + HKV), VALUE_BLOCK = BLOCK_SIZE * (VALUE_ROW + HKV);
constexpr int KEY_WORDS = KEY_WIDTH / 4, VALUE_WORDS = VALUE_WIDTH / 8;  // of a lane and token
constexpr int STEPS = D / 16, COLUMNS = D / 8;
constexpr bool AHEAD = (KEY_BITS + VALUE_BITS) * D <= 8 * 128;

const int warp = thread_id / 32, lane = thread_id % 32;
const int row = lane / 4, quad = lane % 4;  // of a product: a query row, and which of its columns
const int seat = lane % LANES, team = thread_id / LANES;  // of rows as they lie in memory
const int head = group_x / CHUNKS, first_row = group_x % CHUNKS * R;

const float softcap = as_float(plan[1]), scale = as_float(plan[0]) * (SOFTCAP ? 1.0f : LOG2E);
const int window = plan[2];
auto item = plan + 8 + 4 * group_y;
// All sequences may have grown since the work was cut, and with them the items at their ends.
const int sequence = item[0], context = item[3] + advance;
const int end = item[2] == item[3] ? context : int(item[2]);
const int seen_from = WINDOW ? max(context - Q + 1 - window, 0) / BLOCK_SIZE * BLOCK_SIZE : 0;
const int start = max(int(item[1]), seen_from);
auto table = block_tables + size_t(sequence) * max_blocks;

#if WRITE
const int oldest_new = context - Q, first_new = max(start, oldest_new);
for (int i = 0; i < end - first_new; i += WARPS * 32 / LANES) {  // as often for every lane
  const uint token = min(first_new + i + team, end - 1);
  const bool writes = i + team < end - first_new;
  const int to = table[token / BLOCK_SIZE], offset = token % BLOCK_SIZE;
  const size_t from = (size_t(sequence * HKV + head) * Q + token - oldest_new) * D + seat * 8;
  encode<KEY_BITS, KEY_BITS == 4>(new_keys + from, keys, to, offset, head, seat, writes);
  encode<VALUE_BITS, false>(new_values + from, values, to, offset, head, seat, writes);
}
#endif

SHARED uint2 queries_by_lane[STEPS][32];  // as the products take them
SHARED float2 sums_of_queries[R];  // with what codes have too much; as they are
for (int r = team; r < R; r += WARPS * 32 / LANES) {
  const int own = min(first_row + r, ROWS - 1);
  float numbers[8], stored = 0.0f, all = 0.0f;
  unpack(load(queries + (size_t(sequence * HKV + head) * ROWS + own) * D + seat * 8), numbers);
  if (KEY_BITS == 4) rotate(numbers, seat);
  UNROLL for (int i = 0; i < 8; i += 2) {
    const float share = KEY_BITS == 4 && i % 4 ? 16.0f : 1.0f;  // these codes come times 16
    const __half2 pair = __floats2half2_rn(numbers[i] / share, numbers[i + 1] / share);
    const int element = (seat * 8 + i) % (D / 4);
    uint2& own_pairs = queries_by_lane[element / 4][r * 4 + seat * 8 / (D / 4)];
    (element % 4 ? own_pairs.y : own_pairs.x) = bits_of_pair(pair);
    stored += __low2float(pair) + __high2float(pair);
    all += share * (__low2float(pair) + __high2float(pair));
  }
  UNROLL for (int distance = 1; distance < LANES; distance *= 2) {
    stored += lane_xor(stored, distance);
    all += lane_xor(all, distance);
  }
  if (seat == 0) sums_of_queries[r] = {1024.0f * stored, all};
}
pool_barrier();

float excess[2], query_sum[2], slope[2] = {};
int position[2];
UNROLL for (int j = 0; j < 2; ++j) {  // of the query rows whose scores the lane has
  const int r = 2 * quad + j, own = min(first_row + r, ROWS - 1);
  excess[j] = sums_of_queries[r].x;
  query_sum[j] = sums_of_queries[r].y;
  position[j] = context - Q + own % Q;
#if ALIBI
  slope[j] = float(slopes[head * G + own / Q]) * LOG2E;
#endif
}

auto key_words = keys + head * KEY_WIDTH + quad * KEY_WORDS;
auto value_words = values + head * VALUE_WIDTH + row * VALUE_WORDS;
auto key_measures = keys + BLOCK_SIZE * KEY_ROW + head * BLOCK_SIZE;
auto value_measures = values + BLOCK_SIZE * VALUE_ROW + head * BLOCK_SIZE;
struct Keys {
  uint words[2][KEY_WORDS], measures[2];  // of tokens row and row + 8
};
struct Values {
  uint words[4][VALUE_WORDS], measures[2];  // of tokens 2 * quad, 2 * quad + 1, and 8 later; as of K
};
// Past the end the last token is read again, so that stale slots are never touched.
auto read_keys = [&](int block, int offset, int last) {
  Keys read;
  UNROLL for (int i = 0; i < 2; ++i) {
    const int at = offset + min(row + 8 * i, last);
    load_words<KEY_WORDS>(key_words + (size_t(block) * KEY_BLOCK + at * KEY_ROW), read.words[i]);
    read.measures[i] = key_measures[size_t(block) * KEY_BLOCK + at];
  }
  return read;
};
auto read_values = [&](int block, int offset, int last) {
  Values read;
  UNROLL for (int i = 0; i < 4; ++i) {
    const int at = offset + min(2 * quad + i % 2 + i / 2 * 8, last);
    load_words<VALUE_WORDS>(value_words + (size_t(block) * VALUE_BLOCK + at * VALUE_ROW), read.words[i]);
  }
  UNROLL for (int i = 0; i < 2; ++i)
    read.measures[i] = value_measures[size_t(block) * VALUE_BLOCK + offset + min(row + 8 * i, last)];
  return read;
};

// By query row; of all tokens of the warp so far, or (sum, lowest) of the lane's.
float top[2] = {NOTHING, NOTHING}, sum[2] = {}, lowest[2] = {}, total[COLUMNS / 2][4] = {};
float largest = 0.0f, share = 0.0f;  // step of V, and 1 over it
int base = start + warp * TILE;
int block = table[uint(min(base, end - 1)) / BLOCK_SIZE], offset = base % BLOCK_SIZE, last = end - 1 - base;
int next_block = table[uint(min(base + TRIP, end - 1)) / BLOCK_SIZE];
Keys key, next_key;
Values value, next_value;
if (base < end) {
  key = read_keys(block, offset, last);
  value = read_values(block, offset, last);
}
for (; base < end; base += TRIP) {  // each warp by itself
  const int coming = base + TRIP;
  block = next_block;
  offset = coming % BLOCK_SIZE;
  last = end - 1 - coming;
  next_block = table[uint(min(coming + TRIP, end - 1)) / BLOCK_SIZE];
  if (AHEAD && coming < end) {
    next_key = read_keys(block, offset, last);
    next_value = read_values(block, offset, last);
  }

  float score[4] = {};  // of tokens row and row + 8 by query rows 2 * quad and 2 * quad + 1
  UNROLL for (int step = 0; step < STEPS; ++step) {
    uint codes[4];
    unpack_columns<KEY_BITS>(key.words[0], step, codes[0], codes[2]);
    unpack_columns<KEY_BITS>(key.words[1], step, codes[1], codes[3]);
    const uint2 query = queries_by_lane[step][lane];
    multiply(score, codes, query.x, query.y);
  }
  float high[2] = {top[0], top[1]};
  UNROLL for (int i = 0; i < 4; ++i) {
    const int j = i % 2, token = base + row + i / 2 * 8;
    const float step = half_number(key.measures[i / 2]), low = half_number(key.measures[i / 2] >> 16);
    score[i] = scale * fma(step, score[i] - excess[j], low * query_sum[j]);
    if (SOFTCAP) {
      const float e = exp2_fast(2.0f * LOG2E * score[i] / softcap);
      score[i] = softcap * LOG2E * (1.0f - 2.0f / (e + 1.0f));
    }
    if (ALIBI) score[i] += slope[j] * float(token - position[j]);
    bool seen = token < end;
    if (Q > 1) seen = seen && token <= position[j];
    if (WINDOW) seen = seen && token > position[j] - window;
    score[i] = seen ? score[i] : MASKED;
    high[j] = max(high[j], score[i]);
  }
  if (!AHEAD && coming < end) key = read_keys(block, offset, last);

  const float steps[2] = {half_number(value.measures[0]), half_number(value.measures[1])};
  float larger = max(largest, max(steps[0], steps[1]));
  if (warp_any(high[0] > top[0] || high[1] > top[1] || larger > largest)) {
    UNROLL for (int distance = 4; distance < 32; distance *= 2) {
      high[0] = max(high[0], lane_xor(high[0], distance));
      high[1] = max(high[1], lane_xor(high[1], distance));
      larger = max(larger, lane_xor(larger, distance));
    }
    const float fewer = larger > 0.0f ? largest / larger : 1.0f;
    UNROLL for (int j = 0; j < 2; ++j) {
      const float shrink = exp2_fast(top[j] - high[j]);
      sum[j] *= shrink;
      lowest[j] *= shrink;
      UNROLL for (int i = 0; i < COLUMNS / 2; ++i) {
        total[i][j] *= shrink * fewer;
        total[i][2 + j] *= shrink * fewer;
      }
      top[j] = high[j];
    }
    largest = larger;
    share = largest > 0.0f ? 1.0f / largest : 0.0f;
  }
  uint weights[2];
  UNROLL for (int i = 0; i < 2; ++i) {
    const float low = half_number(value.measures[i] >> 16);
    float weight[2];
    UNROLL for (int j = 0; j < 2; ++j) {
      weight[j] = exp2_fast(score[2 * i + j] - top[j]);
      sum[j] += weight[j];
      lowest[j] = fma(weight[j], low, lowest[j]);
      weight[j] *= steps[i] * share;
    }
    weights[i] = transposed(bits_of_pair(__floats2half2_rn(weight[0], weight[1])));
  }
  UNROLL for (int some = 0; some < COLUMNS; some += 4) {
    uint codes[2][4];  // of 4 elements of V: those of two, of all 4 tokens
    unpack_tokens<VALUE_BITS>(value.words[0], value.words[1], some, codes[0][0], codes[0][1], codes[1][0], codes[1][1]);
    unpack_tokens<VALUE_BITS>(value.words[2], value.words[3], some, codes[0][2], codes[0][3], codes[1][2], codes[1][3]);
    multiply(total[some / 2], codes[0], weights[0], weights[1]);
    multiply(total[some / 2 + 1], codes[1], weights[0], weights[1]);
  }
  if (AHEAD) {
    key = next_key;
    value = next_value;
  } else if (coming < end) {
    value = read_values(block, offset, last);
  }
}
UNROLL for (int distance = 4; distance < 32; distance *= 2) {
  UNROLL for (int j = 0; j < 2; ++j) {
    sum[j] += lane_xor(sum[j], distance);
    lowest[j] += lane_xor(lowest[j], distance);
  }
}

SHARED float tops[R][WARPS], sums[R][WARPS], parts[WARPS][D];
if (row == 0) {
  UNROLL for (int j = 0; j < 2; ++j) {
    tops[2 * quad + j][warp] = top[j];
    sums[2 * quad + j][warp] = sum[j];
  }
}
group_barrier();
for (int r = 0; r < min(R, ROWS - first_row); ++r) {
  float highest = NOTHING, weights = 0.0f;
  for (int p = 0; p < WARPS; ++p) highest = max(highest, tops[r][p]);
  for (int p = 0; p < WARPS; ++p) weights += sums[r][p] * exp2_fast(tops[r][p] - highest);
  if (quad == r / 2) {
    const bool odd = r % 2;
    const float mine = exp2_fast((odd ? top[1] : top[0]) - highest), all = odd ? lowest[1] : lowest[0];
    UNROLL for (int i = 0; i < COLUMNS; ++i) {
      const float own = odd ? total[i / 2][i % 2 * 2 + 1] : total[i / 2][i % 2 * 2];
      parts[warp][row * COLUMNS + i] = fma(own, largest, all) * mine;
    }
  }
  group_barrier();
  const int output_row = head * ROWS + first_row + r;
#if SINKS
  weights += exp2_fast(float(sinks[head * G + (first_row + r) / Q]) * LOG2E - highest);
#endif
  for (int d = thread_id; d < D; d += WARPS * 32) {
    float out = 0.0f;
    for (int p = 0; p < WARPS; ++p) out += parts[p][d];
    out = weights == 0.0f ? 0.0f : out / weights;
    const int block_row = SPLIT ? group_y : sequence;
    outputs[(size_t(block_row) * HKV * ROWS + output_row) * D + d] = OUT(out);
  }
  if (SPLIT && thread_id == 0) {
    const size_t rows = size_t(plan[4]) * HKV * ROWS;
    outputs[rows * D + size_t(group_y) * HKV * ROWS + output_row] =
        OUT(weights == 0.0f ? NOTHING : highest + log2_fast(weights));
  }
  group_barrier();
}
