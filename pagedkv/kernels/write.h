// Grid (tokens, 1, 1) groups of WARPS * 32 threads.
//
// Puts the K and V of new tokens, [tokens, HKV * D] each, into their slots of the pool. The output is
// for who comes next to take; see split.h on order.
constexpr int ROW = HKV * D;
const size_t from = size_t(group_x) * ROW;
#if KEY_BITS == 0 || VALUE_BITS == 0
const size_t to = size_t(slots[group_x]) * ROW;
for (int i = thread_id; i < ROW; i += WARPS * 32) {
#if KEY_BITS == 0
  writable(keys)[to + i] = new_keys[from + i];
#endif
#if VALUE_BITS == 0
  writable(values)[to + i] = new_values[from + i];
#endif
}
#endif
#if KEY_BITS || VALUE_BITS
const int lane = thread_id % 32, seat = lane % LANES, part = thread_id / LANES;
const bool active = D == LANES * 8 || seat * 8 < D;
const int column = active ? seat * 8 : 0;
const int block = slots[group_x] / BLOCK_SIZE, offset = slots[group_x] % BLOCK_SIZE;
for (int first = 0; first < HKV; first += WARPS * 32 / LANES) {  // as often for every lane
  const int head = min(first + part, HKV - 1);
  const bool writes = first + part < HKV;
#if KEY_BITS
  encode<KEY_BITS, KEY_BITS == 4>(new_keys + from + head * D + column, keys, block, offset, head, seat, writes);
#endif
#if VALUE_BITS
  encode<VALUE_BITS, false>(new_values + from + head * D + column, values, block, offset, head, seat, writes);
#endif
}
#endif
if (group_x == 0 && thread_id < 8) outputs[thread_id] = OUT(0.0f);
