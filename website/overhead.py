"""overhead.html: what a decode step over a paged cache costs, beside one over a contiguous cache.

One page that needs no other file and no network. `gather` takes what it shows from the results
(series.py), overhead.html beside this module is its frame, the .js files its script, charts.py
its pictures. The figures of the documents are the same charts of the same rows.
"""

import base64
import dataclasses
import hashlib
import json
import re
import sys
import zlib
from pathlib import Path

import vl_convert
from asv.util import UserError, load_json

from tracking.repository import ROOT, commit_labels, git, subjects
from tracking.results import environments, recorded_commits, recorded_environment
from tracking.tables import COLUMNS
from website.charts import CHARTS, colours, paint
from website.series import LARGER, series_of

TEMPLATE = Path(__file__).with_name("overhead.html")
SCRIPTS = [
    Path(__file__).with_name(f"{name}.js")
    for name in ("views", "choices", "comparison", "overhead")
]


def causes(html_dir, revisions, benchmarks):
    """Group the published regressions by the commit, or range of commits, that caused them.

    What was accepted is apart, with its reason and link.
    """
    hashes = {revision: commit for commit, revision in revisions.items()}
    published = load_json(str(Path(html_dir, "regressions.json")))
    found = [(regression, None) for regression in published["regressions"]]
    found += [
        (one["regression"], (one["reason"], one["link"])) for one in published.get("accepted", [])
    ]
    groups = {}
    for (name, _, params, _, now, best, jumps), accepted in found:
        first, last, *_ = jumps[-1]
        key = hashes.get(first), hashes[last], accepted
        cells = groups.setdefault(key, [])
        # As asv has it: the benchmark, and in brackets the values of its parameters.
        benchmark, _, said = name.partition("(")
        about = benchmarks[benchmark]
        sizes = dict(zip(about["param_names"], said[:-1].split(", "), strict=False))
        larger = about.get("better") == "larger"
        factor = best / max(now, 1e-9 * best) if larger else now / best
        cell = {"name": name, "machine": params.get("machine"), "factor": factor}
        cells.append({**cell, "benchmark": benchmark, "params": sizes})
    commits = {commit for before, after, _ in groups for commit in (before, after) if commit}
    labels, titles = commit_labels(commits), subjects(commits)
    return [
        {
            "from": before,
            "to": commit,
            "after": before and labels[before],
            "commit": labels[commit],
            "subject": titles[commit],
            "accepted": accepted and dict(zip(("reason", "link"), accepted, strict=True)),
            "cells": sorted(cells, key=lambda cell: -cell["factor"]),
        }
        for (before, commit, accepted), cells in groups.items()
    ]


def repository_page():
    """Return the address of the project's repository on GitHub, None if it has none there."""
    try:
        origin = git("remote", "get-url", "origin")
    except UserError:
        return None
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", origin)
    return match and f"https://github.com/{match[1]}"


def gather(results, regressions=()):
    """Return the page's data, from a results folder: machines by when they last measured."""
    machines = sorted(path.parent.name for path in Path(results).glob("*/machine.json"))
    series = []
    for machine in machines:
        for environment in environments(machine, results):
            try:
                series.append(series_of(machine, environment, results))
            except ValueError as error:  # cells of another kind than the suite's
                print(f"{machine} in {environment} is left out: {error}", file=sys.stderr)
    series = [one for one in series if one["benchmarks"]]
    series.sort(key=lambda one: (one["retired"] is not None, -one["measured"]))
    shown = [one for each in series for one in each["benchmarks"]]
    contexts = {cell[1] for one in shown if one["measure"] != "facts" for cell in one["cells"]}
    return {
        "series": series,
        "larger": sorted(LARGER),
        "columns": {
            name: [dataclasses.asdict(column) for column in columns]
            for name, columns in COLUMNS.items()
        },
        "colours": colours({one["path"] for one in shown}, contexts),
        "regressions": list(regressions),
        "repository": repository_page(),
    }


_FOUR = {"measure": "attention", "batch": 4, "block": 32}
FIGURES = {
    "phases-h200": ("phases", "h200", _FOUR | {"path": "auto"}),
    "phases-linux-2core-xeon": ("phases", "linux-2core-xeon", _FOUR | {"measure": "step"}),
    "phases-h100": ("phases", "h100", _FOUR | {"measure": "step"}),
    "contexts-h200": ("contexts", "h200", _FOUR | {"label": "6 · fused"}),
}
"""Pictures in the documents: chart, machine and which rows."""


def figure_rows(name):
    """Return the rows of a figure, from recorded results."""
    _, machine, wanted = FIGURES[name]
    found = series_of(machine, recorded_environment(machine), commits=recorded_commits(machine))
    rows = []
    for one in found["benchmarks"]:
        if one["measure"] != wanted["measure"]:
            continue
        for (batch, context, block), values in zip(one["cells"], one["values"], strict=True):
            row = {"measure": one["measure"], "path": one["path"], "batch": batch}
            row |= {"context": context, "block": block}
            for number, said in enumerate(values):
                if isinstance(said, list):
                    ends = dict(zip(("value", "low", "high"), said, strict=False))
                    label = found["commits"][number]["short"]
                    rows.append({**row, "commit": number, "label": label, **ends})
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
        paint(spec, rows, colours((row["path"] for row in rows), {row["context"] for row in rows}))
        spec |= {"datasets": {"rows": rows}, "width": 640, "background": "white"}
        svg = vl_convert.vegalite_to_svg(spec)
        file.write_text(f"{svg}<!-- rows {digest(rows)} -->\n")


def pack(one):
    """Return a series as the page holds it: deflated but for what its menu of machines needs.

    Years of nights fit in a page that a phone opens.
    """
    content = json.dumps(one, allow_nan=False, separators=(",", ":")).encode()
    shown = {key: one[key] for key in ("machine", "environment", "retired")}
    return {**shown, "packed": base64.b64encode(zlib.compress(content, 9)).decode()}


def page(data):
    """Return overhead.html."""
    charts = {name: chart.to_dict() for name, chart in CHARTS.items()}

    def script(content):
        return json.dumps(content, allow_nan=False).replace("<", "\\u003c")

    parts = {
        "/*VEGA*/": vl_convert.javascript_bundle(),
        "/*CHARTS*/": script(charts),
        "/*DATA*/": script({**data, "series": [pack(one) for one in data["series"]]}),
        "/*SCRIPT*/": "".join(file.read_text() for file in SCRIPTS),
    }
    html = TEMPLATE.read_text()
    for mark, content in parts.items():
        before, after = html.split(mark)
        html = before + content + after
    return html


if __name__ == "__main__":
    draw_figures()
