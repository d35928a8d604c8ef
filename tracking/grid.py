"""Which cells of which benchmarks a run asks for.

`quick` is the headline alone, in the cells of `QUICK`; `short` is every benchmark at short contexts
in blocks of 32 tokens; `full` is everything.
"""

import itertools
import platform
import re

from benchmarks.common import BATCHES, PARAM_NAMES, SHORT_BLOCK_SIZES, SHORT_CONTEXTS
from tracking.results import ATTENTION, FIRST, STEP, TOKENS

GRIDS = ("quick", "short", "full")

_SHORT = list(itertools.product(BATCHES, SHORT_CONTEXTS, SHORT_BLOCK_SIZES))
# The headline: attention and a decode step over contiguous ones, first token and tokens a second
# over mlx-lm's. On two cores these cells of a commit take 20 seconds, 55 where it has mlx-lm.
QUICK = {
    "cpu": {
        ATTENTION: [(1, 1024, 32), (1, 4096, 32)],
        STEP: [(1, 1024, 32)],
        FIRST: [(512,)],
        TOKENS: [(1, 512)],
    },
    "gpu": {
        ATTENTION: _SHORT,
        STEP: _SHORT,
        FIRST: [(512,), (2048,), (8192,)],
        TOKENS: list(itertools.product([1, 8], [512, 4096])),
    },
}
# The short grid lacks these: they settled a decision, or take a CPU half a minute a cell.
NOT_SHORT = (
    "settled.",
    "prompt.Attention",
    "prompt.Bits.",
    "prompt.Chunk.",
    "prompt.FirstToken.ratio_null",
    "prompt.Windows.",
    "trace.Served.",
)
HOST_SHARE = ".track_host_share"  # takes the set-up of a ratio once more


def device_of(backend):
    """Return the kind of device, "cpu" or "gpu", that a backend of MLX runs on here."""
    return "cpu" if backend == "cpu" and platform.system() != "Darwin" else "gpu"


def cells(benchmark):
    """Return the parameter combinations of a benchmark as asv orders and names them."""
    return list(itertools.product(*benchmark["params"]))


def series_name(name, cell):
    """Return what asv calls a cell of a benchmark."""
    return f"{name}({', '.join(cell)})" if cell else name


def asked(benchmark, grid, device=None):
    """Return the cells of a benchmark, as asv names them, that a grid asks for.

    The quick grid depends on the kind of device, "cpu" or "gpu".
    """
    name, params = benchmark["name"], benchmark["param_names"]
    if grid == "quick":
        return [tuple(map(str, cell)) for cell in QUICK[device].get(name, [])]
    every = cells(benchmark)
    if grid == "full":
        return every
    if name.startswith(NOT_SHORT) or name.endswith(HOST_SHARE):
        return []
    if not {*PARAM_NAMES} <= {*params}:
        return every
    context, block_size = map(params.index, PARAM_NAMES[1:])
    return [
        cell
        for cell in every
        if int(cell[context]) in SHORT_CONTEXTS and int(cell[block_size]) in SHORT_BLOCK_SIZES
    ]


def selection(benchmark, grid, device=None):
    """Return asv's options that run what a grid asks for of a benchmark: none for nothing."""
    found, name = asked(benchmark, grid, device), re.escape(benchmark["name"])
    if not found:
        return []
    if len(found) == len(cells(benchmark)):
        return ["--bench", rf"^{name}(\(|$)"]
    labels = "|".join(re.escape(", ".join(cell)) for cell in found)
    return ["--bench", rf"^{name}\(({labels})\)$"]
