"""The data of overhead.html: one machine's results, by benchmark, cell and commit.

Values are JSON: [value, low, high] or [value], a word for what failed or why there is none, null
where nothing was asked for.
"""

import math
import re
from pathlib import Path

from asv.console import log
from asv.util import UserError

from benchmarks.common import PARAM_NAMES, kv_bytes
from benchmarks.generate import BLOCK_SIZE, Decode
from tracking import valid
from tracking.grid import HOST_SHARE, series_name
from tracking.noise import Noise, recorded_noise
from tracking.repository import commit_labels, subjects
from tracking.results import (
    MISSING,
    NUMPY,
    RESULTS,
    RETIRED,
    measured,
    measured_commits,
    of_one_version,
)
from tracking.tables import by_number

MEASURES = {
    "first": r"prompt\.(FirstToken)\.ratio_speed",
    "tokens": r"generate\.(Decode)\.ratio_tokens_per_second",
    "memory": r"prompt\.(Memory)\.track_peak|trace\.Batched\.track_peak_memory",
    "step": r"step\.(Auto|Batch16)\.ratio_step_vs_contiguous",
    "bound": r"step\.(Bound|BoundBatch16)\.ratio_step_vs_bound",
    "attention": r"overhead\.(\w+)\.ratio_vs_contiguous",
    "time": r"decode\.(\w+)\.time_decode",
}
# The parameters of the other measures' cells are batch, context and block size.
MODELS = {"first": ["prompt"], "tokens": Decode.param_names, "memory": ["prompt"]}
MIXED = "trace.Batched.track_peak_memory"
"""Of mixed requests: without parameters, and on the page at a context of 0 tokens."""
HOST_BOUND = 0.9
"""A larger share of the time computed by the calling thread means that the host bounds it."""
# What else is told beside a measure; the parameters of a benchmark are in braces.
FACTS = """
first prompt.FirstToken.ratio_null: mlx-lm against itself, {prompt} tokens
first prompt.Cached.ratio_time: time over mlx-lm's, {cached} tokens cached and {new} new
first prompt.Chunk.ratio_speed: speed over mlx-lm's, a chunk of {chunk} tokens
first prompt.Windows.ratio_speed: speed over mlx-lm's, 5 of 6 layers with a window, {prompt} tokens
first prompt.Bits.ratio_speed: speed over mlx-lm's, K and V in 8 bits, {prompt} tokens
first generate.FirstToken.ratio_first_token: time over a cold prompt's, {cached} tokens cached
first trace.Batched.track_first_token_p95: time over mlx-lm's, mixed requests, 95th percentile
tokens generate.Null.ratio_tokens_per_second: mlx-lm against itself, {sequences} of {context} tokens
tokens trace.Batched.track_tokens_per_second: speed over mlx-lm's, mixed requests
tokens trace.Batched.track_between_tokens_p95: time between tokens over mlx-lm's, 95th percentile
tokens generate.Skewed.ratio_tokens_per_second: speed over mlx-lm's, {longest} and 7 short ones
tokens server.Requests.ratio_requests_per_second: requests over mlx_lm.server's, {clients} clients
memory generate.Forks.track_memory: 8 forks over one of {tokens} tokens, each grown by {grown}
"""
FACTS = {
    name: (measure, words)
    for measure, name, words in re.findall(r"^(\w+) (\S+): (.*)$", FACTS, re.MULTILINE)
}


def measure_of(name):
    """Return (measure, attention path) of a benchmark, None if the page does not show it."""
    for measure, pattern in MEASURES.items():
        if match := re.fullmatch(pattern, name):
            if measure not in ("attention", "time") or match[1] == "Batch16":
                return measure, "auto"
            return measure, re.sub(r"(?<!^)(?=[A-Z])", "_", match[1]).lower()
    return None


def entry(value):
    """Return a Value as JSON."""
    if value.known:
        finite = [end for end in (value.low, value.high) if math.isfinite(end)]
        return [float(f"{x:.5g}") for x in (value.value, *finite)]
    return None if value is MISSING else value.show()


