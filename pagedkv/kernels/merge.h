// Grid (Hq * Q, B, 1) groups of WARPS * 32 threads.
//
// Joins the partial outputs of a query row by their base-2 log-sum-exps; a sink adds to the sum of
// weights and to nothing else.
constexpr float LOG2E = 1.44269504f, NOTHING = -1e30f;
constexpr int ROWS = HKV * G * Q;
constexpr int COLUMNS = (D + 31) / 32;

const int warp = thread_id / 32, lane = thread_id % 32;
const int row = group_x, sequence = group_y;
const int items = plan[4];
auto items_of = plan + 8 + 4 * items + 2 * sequence;
const int first = items_of[0], last = items_of[1];
auto lse = partials + size_t(items) * ROWS * D;

float highest = NOTHING;
for (int item = first + lane; item < last; item += 32)
  highest = max(highest, lse[size_t(item) * ROWS + row]);
UNROLL for (int halving = 0; halving < 5; ++halving)
  highest = max(highest, lane_xor(highest, 1 << halving));
float sink = NOTHING;
#if SINKS
sink = float(sinks[row / Q]) * LOG2E;
#endif
highest = max(highest, sink);

float total[COLUMNS] = {0.0f}, sum = 0.0f;
for (int item = first + warp; item < last; item += WARPS) {
  const float weight = exp2_fast(lse[size_t(item) * ROWS + row] - highest);
  auto partial = partials + (size_t(item) * ROWS + row) * D;
  sum += weight;
  UNROLL for (int c = 0; c < COLUMNS; ++c) {
    const int d = c * 32 + lane;
    if (D % 32 == 0 || d < D) total[c] = fma(weight, partial[d], total[c]);
  }
}

SHARED float totals[WARPS][COLUMNS * 32], sums[WARPS];
UNROLL for (int c = 0; c < COLUMNS; ++c) totals[warp][c * 32 + lane] = total[c];
if (lane == 0) sums[warp] = sum;
group_barrier();
float weights = SINKS ? exp2_fast(sink - highest) : 0.0f;
UNROLL for (int w = 0; w < WARPS; ++w) weights += sums[w];
for (int d = thread_id; d < D; d += WARPS * 32) {
  float out = 0.0f;
  UNROLL for (int w = 0; w < WARPS; ++w) out += totals[w][d];
  outputs[(size_t(sequence) * ROWS + row) * D + d] = OUT(out / weights);
}
