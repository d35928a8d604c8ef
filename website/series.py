"""What overhead.html shows of one machine, from its results.

A series is a benchmark's cell over all commits. Values are JSON: [value, low, high] or [value], a
word for what failed or why there is none, null where nothing was asked for.
"""

import math
import re
from pathlib import Path

from asv.console import log
from asv.util import UserError, load_json

from benchmarks.common import PARAM_NAMES, kv_bytes
from benchmarks.generate import BLOCK_SIZE, Decode
from tracking.grid import series_name
from tracking.noise import Noise, recorded_noise
from tracking.repository import commit_labels, subjects
from tracking.results import MISSING, NUMPY, RESULTS, measured, measured_commits
from tracking.tables import ADR, by_number

# The measures, as the page names them, in its order.
RATIOS = {
    "tokens": re.compile(r"generate\.(Decode)\.ratio_tokens_per_second"),
    "step": re.compile(r"step\.(Auto|Batch16)\.ratio_step_vs_contiguous"),
    "bound": re.compile(r"step\.(Bound|BoundBatch16)\.ratio_step_vs_bound"),
    "attention": re.compile(r"overhead\.(\w+)\.ratio_vs_contiguous"),
}
LARGER = {"tokens"}  # is better
TIME = re.compile(r"decode\.(\w+)\.time_decode")
BANDWIDTH = "memory.Bandwidth.track_bandwidth"
# What else a user of mlx-lm gets: the benchmark's parameters, and in words.
WITH_MLX_LM = {
    "generate.Skewed.ratio_tokens_per_second": (
        ["longest"],
        "tokens a second over mlx-lm's own caches, a sequence of {} tokens beside seven of a 16th",
    ),
    "server.Requests.ratio_requests_per_second": (
        ["clients"],
        "requests a second over mlx_lm.server, clients that share a system prompt: {}",
    ),
    "generate.FirstToken.ratio_first_token": (
        ["cached"],
        "time to the first token over that with none cached, {} tokens of the prompt cached",
    ),
    "generate.Forks.track_memory": (
        ["tokens", "grown"],
        "memory of 8 forks over that of one, {} tokens, each grown by {}",
    ),
}
RETIRED = "retired.txt"
"""In a machine's folder: why nobody measures on it now. The page says so, and shows it last."""


def path_of(name):
    """Return the decode path that a benchmark class is named after, or takes without saying."""
    if name in ("Batch16", "Bound", "BoundBatch16", "Decode"):
        return "auto"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def measure_of(name):
    """Return (measure, path) of a benchmark that the page shows, None of another."""
    for measure, pattern in {**RATIOS, "time": TIME}.items():
        if match := pattern.fullmatch(name):
            return measure, path_of(match[1])
    if name in WITH_MLX_LM:
        return "facts", "auto"
    return ("phase 0", "") if any(name in column.benchmarks for column in ADR) else None


def _number(value, digits):
    return float(f"{value:.{digits}g}")


def entry(value):
    """Return a Value as JSON."""
    if value.known:
        ends = value.low, value.high
        finite = all(map(math.isfinite, ends))
        return [_number(value.value, 6), *(_number(end, 5) for end in ends if finite)]
    return None if value is MISSING else value.show()


def _cells(tables, name):
    """Return the cells of a benchmark that have a number anywhere, as results name them."""
    known = {c for table in tables for c, value in table.get(name, {}).items() if value.known}
    return sorted(known, key=by_number)


