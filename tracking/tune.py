"""Measure on this machine's GPU how the fused kernels should be cut up and when to use them.

`make tune` prints, for the suite's heads and dtype and blocks of 32, each candidate's time over
contiguous SDPA, then the constants `TUNING` and the table `AUTO` of the package to commit. A sample
is a decode step of several layers, evaluated once, between two steps over contiguous K/V.

On a GPU that nobody has measured it fills the user's cache folder for the grid on the way, as the
first calls of these kinds would.
"""

import argparse
import math
import statistics
import sys

import mlx.core as mx

from benchmarks.common import DTYPE, SCALE, layers, workload
from benchmarks.ratio import ratios
from pagedkv import decode_attention, explain
from pagedkv.attention.fused import TUNING, Tuning, make_plan
from pagedkv.attention.paths import AUTO, backend_of
from pagedkv.attention.scores import PLAIN

BLOCK_SIZE = 32


def _mean(values):
    """Return the geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _named(path):
    """Return what makes, for a cell, the call of a layer over a decode path."""

    def of_cell(cell):
        return lambda q, k, v: decode_attention(q, k, v, cell.batch, scale=SCALE, path=path)

    return of_cell


def _tuned(tuning):
    """Return what makes, for a cell, the call of a layer over kernels with some constants."""

    def of_cell(cell):
        shapes = cell.queries.shape, cell.layers[0].key_pool.shape
        backend = backend_of(mx.default_device())
        plan = make_plan(cell.batch, backend, *shapes, DTYPE, SCALE, PLAIN, tuning)
        return lambda q, k, v: plan.attend(q, k, v, PLAIN)

    return of_cell


def auto_of(cell):
    """Return what "auto" is for a cell, and why; measured and kept where nobody has."""
    layer = cell.layers[0]
    told = explain(cell.queries, layer.key_pool, layer.value_pool, cell.batch, scale=SCALE)
    return f"auto is {told.path}, {told.because}"


def over_contiguous(cell, attend, samples):
    """Return the median of a paged step's time over that of a contiguous one.

    `attend` takes queries, keys and values of a layer.
    """

    def paged():
        out = cell.queries
        for layer in cell.layers:
            out = attend(out, layer.key_pool, layer.value_pool)
        mx.eval(out)

    return statistics.median(ratios(paged, cell.contiguous, repeat=samples, warmup_time=0))


def thresholds(tokens, over, slack=0.05):
    """Return up to how many tokens which path is chosen, (limit, path), the last without limit.

    Parameters
    ----------
    tokens : sequence of int
        Batch times context of each cell.
    over : dict of str to sequence of float
        Time of each path over contiguous SDPA by cell; the first path is kept where it is no
        slower than the fastest by more than `slack`.
    """
    favourite = next(iter(over))
    chosen = []
    for cell in sorted(range(len(tokens)), key=lambda cell: tokens[cell]):
        best = min(over, key=lambda path: over[path][cell])
        if over[favourite][cell] <= (1 + slack) * over[best][cell]:
            best = favourite
        chosen.append((float(tokens[cell]), best))
    table = [
        (limit, path)
        for (limit, path), after in zip(chosen, [*chosen[1:], (math.inf, "")], strict=True)
        if path != after[1]
    ]
    return [*table[:-1], (math.inf, table[-1][1])]


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.tune", description=__doc__)
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
    over = {name: [] for name in candidates}
    sizes = []
    for batch in args.batches:
        for context in args.contexts:
            where = batch, context, BLOCK_SIZE
            cell = workload(*where, num_layers=layers(*where), order="random")
            sizes.append(batch * context)
            print(f"batch {batch}, {context} tokens: {auto_of(cell)}", flush=True)
            for name, of_cell in candidates.items():
                try:
                    ratio = over_contiguous(cell, of_cell(cell), args.samples)
                except RuntimeError as error:  # more threads than this GPU gives a group
                    print(f"{name}: {error}")
                    ratio = math.inf
                over[name].append(ratio)
                print(f"batch {batch}, {context} tokens, {name}: {ratio:.3f}", flush=True)
    print("\nover contiguous, geometric mean, worst:")
    for name in sorted(candidates, key=lambda name: _mean(over[name])):
        print(f"  {name}: {_mean(over[name]):.3f}, {max(over[name]):.3f}")
    best = tunings[min(range(len(tunings)), key=lambda i: _mean(list(over.values())[i]))]
    table = thresholds(sizes, {path: over[path] for path in paths})
    print(f"\nTUNING[{backend!r}] = {best}   # is {base}")
    print(f"AUTO[{backend!r}] = {tuple(table)}   # is {AUTO[backend]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
