"""overhead.html: what a decode step over a paged cache costs, beside one over a contiguous cache.

One page that needs no other file and no network. `gather` takes what it shows from the results,
overhead.html beside this module is its frame and script, charts.py its pictures. The figures of
the documents are the same charts of the same rows.
"""

import hashlib
import json
import math
import re
import statistics
import sys
from pathlib import Path
from urllib.parse import urlencode

import vl_convert
from asv.util import load_json

from benchmarks.common import PARAM_NAMES, kv_bytes
from benchmarks.generate import BLOCK_SIZE, Decode
from tracking.repository import ROOT, commit_label, git
from tracking.results import (
    MISSING,
    NUMPY,
    RESULTS,
    environments,
    load,
    measured_commits,
    recorded_commits,
    recorded_environment,
)
from tracking.tables import USERS, by_cell
from website.charts import CHARTS

TEMPLATE = Path(__file__).with_name("overhead.html")
# The measures, as the page names them, in its order.
RATIOS = {
    "tokens": re.compile(r"generate\.(Decode)\.ratio_tokens_per_second"),
    "step": re.compile(r"step\.(Auto|Batch16)\.ratio_step_vs_contiguous"),
    "bound": re.compile(r"step\.(Bound|BoundBatch16)\.ratio_step_vs_bound"),
    "attention": re.compile(r"overhead\.(\w+)\.ratio_vs_contiguous"),
}
LARGER = {"tokens"}  # is better
# What else a user of mlx-lm gets, in words.
WITH_MLX_LM = {
    "generate.Skewed.ratio_tokens_per_second": "tokens a second over mlx-lm's own caches, "
    "a sequence of {} tokens beside seven of a 16th",
    "server.Requests.ratio_requests_per_second": "requests a second over mlx_lm.server, "
    "{} clients that share a system prompt",
    "generate.FirstToken.ratio_first_token": "time to the first token over that with none cached, "
    "{} tokens of the prompt cached",
    "generate.Forks.track_memory": "memory of 8 forks over that of one, "
    "{} tokens, each grown by {}",
}
TIME = re.compile(r"decode\.(\w+)\.time_decode")
BANDWIDTH = "memory.Bandwidth.track_bandwidth"


def _path(name):
    """Return the decode path that a benchmark class is named after, or takes without saying."""
    if name in ("Batch16", "Bound", "BoundBatch16", "Decode"):
        return "auto"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _link(machine, benchmark, cell, params=PARAM_NAMES):
    """Return where asv's pages show the series of a cell."""
    state = [("machine", machine)]
    state += [(f"p-{name}", value) for name, value in zip(params, cell, strict=True)]
    return f"index.html#{benchmark}?{urlencode(state)}"


