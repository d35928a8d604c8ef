"""What asv publishes as a regression, by which direction is better."""

import json
import re
from types import SimpleNamespace

import pytest

from tracking.project import asv_settings
from website.regressions import DirectedRegressions


class Graphs(list):
    def get_params(self):
        return {"machine": ["box"]}


def found(tmp_path, monkeypatch, steps, **described):
    """Publish a benchmark of one cell whose series has these levels, two commits each."""
    detected = [(2 * i, 2 * i + 2, level, level, 0.0) for i, level in enumerate(steps)]
    graph = SimpleNamespace(params={"machine": "box"}, path="p", get_steps=lambda: detected)
    conf = SimpleNamespace(
        regressions_first_commits={},
        regressions_thresholds={".*": 0.1},
        html_dir=str(tmp_path),
        branches=["main"],
    )
    repo = SimpleNamespace(
        get_range_spec=lambda a, b: (a, b), get_hashes_from_range=lambda spec: [1, 2]
    )
    monkeypatch.setattr(DirectedRegressions, "_save_feed", lambda *args: None)
    listed = {"a.B.track_c": {"name": "a.B.track_c", "params": []} | described}
    revisions = {str(number): number for number in range(2 * len(steps))}
    graphs = Graphs([("graphs/a.B.track_c", graph)])
    DirectedRegressions.publish(conf, repo, listed, graphs, revisions)
    return json.loads((tmp_path / "regressions.json").read_text())["regressions"]


@pytest.mark.parametrize(
    ("steps", "better", "last_and_best"),
    [
        ([80.0, 40.0], "larger", (40.0, 80.0)),
        ([40.0, 80.0], "larger", None),
        ([40.0, 80.0], "smaller", (80.0, 40.0)),
        ([80.0, 40.0], "smaller", None),
        ([80.0, 79.0], "larger", None),
        ([80.0, 0.0], "larger", (0.0, 80.0)),
    ],
)
def test_a_regression_is_a_step_away_from_what_is_better(
    steps, better, last_and_best, tmp_path, monkeypatch
):
    regressions = found(tmp_path, monkeypatch, steps, better=better)
    if last_and_best is None:
        assert regressions == []
        return
    [[name, path, _, _, last, best, jumps]] = regressions
    assert (name, path) == ("a.B.track_c", "p.json")
    assert (last, best) == pytest.approx(last_and_best)
    [[before, after, *levels]] = jumps
    assert (before, after) == (1, 2)
    assert levels == pytest.approx([best, last])


def test_what_says_nothing_is_better_smaller(tmp_path, monkeypatch):
    assert len(found(tmp_path, monkeypatch, [1.0, 2.0])) == 1
    assert found(tmp_path, monkeypatch, [2.0, 1.0]) == []


def test_ours_is_published_after_asvs_own():
    assert DirectedRegressions.order > DirectedRegressions.__base__.order


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("step.Instructions.track_instructions(1)", 0.01),
        ("step.Host.track_host(1)", 0.1),
        ("host.NumPy.track_version", 0.1),
        ("step.Auto.ratio_step_vs_contiguous(1, 1024, 32)", 0.1),
        ("decode.Auto.time_decode(1, 1024, 32)", 0.75),
    ],
)
def test_one_percent_more_of_what_is_counted_is_published_as_a_regression(name, threshold):
    given = asv_settings()["regressions_thresholds"]
    assert max(value for regex, value in given.items() if re.match(regex, name)) == threshold
