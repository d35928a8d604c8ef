// Grid (Hkv * CHUNKS, work items, 1) groups of WARPS * 32 threads.
//
// Flash decoding over a block table: a group attends with up to R query rows of one KV head over the
// tokens [start, end) of one work item, and writes their normalised output with its base-2
// log-sum-exp (SPLIT), or the final output. Query rows of a KV head are its G query heads times Q
// tokens; CHUNKS groups share them where they are more than R.
//
// A warp is 32 / LANES teams. A team reads TOKENS rows of K and of V a trip, 8 elements a lane, and
// keeps a softmax of its own; teams meet in shared memory at the end. The R * TOKENS scores of a trip
// are summed over the team by halves, so that each lane ends up with one of them, whose token and
// row its seat tells: an exponential is taken once, and fetched by those who need it.
//
// Of codes (codes.h) a team computes with the codes alone: what measures a token comes to its scores and
// weights, by the lanes that have these. Queries are rotated as the K are that they meet.
//
// With WRITE the K and V of the Q new tokens go into the pool first, each in the items that attend
// over it. MLX takes inputs for constant and does not know: what orders this write among all who
// read and write the pool is that each of them takes an output of the one before (`after`).
constexpr float LOG2E = 1.44269504f;
// Finite stand-ins for -infinity: a maximum over nothing, and below it a score that never counts.
constexpr float NOTHING = -1e30f, MASKED = -2e30f;
constexpr int ROWS = G * Q;
constexpr int TEAMS = 32 / LANES, PARTS = WARPS * TEAMS, TRIP = PARTS * TOKENS;
constexpr int PER_TOKEN = LANES / TOKENS, COPIES = PER_TOKEN / R;  // seats of a token; of a score

const int warp = thread_id / 32, lane = thread_id % 32;
const int team = lane / LANES, seat = lane % LANES;
const int part = warp * TEAMS + team;
const int head = group_x / CHUNKS, first_row = group_x % CHUNKS * R;
const bool active = D == LANES * 8 || seat * 8 < D;
const int column = active ? seat * 8 : 0;

const float scale = as_float(plan[0]), softcap = as_float(plan[1]);
const int window = plan[2];
auto item = plan + 8 + 4 * group_y;
// All sequences may have grown since the work was cut, and with them the items at their ends.
const int sequence = item[0], context = item[3] + advance;
const int end = item[2] == item[3] ? context : int(item[2]);
// Blocks that left the window since the work was cut may be others' by now.
const int seen_from = WINDOW ? max(context - Q + 1 - window, 0) / BLOCK_SIZE * BLOCK_SIZE : 0;
const int start = max(int(item[1]), seen_from);
auto table = block_tables + size_t(sequence) * max_blocks;
// In elements or, of codes, words.
constexpr int KEY_WIDTH = KEY_BITS ? D * KEY_BITS / 32 : D, VALUE_WIDTH = VALUE_BITS ? D * VALUE_BITS / 32 : D;
constexpr int KEY_ROW = HKV * KEY_WIDTH, VALUE_ROW = HKV * VALUE_WIDTH;
constexpr int KEY_BLOCK = BLOCK_SIZE * (KEY_ROW + (KEY_BITS ? HKV : 0));
constexpr int VALUE_BLOCK = BLOCK_SIZE * (VALUE_ROW + (VALUE_BITS ? HKV : 0));
auto key_rows = keys + head * KEY_WIDTH + column * KEY_WIDTH / D;
auto value_rows = values + head * VALUE_WIDTH + column * VALUE_WIDTH / D;

#if WRITE
const int oldest_new = context - Q, first_new = max(start, oldest_new);
#if KEY_BITS == 0 || VALUE_BITS == 0
for (int i = thread_id; i < (end - first_new) * D; i += WARPS * 32) {
  const uint token = first_new + i / D;
  const size_t slot = size_t(table[token / BLOCK_SIZE]) * BLOCK_SIZE + token % BLOCK_SIZE;
  const size_t to = (slot * HKV + head) * D + i % D;
  const size_t from = (size_t(sequence * HKV + head) * Q + token - oldest_new) * D + i % D;
#if KEY_BITS == 0
  writable(keys)[to] = new_keys[from];
#endif
#if VALUE_BITS == 0
  writable(values)[to] = new_values[from];
#endif
}
#endif
#if KEY_BITS || VALUE_BITS
for (int i = 0; i < end - first_new; i += PARTS) {  // as often for every lane
  const uint token = min(first_new + i + part, end - 1);
  const bool writes = i + part < end - first_new;
  const int to = table[token / BLOCK_SIZE], offset = token % BLOCK_SIZE;
  const size_t from = (size_t(sequence * HKV + head) * Q + token - oldest_new) * D + column;
#if KEY_BITS
  encode<KEY_BITS, KEY_BITS == 4>(new_keys + from, keys, to, offset, head, seat, writes);
#endif
#if VALUE_BITS
  encode<VALUE_BITS, false>(new_values + from, values, to, offset, head, seat, writes);
#endif
}
#endif
#endif

