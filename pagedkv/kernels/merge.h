// Grid (Hq * Q, B, 1) groups of WARPS * 32 threads.
//
// Joins the partial outputs of a query row by their base-2 log-sum-exps; a sink adds to the sum of
// weights and to nothing else. Each warp joins every WARPS-th item, and the warps meet in shared
// memory. `spans` is the number of all items, and from 2 on the first item of each sequence and the
// one past its last.
constexpr float LOG2E = 1.44269504f, NOTHING = -1e30f;
constexpr int ROWS = HKV * G * Q;
constexpr int COLUMNS = (D + 31) / 32;

const int warp = thread_id / 32, lane = thread_id % 32;
const int row = group_x, sequence = group_y;
const int first = spans[2 + 2 * sequence], last = spans[3 + 2 * sequence];
auto lse = partials + size_t(spans[0]) * ROWS * D;

float top = NOTHING, sum = 0.0f, total[COLUMNS] = {0.0f};
for (int item = first + warp; item < last; item += WARPS) {
  const size_t own_row = size_t(item) * ROWS + row;
  const float own = lse[own_row];
  float partial[COLUMNS];
  UNROLL for (int c = 0; c < COLUMNS; ++c) {
    const int d = c * 32 + lane;
    partial[c] = D % 32 == 0 || d < D ? partials[own_row * D + d] : 0.0f;
  }
  const float high = max(top, own);
  const float shrink = exp2_fast(top - high), weight = exp2_fast(own - high);
  top = high;
  sum = sum * shrink + weight;
  UNROLL for (int c = 0; c < COLUMNS; ++c) total[c] = fma(weight, partial[c], total[c] * shrink);
}

SHARED float totals[WARPS][COLUMNS * 32], tops[WARPS], sums[WARPS];
UNROLL for (int c = 0; c < COLUMNS; ++c) totals[warp][c * 32 + lane] = total[c];
if (lane == 0) {
  tops[warp] = top;
  sums[warp] = sum;
}
group_barrier();
float highest = NOTHING;
#if SINKS
const float sink = float(sinks[row / Q]) * LOG2E;
highest = sink;
#endif
UNROLL for (int w = 0; w < WARPS; ++w) highest = max(highest, tops[w]);
float weights = 0.0f, factors[WARPS];
#if SINKS
weights = exp2_fast(sink - highest);
#endif
UNROLL for (int w = 0; w < WARPS; ++w) {
  factors[w] = exp2_fast(tops[w] - highest);
  weights = fma(sums[w], factors[w], weights);
}
for (int d = thread_id; d < D; d += WARPS * 32) {
  float out = 0.0f;
  UNROLL for (int w = 0; w < WARPS; ++w) out = fma(totals[w][d], factors[w], out);
  outputs[(size_t(sequence) * ROWS + row) * D + d] = OUT(out / weights);
}
