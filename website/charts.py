"""The pictures of overhead.html: Vega-Lite over rows that are named, not held."""

import math

import altair as alt

LETTERS = 12  # pixels, the least that is read with ease


def _lines(x, y, color, tooltip, *, band=False, at=None):
    """Lines with points and confidence intervals over the rows named `rows`."""
    rows = alt.NamedData("rows")
    base = alt.Chart(rows).encode(x=x, color=color, tooltip=tooltip)
    ends = base.encode(y=y("low:Q"), y2="high:Q")
    layers = [
        ends.mark_area(opacity=0.18) if band else ends.mark_rule(strokeWidth=3, opacity=0.5),
        base.mark_line(point=alt.OverlayMarkDef(size=50)).encode(y=y("value:Q"), href="link:N"),
    ]
    if at is not None:
        rule = alt.Chart(rows).mark_rule(strokeDash=[6, 4], color="gray")
        layers.insert(0, rule.encode(y=alt.datum(at)))
    letters = {"labelFontSize": LETTERS, "titleFontSize": LETTERS}
    return (
        alt.layer(*layers)
        .properties(width="container", height=300, background="transparent")
        .configure_axis(**letters)
        .configure_legend(**letters)
    )


def _ratio(field, title="time over contiguous"):
    ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30]
    scale = alt.Scale(type="log", nice=False, padding=10)
    axis = alt.Axis(values=ticks, format="~g", tickCount=len(ticks))
    return alt.Y(field, title=title, scale=scale, axis=axis)


def _first(field):
    return _ratio(field, "mlx-lm's time to the first token over ours")


def _speedup(field):
    return _ratio(field, "tokens a second over mlx-lm's")


def _speed(field):
    return alt.Y(field, title="GB/s", scale=alt.Scale(zero=True), axis=alt.Axis(format=",~r"))


def _color(field, title):
    """Return an encoding whose colours `paint` sets."""
    legend = alt.Legend(orient="top", columns=4, symbolOpacity=1, labelLimit=240)
    return alt.Color(field, title=title, scale=alt.Scale(), legend=legend)


_CONTEXT = alt.X(
    "context:Q",
    title="context length in tokens",
    scale=alt.Scale(type="log", base=2, nice=False, padding=16),
    axis=alt.Axis(values=[2**power for power in range(8, 20)], format="d", grid=False),
)
# Phases alone have room for their names; of many commits some have to do without.
_OVERLAP = alt.ExprRef("length(domain('x')) > 20 ? 'greedy' : false")
_COMMIT = alt.X(
    "label:N", title=None, sort=None, axis=alt.Axis(labelAngle=-30, labelOverlap=_OVERLAP)
)
_BY_CONTEXT = _color("context:O", "tokens")
_BY_PATH = _color("path:N", None)
_TIP = [
    *("label:N", "path:N", "batch:Q", "context:Q", "block:Q"),
    *(alt.Tooltip(f"{key}:Q", format=".3~r") for key in ("value", "low", "high")),
]

CHARTS = {
    "phases": _lines(_COMMIT, _ratio, _BY_CONTEXT, _TIP, band=True, at=1),
    "first": _lines(_COMMIT, _first, _BY_CONTEXT, _TIP, band=True, at=1),
    "tokens": _lines(_COMMIT, _speedup, _BY_CONTEXT, _TIP, band=True, at=1),
    "contexts": _lines(_CONTEXT, _ratio, _BY_PATH, _TIP, at=1),
    "bandwidths": _lines(_CONTEXT, _speed, _BY_PATH, _TIP),
}
"""Charts of rows of series, with the label of the row's commit added."""

PATHS = {
    "auto": "#2f7ed8",
    "fused": "#e07b00",
    "gather_rows": "#2a9d5c",
    "gather_rows_grouped": "#9b59d0",
    "gather_block_major": "#d1495b",
    "gather_head_major": "#a0722a",
    "contiguous": "#7f8794",
}
CONTEXTS = [
    *("#8a3fb5", "#7a4fd8", "#3f5fd0", "#2a82cc", "#1c9ab8"),
    *("#1da38f", "#2fa84f", "#b8920a", "#dd7a1c", "#d1495b"),
]
"""Of 256 tokens, 512, … to 131072."""
OTHERS = ["#c2188f", "#00838f", "#6d8b00", "#8d6e63"]


def colours(paths, contexts):
    """Return the colour of each path and context length, the same in every chart."""
    new = sorted(set(paths) - PATHS.keys())
    found = {path: OTHERS[i % len(OTHERS)] for i, path in enumerate(new)} | PATHS
    for context in contexts:
        power = round(math.log2(max(context, 1))) - 8
        found[str(context)] = CONTEXTS[min(max(power, 0), len(CONTEXTS) - 1)]
    return found


def paint(spec, rows, palette):
    """Give a chart the colours of what is in its rows; overhead.js does the same."""
    for layer in spec["layer"]:
        if color := layer["encoding"].get("color"):
            shown = sorted({row[color["field"]] for row in rows})
            range_ = [palette[str(key)] for key in shown]
            color["scale"] = {"domain": shown, "range": range_}
