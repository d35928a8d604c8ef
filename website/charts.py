"""The pictures of overhead.html: Vega-Lite over rows that are named, not held."""

import altair as alt


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
    return alt.layer(*layers).properties(width="container", height=300, background="transparent")


def _ratio(field, title="time over contiguous"):
    ticks = [0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30]
    scale = alt.Scale(type="log", nice=False, zero=False, padding=10)
    axis = alt.Axis(values=ticks, format="~g", tickCount=len(ticks))
    return alt.Y(field, title=title, scale=scale, axis=axis)


def _speedup(field):
    return _ratio(field, "tokens a second over mlx-lm's")


def _speed(field):
    return alt.Y(field, title="GB/s", scale=alt.Scale(zero=True))


_CONTEXT = alt.X(
    "context:Q",
    title="context length in tokens",
    scale=alt.Scale(type="log", base=2, nice=False, padding=16),
    axis=alt.Axis(values=[2**power for power in range(8, 20)], format="d", grid=False),
)
_COMMIT = alt.X("label:N", title=None, sort=None, axis=alt.Axis(labelAngle=-30))
_BY_CONTEXT = alt.Color(
    "context:O",
    title="tokens",
    scale=alt.Scale(scheme="viridis"),
    legend=alt.Legend(orient="top", symbolOpacity=1),
)
_BY_PATH = alt.Color(
    "path:N", title=None, legend=alt.Legend(orient="top", columns=2, symbolOpacity=1)
)
_TIP = [
    *("label:N", "path:N", "batch:Q", "context:Q", "block:Q"),
    *(alt.Tooltip(f"{key}:Q", format=".3~g") for key in ("value", "low", "high")),
]

CHARTS = {
    "phases": _lines(_COMMIT, _ratio, _BY_CONTEXT, _TIP, band=True, at=1),
    "tokens": _lines(_COMMIT, _speedup, _BY_CONTEXT, _TIP, band=True, at=1),
    "contexts": _lines(_CONTEXT, _ratio, _BY_PATH, _TIP, at=1),
    "bandwidths": _lines(_CONTEXT, _speed, _BY_PATH, _TIP),
}
"""Charts of rows as in `series_of`, with the label of the row's commit added."""