float query[R][8], total[R][8];
UNROLL for (int r = 0; r < R; ++r) {
  const int row = ROWS % R == 0 ? first_row + r : min(first_row + r, ROWS - 1);
  unpack(load(queries + (size_t(sequence * HKV + head) * ROWS + row) * D + column), query[r]);
  UNROLL for (int i = 0; i < 8; ++i) {
    query[r][i] *= active ? scale * (SOFTCAP ? 1.0f : LOG2E) : 0.0f;
    total[r][i] = 0.0f;
  }
#if KEY_BITS == 4
  rotate(query[r], seat);
#endif
}

const int own_token = seat / PER_TOKEN;
const int own_row = min(first_row + seat / COPIES % R, ROWS - 1);
const int position = context - Q + own_row % Q;  // of the query token
float slope = 0.0f;
#if ALIBI
slope = float(slopes[head * G + own_row / Q]) * LOG2E;
#endif
float top = NOTHING, sum = 0.0f;
#if KEY_BITS
float query_sum = 0.0f;  // of the own row
UNROLL for (int r = 0; r < R; ++r) {
  float row_sum = query[r][0];
  UNROLL for (int i = 1; i < 8; ++i) row_sum += query[r][i];
  UNROLL for (int distance = 1; distance < LANES; distance *= 2) row_sum += lane_xor(row_sum, distance);
  if (r == seat / COPIES % R) query_sum = row_sum;
}
auto key_measures = keys + BLOCK_SIZE * KEY_ROW + head * BLOCK_SIZE;
#endif
#if VALUE_BITS
float lowest = 0.0f;  // that all elements of V have, by weight
auto value_measures = values + BLOCK_SIZE * VALUE_ROW + head * BLOCK_SIZE;
#endif
#if BLOCK_SIZE % TOKENS == 0
int block = table[uint(min(start + part * TOKENS, end - 1)) / BLOCK_SIZE];  // of the coming trip
#endif

for (int trip = start; trip < end; trip += TRIP) {  // the same trips for every lane
  const int base = trip + part * TOKENS;
#if WRITE
  if (trip + TRIP > oldest_new) pool_barrier();
#endif
  decltype(load(keys, Codes<KEY_BITS>())) raw_key[TOKENS];
  decltype(load(values, Codes<VALUE_BITS>())) raw_value[TOKENS];
  // Past the end the last token is read again, so that stale slots are never touched. K comes in an
  // order of the seat's own, which spares the first sums a selection.
#if BLOCK_SIZE % TOKENS == 0
  const uint first = min(base, end - 1);
  const size_t now = block;
  const int offset = first % BLOCK_SIZE, last = max(end - 1 - base, 0);
  block = table[uint(min(base + TRIP, end - 1)) / BLOCK_SIZE];
  auto key_row = key_rows + (now * KEY_BLOCK + offset * KEY_ROW);
  auto value_row = value_rows + (now * VALUE_BLOCK + offset * VALUE_ROW);
  UNROLL for (int t = 0; t < TOKENS; ++t)
    raw_key[t] = load(key_row + min(t ^ own_token, last) * KEY_ROW, Codes<KEY_BITS>());
  UNROLL for (int t = 0; t < TOKENS; ++t)
    raw_value[t] = load(value_row + min(t, last) * VALUE_ROW, Codes<VALUE_BITS>());
  const int own_offset = offset + min(own_token, last);
#else
  UNROLL for (int t = 0; t < 2 * TOKENS; ++t) {
    const uint token = min(base + (t < TOKENS ? t ^ own_token : t - TOKENS), end - 1);
    const size_t from = table[token / BLOCK_SIZE];
    const int offset = token % BLOCK_SIZE;
    if (t < TOKENS)
      raw_key[t % TOKENS] = load(key_rows + (from * KEY_BLOCK + offset * KEY_ROW), Codes<KEY_BITS>());
    else
      raw_value[t % TOKENS] = load(value_rows + (from * VALUE_BLOCK + offset * VALUE_ROW), Codes<VALUE_BITS>());
  }
  const uint own = min(base + own_token, end - 1);
  const size_t now = table[own / BLOCK_SIZE];
  const int own_offset = own % BLOCK_SIZE;
#endif
#if KEY_BITS
  const uint key_measure = key_measures[now * KEY_BLOCK + own_offset];
#endif
#if VALUE_BITS
  const uint value_measure = value_measures[now * VALUE_BLOCK + own_offset];
#endif

  float scores[TOKENS * R];
  UNROLL for (int t = 0; t < TOKENS; ++t) {
    float key[8];
    unpack(raw_key[t], key);
    UNROLL for (int r = 0; r < R; ++r) {
      float dot = query[r][0] * key[0];
      UNROLL for (int i = 1; i < 8; ++i) dot = fma(query[r][i], key[i], dot);
      scores[t * R + r] = dot;
    }
  }
  UNROLL for (int halving = 1; halving <= LOG2_LANES; ++halving) {
    const int distance = LANES >> halving, kept = TOKENS * R >> halving;
    UNROLL for (int j = 0; j < max(kept, 1); ++j) {
      if (kept >= R) {
        scores[j] += lane_xor(scores[j + kept], distance);
      } else if (kept > 0) {
        const bool upper = seat & distance;
        const float mine = upper ? scores[j + kept] : scores[j];
        scores[j] = mine + lane_xor(upper ? scores[j] : scores[j + kept], distance);
      } else {
        scores[0] += lane_xor(scores[0], distance);
      }
    }
  }

  const int token = base + own_token;
  float score = scores[0];
#if KEY_BITS
  score = fma(half_number(key_measure), score, half_number(key_measure >> 16) * query_sum);
#endif
  if (SOFTCAP) {
    // tanh(x) = 1 - 2 / (exp(2 x) + 1)
    const float e = exp2_fast(2.0f * LOG2E * score / softcap);
    score = softcap * LOG2E * (1.0f - 2.0f / (e + 1.0f));
  }
  if (ALIBI) score += slope * float(token - position);
  bool seen = token < end;
  if (Q > 1) seen = seen && token <= position;
  if (WINDOW) seen = seen && token > position - window;
  score = seen ? score : MASKED;

  float high = max(top, score);
  UNROLL for (int halving = 1; 1 << halving <= TOKENS; ++halving)
    high = max(high, lane_xor(high, LANES >> halving));
  if (warp_any(high > top)) {
    const float shrink = exp2_fast(top - high);
    UNROLL for (int r = 0; r < R; ++r) {
      const float shrink_row = TEAM_FROM(shrink, r * COPIES);
      UNROLL for (int i = 0; i < 8; ++i) total[r][i] *= shrink_row;
    }
    sum *= shrink;
#if VALUE_BITS
    lowest *= shrink;
#endif
    top = high;
  }
  const float weight = exp2_fast(score - top);
  sum += weight;
#if VALUE_BITS
  lowest = fma(weight, half_number(value_measure >> 16), lowest);
  const float heavy = weight * half_number(value_measure);
#else
  const float heavy = weight;
#endif

  UNROLL for (int t = 0; t < TOKENS; ++t) {
    float value[8];
    unpack(raw_value[t], value);
    UNROLL for (int r = 0; r < R; ++r) {
      const float w = TEAM_FROM(heavy, t * PER_TOKEN + r * COPIES);
      UNROLL for (int i = 0; i < 8; ++i) total[r][i] = fma(w, value[i], total[r][i]);
    }
  }
}
UNROLL for (int halving = 1; 1 << halving <= TOKENS; ++halving)
  sum += lane_xor(sum, LANES >> halving);
