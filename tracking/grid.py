"""Which cells of which benchmarks a run asks for.

The grid "full" is all of them, "quick" a few contexts at one block size. "history" is what a quick
run asks of old commits: a few benchmarks, and those whose cells take ten seconds and more at the
shortest context.
"""

import itertools
import re

from benchmarks.common import PARAM_NAMES, QUICK_BLOCK_SIZES, QUICK_CONTEXTS

# A quick run measures old commits by these alone; every path of today is measured at HEAD.
HISTORY = (
    "host.NumPy.",
    "host.PlanAllocated.",
    "host.PlanInstructions.",
    "host.PlanRetired.",
    "overhead.Auto.",
    "append.Auto.",
    "prefill.Write.",
    "prefix_cache.Match.",
    "prompt.Cached.ratio_",
    "prompt.FirstToken.ratio_speed",
    "scheduler.Decode.",
    "scheduler.Instructions.",
    "scheduler.Allocated.",
    "scheduler.Retired.",
    "step.Auto.",
    "step.Host.",
    "step.Instructions.",
    "step.Allocated.",
    "step.Retired.",
)
# Of these, old commits are asked for one cell in a quick run: a prompt takes a CPU seconds.
SHORTEST = {"prompt.Cached.": ("448", "32"), "prompt.FirstToken.": ("512",)}
# Of these, a quick run asks for nothing: they take a CPU half a minute a cell and more.
LONG = (
    "prompt.Attention",
    "prompt.Bits.",
    "prompt.Chunk.",
    "prompt.FirstToken.ratio_null",
    "prompt.Windows.",
    "trace.Served.",
)
HOST_SHARE = ".track_host_share"  # takes the set-up of a ratio once more


def cells(benchmark):
    """Return the parameter combinations of a benchmark as asv orders and names them."""
    return list(itertools.product(*benchmark["params"]))


def series_name(name, cell):
    """Return what asv calls a cell of a benchmark."""
    return f"{name}({', '.join(cell)})" if cell else name


def belongs(cell, benchmark, grid):
    """Whether a cell, as asv names it, is measured in a grid; all are off the big grid."""
    names = benchmark["param_names"]
    if grid == "history":
        for prefix, shortest in SHORTEST.items():
            if benchmark["name"].startswith(prefix):
                return cell == shortest
    if grid == "full" or not {*PARAM_NAMES} <= {*names}:
        return True
    context, block_size = (cell[names.index(name)] for name in PARAM_NAMES[1:])
    short = grid == "history" and benchmark["name"].startswith("step.")
    contexts = QUICK_CONTEXTS[:1] if short else QUICK_CONTEXTS
    return int(context) in contexts and int(block_size) in QUICK_BLOCK_SIZES


def asked(benchmark, grid):
    """Return the cells of a benchmark that belong to a grid; some have none in the quick one."""
    return [cell for cell in cells(benchmark) if belongs(cell, benchmark, grid)]


def selection(benchmark, grid):
    """Return asv's options that run the cells of one benchmark that belong to a grid."""
    name = re.escape(benchmark["name"])
    if grid == "full" or not benchmark["params"]:
        return ["--bench", rf"^{name}(\(|$)"]
    labels = "|".join(re.escape(", ".join(cell)) for cell in asked(benchmark, grid))
    return ["--bench", rf"^{name}\(({labels})\)$"] if labels else []


def in_run(names, grid):
    """Return the benchmarks that a grid asks for.

    The experiments that settled a decision are in the full grid alone, and so is what takes long.
    """
    if grid == "full":
        return list(names)
    names = [name for name in names if not name.endswith(HOST_SHARE)]
    if grid == "quick":
        return [name for name in names if not name.startswith(("settled.", *LONG))]
    return [name for name in names if name.startswith(HISTORY)]


def in_one_run(names, grid):
    """Group benchmarks by asv run, which takes seconds to start and saves when it is through."""
    if grid == "full":
        return [[name] for name in names]
    return [list(group) for _, group in itertools.groupby(names, lambda name: name.split(".")[0])]
