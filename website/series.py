"""What overhead.html shows of one machine, from its results.

A series is a benchmark's cell over all commits. Values are JSON: [value, low, high] or [value], a
word for what failed or why there is none, null where nothing was asked for.
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
from tracking.tables import ADR, by_number

# The measures, as the page names them, in its order.
RATIOS = {
    "first": re.compile(r"prompt\.(FirstToken)\.ratio_speed"),
    "tokens": re.compile(r"generate\.(Decode)\.ratio_tokens_per_second"),
    "step": re.compile(r"step\.(Auto|Batch16)\.ratio_step_vs_contiguous"),
    "bound": re.compile(r"step\.(Bound|BoundBatch16)\.ratio_step_vs_bound"),
    "attention": re.compile(r"overhead\.(\w+)\.ratio_vs_contiguous"),
}
LARGER = {"first", "tokens"}  # is better
# The parameters of models' cells, as [batch, context, block size]; a prompt is alone.
MODELS = {"first": [None, "prompt"], "tokens": Decode.param_names}
HOST_BOUND = 0.9
"""A larger share of the time computed by the calling thread means that the host bounds it."""
TIME = re.compile(r"decode\.(\w+)\.time_decode")
BANDWIDTH = "memory.Bandwidth.track_bandwidth"
# What else a user of mlx-lm gets, beside which measure: the benchmark's parameters, and in words.
FACTS = {
    "first": {
        "prompt.FirstToken.ratio_null": (
            ["prompt"],
            "noise floor: mlx-lm's first token over itself, {} tokens",
        ),
        "prompt.Cached.ratio_time": (
            ["cached", "new"],
            "time over that of mlx-lm's own cache, {} tokens of the prompt cached and {} new",
        ),
        "prompt.Chunk.ratio_speed": (
            ["chunk"],
            "a chunk of a prompt, {} tokens, speed over mlx-lm's",
        ),
        "prompt.Windows.ratio_speed": (
            ["prompt"],
            "speed over mlx-lm's where five layers of six have a window, {} tokens",
        ),
        "prompt.Bits.ratio_speed": (
            ["prompt"],
            "speed over mlx-lm's where the store keeps K and V in 8 bits, {} tokens",
        ),
        "prompt.Memory.track_peak": (["prompt"], "peak memory over mlx-lm's, {} tokens"),
    },
    "tokens": {
        "generate.Null.ratio_tokens_per_second": (
            Decode.param_names,
            "noise floor: mlx-lm's tokens a second over itself, {} sequences of {} tokens",
        ),
        "trace.Batched.track_tokens_per_second": (
            [],
            "tokens a second over mlx-lm's, 96 mixed requests through BatchGenerator (12 on a CPU)",
        ),
        "trace.Batched.track_first_token_p95": (
            [],
            "time to the first token of these, 95th percentile",
        ),
        "trace.Batched.track_between_tokens_p95": (
            [],
            "time between tokens of these, 95th percentile",
        ),
        "trace.Batched.track_peak_memory": ([], "peak memory of these"),
        "generate.Skewed.ratio_tokens_per_second": (
            ["longest"],
            "tokens a second over mlx-lm's, a sequence of {} tokens beside seven of a 16th",
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
    },
}


def path_of(name):
    """Return the decode path that a benchmark class is named after, or takes without saying."""
    if name in ("Batch16", "Bound", "BoundBatch16", "Decode", "FirstToken"):
        return "auto"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def measure_of(name):
    """Return (measure, path) of a benchmark that the page shows, None of another."""
    for measure, pattern in {**RATIOS, "time": TIME}.items():
        if match := pattern.fullmatch(name):
            return measure, path_of(match[1])
    if any(name in facts for facts in FACTS.values()):
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

    `cells` are (batch, context, block size), of facts what they are of; `values` are by cell and
    commit, and so is `host`, whether the host bounds them. `thresholds` of ratios are (factor, in
    words) by cell, from the machine's `noise`.

    Raises
    ------
    ValueError
        If results have cells of another kind than the suite's.
    """
    shown = []
    facts = {name: (of, *said) for of, every in FACTS.items() for name, said in every.items()}
    for name in dict.fromkeys([*facts, *(name for table in tables for name in table)]):
        kind = measure_of(name)
        cells = kind and _cells(tables, name)
        if not cells:
            continue
        measure, path = kind
        of, params, words = facts.get(name, (None, MODELS.get(measure, PARAM_NAMES), ""))
        one = {"name": name, "measure": measure, "path": path, "params": params}
        asked = [*filter(None, params)]
        if len(cells[0]) != len(asked):
            raise ValueError(f"expected {', '.join(asked)} of {name}, got {', '.join(cells[0])}")
        if measure == "facts":
            one |= {"of": of, "what": [words.format(*cell) for cell in cells]}
            one["cells"] = [[*cell] for cell in cells]
        else:
            sizes = [[int(x) for x in cell] for cell in cells]
            if measure == "first":
                sizes = [[1, *size] for size in sizes]
            one["cells"] = [[*size, BLOCK_SIZE][:3] for size in sizes]
        if measure in RATIOS:
            found = [noise.threshold(series_name(name, cell)) for cell in cells]
            one["thresholds"] = [[_number(t.factor, 4), t.show()] for t in found]
            one["host"] = _host_bound(tables, name, cells)
        if measure == "time":
            one["bytes"] = [kv_bytes(*size) for size in one["cells"]]
        one["values"] = [
            [entry(t.get(name, {}).get(cell, MISSING)) for t in tables] for cell in cells
        ]
        shown.append(one)
    return shown


def _host_bound(tables, name, cells):
    """Return for each cell of a ratio, and each commit, whether the host bounds it."""
    share = name.rpartition(".")[0] + HOST_SHARE
    found = [[t.get(share, {}).get(cell, MISSING) for t in tables] for cell in cells]
    return [[value.known and value.value > HOST_BOUND for value in row] for row in found]


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
    tables = of_one_version(found)
    folder = Path(results, machine)
    record = valid.load(folder / "machine.json")
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
