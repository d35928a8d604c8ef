"""Measure on this machine's GPU how the fused kernels should be cut up and when to use them.

``python -m pagedkv.tune`` prints, for float16 and 32 query and 8 KV heads of 128, each candidate's
time over contiguous SDPA, then the constants for `pagedkv.fused.TUNING` and the table for
`pagedkv.paths.AUTO` to commit. A sample is a step of several layers, evaluated once, between two
steps over contiguous K/V.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.calls import contiguous_attention, decode_attention
from pagedkv.attention.fused import TUNING, Plan, Tuning, make_plan
from pagedkv.attention.paths import AUTO, backend_of
from pagedkv.attention.scores import PLAIN

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 32
SCALE = HEAD_DIM**-0.5
STEP_BYTES = 2**31  # of K and V in the layers of a step: more than caches hold
LAYERS = 8, 32  # fewest and most: launching and awaiting a step must not be what is measured

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]


@dataclass
class Cell:
    """A batch of equal contexts in several layers, contiguous and paged."""

    batch: int
    context: int
    queries: mx.array
    step: DecodeBatch
    contiguous: list[tuple[mx.array, mx.array]]
    paged: list[tuple[mx.array, mx.array]]

    @classmethod
    def make(cls, batch: int, context: int) -> Cell:
        """Build seeded inputs, evaluated; the blocks lie in random order in a pool twice as big."""
        blocks = -(-context // BLOCK_SIZE)
        num_blocks = 2 * batch * blocks
        ids = np.random.default_rng(0).permutation(num_blocks)[: batch * blocks]
        step = DecodeBatch.from_tables(
            list(ids.reshape(batch, blocks)),
            [context] * batch,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
        )
        mx.random.seed(0)

        def noise(*shape: int) -> tuple[mx.array, mx.array]:
            made = [mx.random.uniform(-1, 1, shape, dtype=mx.float16) for _ in "kv"]
            mx.eval(made)
            return made[0], made[1]

        size = 4 * batch * context * KV_HEADS * HEAD_DIM  # bytes of K and V
        layers = max(LAYERS[0], min(LAYERS[1], STEP_BYTES // size))
        return cls(
            batch,
            context,
            noise(batch, HEADS, 1, HEAD_DIM)[0],
            step,
            [noise(batch, KV_HEADS, context, HEAD_DIM) for _ in range(layers)],
            [noise(num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in range(layers)],
        )

    def plan(self, tuning: Tuning) -> Plan:
        """Plan the fused path with some constants."""
        shapes = self.queries.shape, self.paged[0][0].shape
        backend = backend_of(mx.default_device())
        return make_plan(self.step, backend, *shapes, mx.float16, SCALE, PLAIN, tuning)

    def over_contiguous(self, attend: Attend, samples: int) -> float:
        """Return the median of a paged step's time over that of a contiguous one."""

        def contiguous(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return contiguous_attention(q, k, v, scale=SCALE)

        def seconds(attend: Attend, layers: list[tuple[mx.array, mx.array]]) -> float:
            start = time.perf_counter()
            out = self.queries
            for keys, values in layers:
                out = attend(out, keys, values)
            mx.eval(out)
            return time.perf_counter() - start

        for _ in range(2):
            seconds(attend, self.paged)
        before = seconds(contiguous, self.contiguous)
        ratios = []
        for _ in range(samples):
            took = seconds(attend, self.paged)
            after = seconds(contiguous, self.contiguous)
            ratios.append(2 * took / (before + after))
            before = after
        return statistics.median(ratios)


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _named(path: str) -> Callable[[Cell], Attend]:
    def of_cell(cell: Cell) -> Attend:
        return lambda q, k, v: decode_attention(q, k, v, cell.step, scale=SCALE, path=path)

    return of_cell


def _tuned(tuning: Tuning) -> Callable[[Cell], Attend]:
    def of_cell(cell: Cell) -> Attend:
        attend = cell.plan(tuning).attend
        return lambda q, k, v: attend(q, k, v, None, None)

    return of_cell


def thresholds(
    tokens: Sequence[int], ratios: dict[str, Sequence[float]], slack: float = 0.05
) -> list[tuple[float, str]]:
    """Return up to how many tokens which path is chosen, (limit, path), the last without limit.

    Parameters
    ----------
    tokens : sequence of int
        Batch times context of each cell.
    ratios : dict of str to sequence of float
        Time of each path over contiguous SDPA by cell; the first path is kept where it is no
        slower than the fastest by more than `slack`.
    """
    favourite = next(iter(ratios))
    chosen = []
    for cell in sorted(range(len(tokens)), key=lambda cell: tokens[cell]):
        best = min(ratios, key=lambda path: ratios[path][cell])
        if ratios[favourite][cell] <= (1 + slack) * ratios[best][cell]:
            best = favourite
        chosen.append((float(tokens[cell]), best))
    table = [
        (limit, path)
        for (limit, path), after in zip(chosen, [*chosen[1:], (math.inf, "")], strict=True)
        if path != after[1]
    ]
    return [*table[:-1], (math.inf, table[-1][1])]


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m pagedkv.tune", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--groups", type=int, nargs="+", default=[66, 132, 264, 528, 1056])
    parser.add_argument("--samples", type=int, default=9)
    args = parser.parse_args()
    device = mx.default_device()
    backend = backend_of(device)
    if backend == "cpu":
        sys.exit("expected a GPU to tune the fused kernels for, this is MLX for the CPU")
    base = TUNING[backend]
    tunings = [
        Tuning(warps, base.heavy_warps, groups, base.fewest, base.merge_warps)
        for warps in args.warps
        for groups in args.groups
    ]
    paths = ["fused", "gather_rows", "gather_block_major"]
    candidates = {
        **{f"{t.warps} warps, {t.groups} groups": _tuned(t) for t in tunings},
        **{path: _named(path) for path in paths},
    }
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    sizes = []
    for batch in args.batches:
        for context in args.contexts:
            cell = Cell.make(batch, context)
            sizes.append(batch * context)
            for name, of_cell in candidates.items():
                try:
                    ratio = cell.over_contiguous(of_cell(cell), args.samples)
                except RuntimeError as error:  # more threads than this GPU gives a group
                    print(f"{name}: {error}")
                    ratio = math.inf
                ratios[name].append(ratio)
                print(f"batch {batch}, {context} tokens, {name}: {ratio:.3f}", flush=True)
    print("\nover contiguous, geometric mean, worst:")
    for name in sorted(candidates, key=lambda name: _mean(ratios[name])):
        print(f"  {name}: {_mean(ratios[name]):.3f}, {max(ratios[name]):.3f}")
    best = tunings[min(range(len(tunings)), key=lambda i: _mean(list(ratios.values())[i]))]
    table = thresholds(sizes, {path: ratios[path] for path in paths})
    print(f"\nTUNING[{backend!r}] = {best}   # is {base}")
    print(f"AUTO[{backend!r}] = {tuple(table)}   # is {AUTO[backend]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
