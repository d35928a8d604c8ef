// Grid (tokens, 1, 1) groups of WARPS * 32 threads.
//
// Puts the K and V of new tokens, [tokens, HKV * D] each, into their slots of the pool. The output is
// for who comes next to take; see split.h on order.
constexpr int ROW = HKV * D;
const size_t to = size_t(slots[group_x]) * ROW, from = size_t(group_x) * ROW;
for (int i = thread_id; i < ROW; i += WARPS * 32) {
  WRITABLE(keys)[to + i] = new_keys[from + i];
  WRITABLE(values)[to + i] = new_values[from + i];
}
if (group_x == 0 && thread_id < 8) outputs[thread_id] = OUT(0.0f);