#if VALUE_BITS
UNROLL for (int halving = 1; 1 << halving <= TOKENS; ++halving)
  lowest += lane_xor(lowest, LANES >> halving);
UNROLL for (int r = 0; r < R; ++r) {
  const float lowest_row = TEAM_FROM(lowest, r * COPIES);
  UNROLL for (int i = 0; i < 8; ++i) total[r][i] += lowest_row;
}
#endif

SHARED float tops[R][PARTS], sums[R][PARTS], parts[PARTS][D];
if (seat < PER_TOKEN && seat % COPIES == 0) {
  tops[seat / COPIES][part] = top;
  sums[seat / COPIES][part] = sum;
}
group_barrier();
UNROLL for (int r = 0; r < R; ++r) {
  const int row = first_row + r;
  float highest = NOTHING, weights = 0.0f;
  for (int p = 0; p < PARTS; ++p) highest = max(highest, tops[r][p]);
  for (int p = 0; p < PARTS; ++p) weights += sums[r][p] * exp2_fast(tops[r][p] - highest);
  const float mine = exp2_fast(tops[r][part] - highest);
  if (active) {
    UNROLL for (int i = 0; i < 8; ++i) parts[part][column + i] = total[r][i] * mine;
  }
  group_barrier();
  if (row < ROWS) {
    const int output_row = head * ROWS + row;
#if SINKS
    weights += exp2_fast(float(sinks[head * G + row / Q]) * LOG2E - highest);
#endif
    for (int d = thread_id; d < D; d += WARPS * 32) {
      float out = 0.0f;
      for (int p = 0; p < PARTS; ++p) out += parts[p][d];
      out = weights == 0.0f ? 0.0f : out / weights;
      const int block_row = SPLIT ? group_y : sequence;
      outputs[(size_t(block_row) * HKV * ROWS + output_row) * D + d] = OUT(out);
    }
    if (SPLIT && thread_id == 0) {
      const size_t rows = size_t(plan[4]) * HKV * ROWS;
      outputs[rows * D + size_t(group_y) * HKV * ROWS + output_row] =
          OUT(weights == 0.0f ? NOTHING : highest + log2_fast(weights));
    }
  }
  group_barrier();
}
