// Grid (copies, BLOCK_SIZE, 1) groups of WARPS * 32 threads.
//
// Copies blocks of the pool, a part each: copies[2 * i] is read and copies[2 * i + 1] written, and no
// block is both. The output is for who comes next to take; see split.h on order.
const size_t from = size_t(copies[2 * group_x]) * BLOCK_SIZE + group_y;
const size_t to = size_t(copies[2 * group_x + 1]) * BLOCK_SIZE + group_y;
for (int i = thread_id; i < KEY_PART; i += WARPS * 32)
  writable(keys)[to * KEY_PART + i] = keys[from * KEY_PART + i];
for (int i = thread_id; i < VALUE_PART; i += WARPS * 32)
  writable(values)[to * VALUE_PART + i] = values[from * VALUE_PART + i];
if (group_x == 0 && group_y == 0 && thread_id < 8) outputs[thread_id] = OUT(0.0f);
