// Grid (ceil(length / TOKENS), rows, 1) groups of WARPS * 32 threads.
//
// Copies K and V of consecutive tokens through block tables into contiguous arrays, [rows, HKV, length, D]
// each. A group copies TOKENS tokens, all heads: it reads a pool in the order in which it lies there. Codes
// become numbers on the way. The rows are `tiles` of each sequence from `first_sequence` on, whose contexts
// have `context` tokens: a tile begins `tile` tokens after the one before, and none goes past `end`. With
// SPANS each row is (sequence, first token, tokens, context length) of its own. What is left of `length`
// becomes zeros, since a masked V still has to be a number.
//
// With QUERIES query tokens from `first_query` on are copied, too, `tile` for each row: out of
// [B, Q, HQ, D] into [rows, tile, HQ, D].
//
// With WRITE the Q = `new_tokens` newest tokens of a sequence come from `new_keys` and `new_values`, [B, Q, HKV, D],
// and go into the pool, too; see split.h on order. Rows may share new tokens: they write the same. Where a
// pool has codes the copy has what they stand for, of new tokens as of others.
#if SPANS
const int sequence = spans[4 * group_y], first_token = spans[4 * group_y + 1], tokens = spans[4 * group_y + 2];
const int oldest_new = spans[4 * group_y + 3] - new_tokens;
#else
const int part = group_y % tiles, sequence = first_sequence + group_y / tiles;
const int first_token = begin + part * tile, tokens = min(first_token + length, end) - first_token;
const int oldest_new = context - new_tokens;
#endif
auto table = block_tables + size_t(sequence) * max_blocks;
#if KEY_BITS || VALUE_BITS
constexpr int SEATS = LANES, NUMBERS = 8;
#else
constexpr int SEATS = D / VECTOR, NUMBERS = VECTOR;
#endif
#if VECTOR == 1
using Unit = T;
#define UNITS_OF(array) array
#else
using Unit = uint4;
#define UNITS_OF(array) ((const device uint4*)array)
#endif
constexpr int UNITS = NUMBERS / VECTOR, ROW_UNITS = D / VECTOR;

for (int base = 0; base < TOKENS * HKV * SEATS; base += WARPS * 32) {  // as often for every lane
  const int i = base + thread_id, place = group_x * TOKENS + i / (HKV * SEATS);
  const int head = i / SEATS % HKV, seat = i % SEATS;
  const bool inside = i < TOKENS * HKV * SEATS && place < length && seat * NUMBERS < D;
  const bool held = inside && place < tokens;
  const int token = first_token + min(place, tokens - 1);
  const int block = table[uint(token) / BLOCK_SIZE], offset = uint(token) % BLOCK_SIZE;
  const size_t to = ((size_t(group_y) * HKV + head) * length + place) * ROW_UNITS + seat * UNITS;
  const size_t slot = ((size_t(block) * BLOCK_SIZE + offset) * HKV + head) * ROW_UNITS + seat * UNITS;
#if WRITE
  const bool fresh = token >= oldest_new;
  const size_t from = (size_t(sequence) * new_tokens + max(token - oldest_new, 0)) * HKV + head;
#else
  constexpr bool fresh = false;
#endif
#if KEY_BITS == 0
  if (inside) {
    UNROLL for (int u = 0; u < UNITS; ++u) {
      Unit x = Unit();
#if WRITE
      if (held && fresh) {
        x = UNITS_OF(new_keys)[from * ROW_UNITS + seat * UNITS + u];
        ((device Unit*)writable(keys))[slot + u] = x;
      }
#endif
      if (held && !fresh) x = UNITS_OF(keys)[slot + u];
      ((device Unit*)gathered_keys)[to + u] = x;
    }
  }
#endif
#if VALUE_BITS == 0
  if (inside) {
    UNROLL for (int u = 0; u < UNITS; ++u) {
      Unit x = Unit();
#if WRITE
      if (held && fresh) {
        x = UNITS_OF(new_values)[from * ROW_UNITS + seat * UNITS + u];
        ((device Unit*)writable(values))[slot + u] = x;
      }
#endif
      if (held && !fresh) x = UNITS_OF(values)[slot + u];
      ((device Unit*)gathered_values)[to + u] = x;
    }
  }
#endif
#if KEY_BITS || VALUE_BITS
  const int column = seat * 8 < D ? seat * 8 : 0;
#endif
#if KEY_BITS
  float key[8];
  decode<KEY_BITS, KEY_BITS == 4>(keys, block, offset, head, seat, key);
#if WRITE
  if (warp_any(held && fresh)) {
    float made[8];
    unpack(load(new_keys + from * D + column), made);
    encode<KEY_BITS, KEY_BITS == 4>(made, keys, block, offset, head, seat, held && fresh);
    if (KEY_BITS == 4) rotate(made, seat);
    UNROLL for (int n = 0; n < 8; ++n) key[n] = fresh ? made[n] : key[n];
  }
#endif
  if (inside) store((device T*)gathered_keys + to * VECTOR, key, held);
#endif
#if VALUE_BITS
  float value[8];
  decode<VALUE_BITS, false>(values, block, offset, head, seat, value);
#if WRITE
  if (warp_any(held && fresh)) {
    float made[8];
    unpack(load(new_values + from * D + column), made);
    encode<VALUE_BITS, false>(made, values, block, offset, head, seat, held && fresh);
    UNROLL for (int n = 0; n < 8; ++n) value[n] = fresh ? made[n] : value[n];
  }
#endif
  if (inside) store((device T*)gathered_values + to * VECTOR, value, held);
#endif
}
#if QUERIES
const int own_query = first_query + part * tile, own_queries = min(tile, past_query - own_query);
constexpr int QUERY_UNITS = HQ * ROW_UNITS;
for (int i = thread_id; i < TOKENS * QUERY_UNITS; i += WARPS * 32) {
  const int place = group_x * TOKENS + i / QUERY_UNITS, unit = i % QUERY_UNITS;
  if (place >= tile) break;
  Unit x = Unit();
  if (place < own_queries)
    x = UNITS_OF(queries)[(size_t(sequence) * new_tokens + own_query + place) * QUERY_UNITS + unit];
  ((device Unit*)gathered_queries)[(size_t(group_y) * tile + place) * QUERY_UNITS + unit] = x;
}
#endif
if (group_x == 0 && group_y == 0 && thread_id < 8) done[thread_id] = T(0.0f);