def _number(value):
    """Return a number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None


def _entry(value):
    """Return a Value as the page takes it: state, value and confidence interval."""
    state = "ok" if value.known else value.show()
    return {"state": state} | {
        key: _number(getattr(value, key)) for key in ("value", "low", "high")
    }


def _cells(tables, pattern):
    """Yield (commit's number, benchmark, cell, Value) of the cells that have a number anywhere."""
    seen = {}
    for number, table in enumerate(tables):
        for name, cells in table.items():
            if pattern.fullmatch(name):
                for cell, value in cells.items():
                    seen.setdefault(cell, []).append((number, name, value))
    for cell, found in sorted(seen.items(), key=lambda item: [int(x) for x in item[0]]):
        if any(value.known for _, _, value in found):
            yield from ((number, name, cell, value) for number, name, value in found)


def ratio_rows(machine, tables):
    """Return a row for each cell of each measure, path and commit: its ratio to contiguous."""
    rows = []
    for measure, pattern in RATIOS.items():
        of_model = measure == "tokens"
        params = Decode.param_names if of_model else PARAM_NAMES
        for number, name, cell, value in _cells(tables, pattern):
            sizes = map(int, (*cell, BLOCK_SIZE) if of_model else cell)
            row = {"measure": measure, "commit": number, "path": _path(pattern.fullmatch(name)[1])}
            row["link"] = _link(machine, name, cell, params)
            row |= zip(("batch", "context", "block"), sizes, strict=True)
            rows.append(row | _entry(value))
    return rows


def fact_rows(machine, table):
    """Return what else a user of mlx-lm gets at a commit: a row for each number, with its words."""
    return [
        {"what": words.format(*cell), "link": f"index.html#{name}?machine={machine}"}
        | _entry(value)
        for name, words in WITH_MLX_LM.items()
        for cell, value in sorted(table.get(name, {}).items(), key=lambda x: [int(n) for n in x[0]])
        if value.known
    ]


def bandwidth_rows(machine, tables):
    """Return the same for GB/s: the bytes of K and V over the time of one call of one layer."""
    rows = []
    for number, name, cell, time in _cells(tables, TIME):
        batch, context, block = map(int, cell)
        gigabytes = kv_bytes(batch, context, block) / 1e9
        row = {"commit": number, "path": _path(TIME.fullmatch(name)[1])}
        row |= {"batch": batch, "context": context, "block": block} | _entry(time)
        row["link"] = _link(machine, name, cell)
        speeds = {"value": row["value"], "low": row["high"], "high": row["low"]}
        rows.append(row | {key: t and gigabytes / t for key, t in speeds.items()})
    return rows


def _median(entries):
    """Return the median of values, and of the ends of their intervals."""
    return {
        key: statistics.median(_number(entry[key]) or entry["value"] for entry in entries)
        for key in ("value", "low", "high")
    }


def headline(rows, measure, labels):
    """Return what there is to say first of a measure, None if it has no number.

    That is `auto` at its latest commit, and against the phase before.

    The interval of a median is the median of the cells' intervals' ends; that of a change takes
    the ends that are farthest apart.
    """
    autos = {}
    for row in rows:
        if (row["measure"], row["path"], row["state"]) == (measure, "auto", "ok"):
            cell = row["batch"], row["context"], row["block"]
            autos.setdefault(row["commit"], {})[cell] = row
    if not autos:
        return None
    latest = max(autos)
    now = autos[latest]
    said = {
        "commit": latest,
        "cells": len(now),
        "median": _median(now.values()),
        "worst": (min if measure in LARGER else max)(now.values(), key=lambda row: row["value"]),
        "change": None,
    }
    before = [n for n in autos if n < latest and " · " in labels[n]]
    common = [cell for cell in now if before and cell in autos[max(before)]]
    if common:
        old = autos[max(before)]
        ends = [("value", "value"), ("low", "high"), ("high", "low")]
        changes = [
            {a: (now[c][a] or now[c]["value"]) / (old[c][b] or old[c]["value"]) for a, b in ends}
            for c in common
        ]
        said["change"] = {"since": max(before), "cells": len(common), **_median(changes)}
    return said


def _copy_bandwidth(tables):
    """Return the newest GB/s that the machine's memory was measured at, or None."""
    measured = [v.value for t in tables for v in t.get(BANDWIDTH, {}).values() if v.known]
    return measured[-1] if measured else None


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


def series_of(machine, environment, results=RESULTS, commits=None):
    """Return what the page shows of one machine in one environment, at all commits or at some."""
    commits = measured_commits(machine, results, environment) if commits is None else commits
    tables = [load(machine, commit, results, environment) for commit in commits]
    labels = [commit_label(commit) for commit in commits]
    rows = ratio_rows(machine, tables)
    record = load_json(str(Path(results, machine, "machine.json")), 1)
    about = [str(record[key]) for key in ("cpu", "ram", "os") if record.get(key)]
    about.append(f"NumPy {_numpy_versions(tables)}")
    return {
        "machine": machine,
        "environment": environment,
        "about": ", ".join(about),
        "commits": [
            {"label": label, "hash": commit, "subject": git("log", "-1", "--format=%s", commit)}
            for commit, label in zip(commits, labels, strict=True)
        ],
        "headlines": {measure: headline(rows, measure, labels) for measure in RATIOS},
        "ratios": rows,
        "facts": [fact_rows(machine, table) for table in tables],
        "bandwidths": bandwidth_rows(machine, tables),
        "copy": _copy_bandwidth(tables),
        "tables": [
            [[(text, None) for text in row] for row in by_cell(table, USERS)[1]] for table in tables
        ],
    }


def causes(html_dir, revisions, benchmarks):
    """Group the published regressions by the commit, or range of commits, that caused them."""
    hashes = {revision: commit for commit, revision in revisions.items()}
    file = Path(html_dir, "regressions.json")
    groups = {}
    for name, _, params, _, now, best, jumps in load_json(str(file))["regressions"]:
        first, last, *_ = jumps[-1]
        key = hashes.get(first), hashes[last]
        cells = groups.setdefault(key, [])
        larger = benchmarks.get(name.split("(")[0], {}).get("better") == "larger"
        factor = best / max(now, 1e-9 * best) if larger else now / best
        cells.append({"name": name, "machine": params.get("machine"), "factor": factor})
    return [
        {
            "after": before and commit_label(before),
            "commit": commit_label(commit),
            "subject": git("log", "-1", "--format=%s", commit),
            "cells": sorted(cells, key=lambda cell: -cell["factor"]),
        }
        for (before, commit), cells in groups.items()
    ]


def gather(results, regressions=()):
    """Return the page's data, from a results folder."""
    machines = sorted(path.parent.name for path in Path(results).glob("*/machine.json"))
    series = []
    for machine in machines:
        for environment in environments(machine, results):
            try:
                series.append(series_of(machine, environment, results))
            except ValueError as error:  # cells of another kind than the suite's
                print(f"{machine} in {environment} is left out: {error}", file=sys.stderr)
    return {
        "series": [one for one in series if one["ratios"]],
        "columns": by_cell({}, USERS)[0],
        "regressions": list(regressions),
    }


_FOUR = {"measure": "attention", "batch": 4, "block": 32}
FIGURES = {
    "phases-h200": ("phases", "h200", _FOUR | {"path": "auto"}),
    "phases-linux-2core-xeon": ("phases", "linux-2core-xeon", _FOUR | {"measure": "step"}),
    "phases-h100": ("phases", "h100", _FOUR | {"measure": "step"}),
    "contexts-h200": ("contexts", "h200", _FOUR | {"commit": "6 · fused"}),
}
"""Pictures in the documents: chart, machine and which rows."""


def figure_rows(name):
    """Return the rows of a figure, from recorded results."""
    _, machine, wanted = FIGURES[name]
    found = series_of(machine, recorded_environment(machine), commits=recorded_commits(machine))
    labels = [commit["label"] for commit in found["commits"]]
    rows = [{**row, "label": labels[row["commit"]]} for row in found["ratios"]]
    if "commit" in wanted:
        wanted = {
            **wanted,
            "commit": next(i for i, x in enumerate(labels) if x.startswith(wanted["commit"])),
        }
    rows = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return sorted(rows, key=lambda row: (row["commit"], row["path"], row["context"]))


def digest(rows):
    """Return what a figure carries to tell which rows it was drawn from."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw_figures():
    """Write the documents' figures as SVG into docs/images, those whose rows are others now.

    The renderer lays a legend out differently from one time to the next.
    """
    for name, (chart, _, _) in FIGURES.items():
        rows, file = figure_rows(name), ROOT / f"docs/images/{name}.svg"
        if file.exists() and f"rows {digest(rows)}" in file.read_text():
            continue
        spec = CHARTS[chart].to_dict()
        spec |= {"datasets": {"rows": rows}, "width": 640, "background": "white"}
        spec["config"] = {"mark": {"invalid": "break-paths-show-path-domains"}}
        svg = vl_convert.vegalite_to_svg(spec)
        file.write_text(f"{svg}<!-- rows {digest(rows)} -->\n")


def page(data):
    """Return overhead.html."""
    charts = {name: chart.to_dict() for name, chart in CHARTS.items()}

    def script(content):
        return json.dumps(content, allow_nan=False).replace("<", "\\u003c")

    parts = {
        "/*VEGA*/": vl_convert.javascript_bundle(),
        "/*CHARTS*/": script(charts),
        "/*DATA*/": script(data),
    }
    html = TEMPLATE.read_text()
    for mark, content in parts.items():
        before, after = html.split(mark)
        html = before + content + after
    return html


if __name__ == "__main__":
    draw_figures()