def _cells(tables, name):
    """Return the cells with a number or a reason anywhere, as results name them."""
    found = {
        cell
        for table in tables
        for cell, value in table.get(name, {}).items()
        if value.show() not in ("n/a", MISSING.why)
    }
    return sorted(found, key=by_number)


def benchmarks_of(tables, noise):
    """Return (measures, facts) of tables by commit: a dictionary for each benchmark.

    Values are by cell and commit. A measure's cells are (batch, context, block size), and it has
    thresholds from the machine's `noise` and what the host bounds.

    Raises
    ------
    ValueError
        If results have cells of another kind than the suite's.
    """
    measures, facts = [], []
    for name in dict.fromkeys(name for table in tables for name in table):
        of, words = FACTS.get(name, (None, ""))
        measure, path = measure_of(name) or (None, None)
        cells = (of or measure) and _cells(tables, name)
        if not cells:
            continue
        params = [] if name == MIXED else MODELS.get(measure, PARAM_NAMES)
        params = re.findall(r"{(\w+)}", words) if of else params
        if len(cells[0]) != len(params):
            raise ValueError(f"expected {', '.join(params)} of {name}, got {', '.join(cells[0])}")
        values = [[entry(t.get(name, {}).get(cell, MISSING)) for t in tables] for cell in cells]
        one = {"name": name, "params": params, "asked": [[*cell] for cell in cells]}
        one["values"] = values
        if of:
            what = [words.format(**dict(zip(params, cell, strict=True))) for cell in cells]
            facts.append(one | {"of": of, "what": what})
            continue
        sizes = [[int(size) for size in cell] for cell in cells]
        sizes = [[1] * (len(size) < 2) + (size or [0]) + [BLOCK_SIZE] for size in sizes]
        one |= {"measure": measure, "path": path, "cells": [size[:3] for size in sizes]}
        if measure == "time":
            one["bytes"] = [kv_bytes(*cell) for cell in one["cells"]]
        found = [noise.threshold(series_name(name, cell)) for cell in cells]
        one["thresholds"] = [[float(f"{t.factor:.4g}"), t.show()] for t in found]
        share = name.rpartition(".")[0] + HOST_SHARE
        hosts = [[t.get(share, {}).get(cell, MISSING) for t in tables] for cell in cells]
        one["host"] = [[v.known and v.value > HOST_BOUND for v in row] for row in hosts]
        measures.append(one)
    return measures, facts


def _measured_with(one):
    """Return the versions and the system that a `Measured` was measured with."""
    [numpy] = one.table.get(NUMPY, {(): MISSING}).values()
    number = int(numpy.value) if numpy.known else None
    version = number and f"{number // 10_000}.{number // 100 % 100}.{number % 100}"
    keys = {"MLX": "mlx", "Python": "python", "system": "os", "CPU": "cpu", "driver": "driver"}
    return {name: one.params.get(key) for name, key in keys.items()} | {"NumPy": version}


def noise_of(machine, results):
    """Return the recorded Noise of a machine, that of no runs if the record is broken."""
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
    folder = Path(results, machine)
    record, retired = valid.load(folder / "machine.json"), folder / RETIRED
    measures, facts = benchmarks_of(of_one_version(found), noise_of(machine, results))
    labels, titles = commit_labels(commits), subjects(commits)
    return {
        "machine": machine,
        "environment": environment,
        "about": ", ".join(str(record[key]) for key in ("cpu", "ram", "os") if record.get(key)),
        "retired": retired.read_text().strip() if retired.exists() else None,
        # What asv's pages choose by: its list takes what differs least from what an address says.
        "asv": found[-1].params if found else {"machine": machine},
        "commits": [
            {"hash": one.commit, "label": labels[one.commit].split(" (")[0]}
            | {"phase": "(" in labels[one.commit], "subject": titles[one.commit]}
            | {"at": one.started_at, "with": _measured_with(one)}
            for one in found
        ],
        "measures": measures,
        "facts": facts,
    }
