"""overhead.html: what a paged cache costs, beside mlx-lm's, in one file that needs no network.

`gather` takes its data from results (series.py), overhead.html beside this module is its frame and
overhead.js its script. The documents' figures are the same charts of the same rows.
"""

import base64
import hashlib
import json
import re
import sys
import zlib
from pathlib import Path

import vl_convert
from asv.util import UserError

from tracking.repository import ROOT, git
from tracking.results import (
    default_machine,
    environments,
    is_own,
    machines,
    recorded_commits,
    recorded_environment,
    usual_environment,
)
from website.series import series_of

HERE = Path(__file__).parent
COLOURS = ["#2f7ed8", "#e07b00", "#2a9d5c", "#9b59d0", "#d1495b", "#a0722a", "#1c9ab8", "#7f8794"]
LETTERS = {"labelFontSize": 12, "titleFontSize": 12}  # pixels, the least that is read with ease


def chart(x, by, *, area=False):
    """Return Vega-Lite of lines with points and intervals over the rows named `rows`."""
    x = {"type": "nominal", "title": None, "sort": None} | x
    color = {"field": by, "type": "ordinal", "scale": {"range": COLOURS}}
    color |= {
        "legend": {"orient": "top", "columns": 5, "symbolOpacity": 1},
        "title": {"context": "tokens"}.get(by),
    }
    ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30]
    y = {"field": "value", "type": "quantitative", "title": "ratio, 1 is equal"}
    y |= {"scale": {"type": "log", "nice": False, "padding": 10}}
    y |= {"axis": {"values": ticks, "format": "~g"}}
    tip = [{"field": key} for key in ("label", "path", "batch", "context", "shown")]
    ends = {"y": y | {"field": "low"}, "y2": {"field": "high"}, "x": x, "color": color}
    band = {"type": "area", "opacity": 0.18} if area else {"type": "rule", "strokeWidth": 3}
    line = {"x": x, "y": y, "color": color, "tooltip": tip, "href": {"field": "link"}}
    one = {"type": "rule", "strokeDash": [6, 4], "color": "gray"}
    layer = [
        {"mark": one, "encoding": {"y": {"datum": 1}}},
        {"mark": band, "encoding": ends},
        {"mark": {"type": "line", "point": {"size": 50}}, "encoding": line},
    ]
    spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "layer": layer}
    spec |= {"data": {"name": "rows"}, "width": "container", "height": 230}
    return spec | {"background": "transparent", "config": {"axis": LETTERS, "legend": LETTERS}}


CONTEXT = {"field": "context", "type": "quantitative", "title": "context length in tokens"}
CONTEXT |= {"scale": {"type": "log", "base": 2, "nice": False, "padding": 16}}
CONTEXT |= {"axis": {"values": [2**power for power in range(8, 20)], "format": "d", "grid": False}}
# Phases alone have room for their names; of many commits some have to do without.
OVERLAP = {"labelAngle": -25, "labelOverlap": {"expr": "length(domain('x')) > 20 && 'greedy'"}}
CHARTS = {
    "phases": chart({"field": "label", "axis": OVERLAP}, "context", area=True),
    "contexts": chart(CONTEXT, "path"),
}


OWN = "the machine that built it, because that measured HEAD or measured last"
MOST = "the machine with the most headline numbers at its newest commit"


def origin():
    """Return the web address of the remote, without what logs in; None if it has none."""
    try:
        remote = git("remote", "get-url", "origin")
    except UserError:
        return None
    web = re.fullmatch(r"(?:https?://(?:[^/@]*@)?|(?:ssh://)?git@)([\w.-]+)[:/](.+)", remote)
    return web and f"https://{web[1]}/{web[2].removesuffix('/').removesuffix('.git')}"


def gather(results, regressions=(), repository=None):
    """Return the page's data: the machine that it opens with first, retired ones last."""
    series = []
    for machine in machines(results):
        for environment in environments(machine, results):
            try:
                series.append(series_of(machine, environment, results))
            except ValueError as error:  # cells of another kind than the suite's
                print(f"{machine} in {environment} is left out: {error}", file=sys.stderr)
    series = [one for one in series if one["measures"]]
    chosen, _ = default_machine(results) or (None, None)
    opens = chosen, chosen and usual_environment(chosen, results)

    series.sort(key=lambda one: max(commit["at"] for commit in one["commits"]), reverse=True)
    series.sort(key=lambda one: one["retired"] is not None)
    series.sort(key=lambda one: (one["machine"], one["environment"]) != opens)
    data = {"series": series, "regressions": list(regressions), "repository": repository}
    return data | {"opens": OWN if chosen and is_own(chosen, results) else MOST}


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
    rows = [
        {"measure": one["measure"], "path": one["path"], "batch": batch, "context": context}
        | {"block": block, "commit": number, "label": found["commits"][number]["label"]}
        | dict(zip(("value", "low", "high"), said, strict=False))
        for one in found["measures"]
        for (batch, context, block), values in zip(one["cells"], one["values"], strict=True)
        for number, said in enumerate(values)
        if isinstance(said, list)
    ]
    rows = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return sorted(rows, key=lambda row: (row["commit"], row["path"], row["context"]))


def digest(rows):
    """Return what a figure carries to tell which rows it was drawn from."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def draw_figures():
    """Write the documents' figures as SVG into docs/images, those whose rows are others now."""
    for name, (kind, _, _) in FIGURES.items():
        rows, file = figure_rows(name), ROOT / f"docs/images/{name}.svg"
        if not file.exists() or f"rows {digest(rows)}" not in file.read_text():
            drawn = CHARTS[kind] | {"datasets": {"rows": rows}, "width": 640, "background": "white"}
            svg = vl_convert.vegalite_to_svg(drawn)
            file.write_text(f"{svg}<!-- rows {digest(rows)} -->\n")


def pack(one):
    """Return a series as the page holds it: deflated, but for what its menu of machines needs.

    Years of nights fit in a page that a phone opens.
    """
    content = json.dumps(one, allow_nan=False, separators=(",", ":")).encode()
    shown = {key: one[key] for key in ("machine", "environment", "retired")}
    return {**shown, "packed": base64.b64encode(zlib.compress(content, 9)).decode()}


def page(data):
    """Return overhead.html."""

    def script(content):
        return json.dumps(content, allow_nan=False).replace("<", "\\u003c")

    html = (HERE / "overhead.html").read_text()
    for mark, content in {
        "/*VEGA*/": vl_convert.javascript_bundle(),
        "/*CHARTS*/": script(CHARTS),
        "/*DATA*/": script({**data, "series": [pack(one) for one in data["series"]]}),
        "/*SCRIPT*/": (HERE / "overhead.js").read_text(),
    }.items():
        before, after = html.split(mark)
        html = before + content + after
    return html


if __name__ == "__main__":
    draw_figures()
