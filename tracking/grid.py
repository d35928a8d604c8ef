"""Which cells of which benchmarks a run asks for."""

import itertools
import re

from benchmarks.common import PARAM_NAMES, QUICK_BLOCK_SIZES, QUICK_CONTEXTS

# The quick grid measures old commits by these alone; every path of today is measured at HEAD.
HISTORY = (
    "host.NumPy.",
    "overhead.Auto.",
    "append.Auto.",
    "prefill.Write.",
    "prefix_cache.Match.",
    "scheduler.Decode.",
    "step.Host.",
    "step.Instructions.",
)


def cells(benchmark):
    """Return the parameter combinations of a benchmark as asv orders and names them."""
    return list(itertools.product(*benchmark["params"]))


def in_quick_grid(cell, names):
    """Whether a cell, as asv names it, is measured in the quick grid; all are off the big grid."""
    if names != PARAM_NAMES:
        return True
    _, context, block_size = cell
    return int(context) in QUICK_CONTEXTS and int(block_size) in QUICK_BLOCK_SIZES


def asked(benchmark, grid):
    """Return the cells of a benchmark that belong to a grid; some have none in the quick one."""
    names = benchmark["param_names"]
    return [cell for cell in cells(benchmark) if grid == "full" or in_quick_grid(cell, names)]


def selection(benchmark, grid):
    """Return asv's options that run the cells of one benchmark that belong to a grid."""
    name = re.escape(benchmark["name"])
    if grid == "full" or not benchmark["params"]:
        return ["--bench", rf"^{name}(\(|$)"]
    labels = "|".join(re.escape(", ".join(cell)) for cell in asked(benchmark, grid))
    return ["--bench", rf"^{name}\(({labels})\)$"] if labels else []


def in_quick_run(names, is_head):
    """Return the benchmarks of a commit that the quick grid asks for.

    None of the experiments that settled a decision is among them.
    """
    if is_head:
        return [name for name in names if not name.startswith("settled.")]
    return [name for name in names if name.startswith(HISTORY)]


def in_one_run(names, grid):
    """Group benchmarks by asv run, which takes seconds to start and saves when it is through."""
    if grid == "full":
        return [[name] for name in names]
    return [list(group) for _, group in itertools.groupby(names, lambda name: name.split(".")[0])]
