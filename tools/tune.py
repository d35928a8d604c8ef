"""Measure on this machine's GPU how the fused kernels should be cut up and when to use them.

`make tune` prints, for the suite's heads and dtype and blocks of 32, each candidate's time over
contiguous SDPA, then the constants `TUNING` and the table `AUTO` of the package to commit. A sample
is a decode step of several layers, evaluated once, between two steps over contiguous K/V.
"""

import argparse
import itertools
import math
import statistics
import sys
from dataclasses import replace

import mlx.core as mx

from benchmarks.common import DTYPE, SCALE, layers, workload
from benchmarks.ratio import ratios
from pagedkv import decode_attention
from pagedkv.attention.cut import tuning_for
from pagedkv.attention.fused import make_plan
from pagedkv.attention.inputs import gpu_name
from pagedkv.attention.paths import AUTO, backend_of
from pagedkv.attention.scores import PLAIN

BLOCK_SIZE = 32


def _mean(values):
    """Return the geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def plan_of(cell, tuning):
    """Return the plan of the fused kernels for a cell with some constants."""
    shapes = cell.queries.shape, cell.layers[0].key_pool.shape
    backend = backend_of(mx.default_device())
    return make_plan(cell.batch, backend, *shapes, DTYPE, SCALE, PLAIN, tuning=tuning)


def candidates(base):
    """Return constants to try, by what they change of `base`."""
    sets = [base.warps, *((warps,) for warps in (4, 8, 16))]
    return {
        f"warps {warps}, processors x{more}, bandwidth x{faster}": replace(
            base,
            warps=warps,
            processors=max(1, round(base.processors * more)),
            bandwidth=base.bandwidth * faster,
        )
        for warps, more, faster in itertools.product(sets, (0.5, 1, 2), (0.5, 1, 2))
    }


def attend_of(cell, path):
    """Return what attends in a layer of a cell, over a named path or by a `plan_of`."""
    if isinstance(path, str):
        return lambda q, k, v: decode_attention(q, k, v, cell.batch, scale=SCALE, path=path)
    return lambda q, k, v: path.attend(q, k, v, PLAIN)


def over_contiguous(cell, path, samples):
    """Return the median of a paged step's time over that of a contiguous one."""
    attend = attend_of(cell, path)

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
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--samples", type=int, default=9)
    args = parser.parse_args()
    device = mx.default_device()
    backend = backend_of(device)
    if backend == "cpu":
        sys.exit("expected a GPU to tune the fused kernels for, this is MLX for the CPU")
    gpu = gpu_name(device.type)
    base = tuning_for(gpu, backend)
    tunings = candidates(base)
    paths = ["fused", "gather_rows", "gather_block_major"]
    over = {name: [] for name in (*tunings, *paths)}
    sizes = list(itertools.product(args.batches, args.contexts))
    for batch, context in sizes:
        where = batch, context, BLOCK_SIZE
        cell = workload(*where, num_layers=layers(*where), order="random")
        measured = {}  # by work: many candidates cut alike
        for name in over:
            path = plan_of(cell, tunings[name]) if name in tunings else name
            work = path if isinstance(path, str) else (path.warps, path.items)
            if work not in measured:
                try:
                    measured[work] = over_contiguous(cell, path, args.samples)
                except RuntimeError as error:  # more threads than this GPU gives a group
                    print(f"{name}: {error}")
                    measured[work] = math.inf
                print(f"batch {batch}, {context} tokens, {work}: {measured[work]:.3f}", flush=True)
            over[name].append(measured[work])
    print("\nover contiguous, geometric mean, worst:")
    for name in sorted(over, key=lambda name: _mean(over[name])):
        print(f"  {name}: {_mean(over[name]):.3f}, {max(over[name]):.3f}")
    best = tunings[min(tunings, key=lambda name: _mean(over[name]))]
    tokens = [batch * context for batch, context in sizes]
    table = thresholds(tokens, {path: over[path] for path in paths})
    print(f"\nTUNING[{gpu!r}] = {best}   # is {base}")
    print(f"AUTO[{backend!r}] = {tuple(table)}   # is {AUTO[backend]}")


if __name__ == "__main__":
    main()