def benchmarks_of(tables, noise):
    """Return what the page shows of tables by commit: a dictionary for each benchmark.

    `cells` are (batch, context, block size), of facts nothing; `values` are by cell and commit.
    `thresholds` of ratios are (factor, in words) by cell, from the machine's `noise`.

    Raises
    ------
    ValueError
        If results have cells of another kind than the suite's.
    """
    shown = []
    for name in dict.fromkeys([*WITH_MLX_LM, *(name for table in tables for name in table)]):
        kind = measure_of(name)
        cells = kind and _cells(tables, name)
        if not cells:
            continue
        measure, path = kind
        params = Decode.param_names if measure == "tokens" else PARAM_NAMES
        params, words = WITH_MLX_LM.get(name, (params, ""))
        one = {"name": name, "measure": measure, "path": path, "params": params}
        sizes = [[int(x) for x in cell] for cell in cells]
        if len(sizes[0]) != len(params):
            raise ValueError(f"expected {', '.join(params)} of {name}, got {', '.join(cells[0])}")
        if measure == "facts":
            one["what"] = [words.format(*cell) for cell in cells]
        if measure == "tokens":
            sizes = [[*size, BLOCK_SIZE] for size in sizes]
        if measure in RATIOS:
            found = [noise.threshold(series_name(name, cell)) for cell in cells]
            one["thresholds"] = [[_number(t.factor, 4), t.show()] for t in found]
        if measure == "time":
            one["bytes"] = [kv_bytes(*size) for size in sizes]
        values = [[entry(t.get(name, {}).get(cell, MISSING)) for t in tables] for cell in cells]
        shown.append({**one, "cells": sizes, "values": values})
    return shown


def reasons(tables, shown):
    """Return for each measure that is not shown the words that its cells have for numbers."""
    known = {one["measure"] for one in shown}
    return {
        measure: sorted(
            {
                value.show()
                for table in tables
                for name, cells in table.items()
                if pattern.fullmatch(name)
                for value in cells.values()
            }
        )
        for measure, pattern in RATIOS.items()
        if measure not in known
    }


def _copy_bandwidth(tables):
    """Return the newest GB/s that the machine's memory was measured at, or None."""
    found = [v.value for t in tables for v in t.get(BANDWIDTH, {}).values() if v.known]
    return found[-1] if found else None


def _numpy_versions(tables):
    """Return in words which versions of NumPy measured, the newest commit's first."""
    said = []
    for table in reversed(tables):
        [number] = table.get(NUMPY, {(): MISSING}).values()
        said.append(
            f"{number.value // 10_000:.0f}.{number.value // 100 % 100:.0f}.{number.value % 100:.0f}"
            if number.known
            else "not recorded"
        )
    return " and ".join(dict.fromkeys(said))


def _noise(machine, results):
    """Return the Noise of a machine, that of no runs if what was recorded is broken."""
    try:
        return recorded_noise(machine, results)
    except UserError as error:
        log.warning(f"the thresholds of {machine} are guesses: {error}")
        return Noise()


def series_of(machine, environment, results=RESULTS, commits=None):
    """Return what the page shows of one machine in one environment, at all commits or at some."""
    commits = measured_commits(machine, results, environment) if commits is None else commits
    files = {m.commit: m for m in measured(machine, results) if m.environment == environment}
    found = [files[commit] for commit in commits]
    tables = [one.table for one in found]
    folder = Path(results, machine)
    record = load_json(str(folder / "machine.json"), 1)
    about = [str(record[key]) for key in ("cpu", "ram", "os") if record.get(key)]
    about.append(f"NumPy {_numpy_versions(tables)}")
    retired = folder / RETIRED
    shown = benchmarks_of(tables, _noise(machine, results))
    labels, titles = commit_labels(commits), subjects(commits)
    return {
        "machine": machine,
        "environment": environment,
        "about": ", ".join(about),
        "retired": retired.read_text().strip() if retired.exists() else None,
        "measured": max((one.started_at for one in found), default=0),
        # What asv's pages choose by: its list takes what differs least from what an address says.
        "asv": found[-1].params if found else {"machine": machine},
        "commits": [
            {"hash": commit, "label": labels[commit], "short": labels[commit].split(" (")[0]}
            | {"phase": "(" in labels[commit], "subject": titles[commit]}
            for commit in commits
        ],
        "benchmarks": shown,
        "unmeasured": reasons(tables, shown),
        "copy": _copy_bandwidth(tables),
    }
