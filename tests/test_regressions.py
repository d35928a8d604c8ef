"""What is published as a regression: by the noise of a series, and which direction is better."""

import json
from types import SimpleNamespace

import pytest
from asv.graph import Graph
from asv.plugins.summarylist import SummaryList

from tracking import noise, triage
from tracking.project import asv_settings
from website import regressions
from website.regressions import Levels, SeriesRegressions

SERIES = "a.B.ratio_c"


class Graphs(list):
    def get_params(self):
        return {"machine": {"box", "other"}}

    def get_graph_group(self, name):
        return [graph for _, graph in self]


def publish(tmp_path, monkeypatch, nights, runs, *, machine="box", accepted=(), **described):
    """Publish a benchmark with a value (or one by cell) a night, after runs of identical code.

    Return what asv's pages get: regressions, and the rows of its list.
    """
    listed = {"name": SERIES, "params": [], "param_names": []} | described
    name = listed["name"]
    graph = Graph(name, {"machine": machine})
    for revision, value in enumerate(nights):
        graph.add_data_point(revision, value)
    rows = [
        [f"2026-12-{day:02}", "c", "code", "env", 2, 10, name, value]
        for day, value in enumerate(runs, start=1)
    ]
    rows = [dict(zip(noise.HEADER, row, strict=True)) for row in rows]
    noise.write(tmp_path / "results/box/noise.csv", rows)
    conf = SimpleNamespace(
        regressions_first_commits={},
        regressions_thresholds={},
        results_dir=str(tmp_path / "results"),
        html_dir=str(tmp_path),
        branches=["main"],
    )
    repo = SimpleNamespace(
        get_range_spec=lambda a, b: (a, b), get_hashes_from_range=lambda spec: [1, 2]
    )
    monkeypatch.setattr(triage, "read", lambda: list(accepted))
    monkeypatch.setattr(SeriesRegressions, "_save_feed", lambda *args: None)
    revisions = {str(number): number for number in range(len(nights))}
    graphs, benchmarks = Graphs([(f"graphs/{name}", graph)]), {name: listed}
    for plugin in sorted((SeriesRegressions, SummaryList, Levels), key=lambda p: p.order):
        plugin.publish(conf, repo, benchmarks, graphs, revisions)
    [summary] = (tmp_path / "graphs").rglob(f"machine-{machine}/summary.json")
    return (
        json.loads((tmp_path / "regressions.json").read_text())["regressions"],
        json.loads(summary.read_text()),
    )


QUIET = [1.0, 1.01] * 6  # a threshold of 4.1%
LOUD = [1.0, 1.2, 1.1] * 4


@pytest.mark.parametrize(
    ("nights", "better", "last_and_best"),
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
    nights, better, last_and_best, tmp_path, monkeypatch
):
    nights = [nights[0]] * 3 + [nights[1]] * 3
    found, _ = publish(tmp_path, monkeypatch, nights, QUIET, better=better)
    if last_and_best is None:
        assert found == []
        return
    [[name, _, params, _, last, best, jumps]] = found
    assert (name, params) == (SERIES, {"machine": "box"})
    assert (last, best) == pytest.approx(last_and_best)
    [[before, after, *values]] = jumps
    assert (before, after) == (2, 3)
    assert values == pytest.approx([best, last])


@pytest.mark.parametrize(
    ("nights", "runs", "found"),
    [
        ([1.0] * 7 + [1.1], QUIET, True),  # on the next night
        ([1.0] * 7 + [1.05] * 3, QUIET, True),
        ([1.0] * 7 + [1.02] * 3, QUIET, False),
        ([1.0] * 7 + [1.3], LOUD, False),
        ([1.0] * 7 + [1.3], [], False),  # nobody knows the noise
        ([1.0] * 7 + [1.3], [1.0, 1.01], False),
        ([1.0] * 3 + [1.1] + [1.0] * 3, QUIET, False),  # it went away
        ([1.0, 1.01, 0.99, 1.0, 1.01, 1.02, 1.0], QUIET, False),
        ([1.0] * 7, QUIET, False),
        ([None, 1.0, None, 1.0, 1.0, 1.1, None], QUIET, True),
        ([None] * 4, QUIET, False),
    ],
)
def test_the_noise_of_the_series_decides(nights, runs, found, tmp_path, monkeypatch):
    published, [row] = publish(tmp_path, monkeypatch, nights, runs)
    assert bool(published) is found
    # Nor does asv's list have anything in red.
    assert (row["prev_value"] is not None and row["last_value"] > row["prev_value"]) is found


def test_what_was_accepted_is_published_as_such(tmp_path, monkeypatch):
    nights = [1.0] * 4 + [1.1] * 4 + [1.3] * 4
    monkeypatch.setattr(triage, "between", lambda before, after: [f"{before}..{after}"])
    warned = []
    monkeypatch.setattr(regressions.log, "warning", warned.append)

    def published(*entries):
        entries = [triage.Accepted(*entry, "why", "https://x/1") for entry in entries]
        found, _ = publish(tmp_path, monkeypatch, nights, QUIET, accepted=entries)
        return found, json.loads((tmp_path / "regressions.json").read_text())["accepted"]

    [[*_, both]], accepted = published()
    assert [jump[:2] for jump in both] == [[3, 4], [7, 8]]
    assert accepted == []
    [[*_, left]], [known] = published(("3..4", "a.*"))
    assert left == both[1:]
    assert (known["reason"], known["link"], known["commit"]) == ("why", "https://x/1", "3..4")
    assert known["regression"][0] == SERIES
    assert known["regression"][-1] == both[:1]
    assert warned == []
    found, accepted = published(("3..4", "a.*"), ("7..8", SERIES), ("7..8", "b.*"))
    assert found == []
    assert len(accepted) == 2
    [sentence] = warned
    assert "b.* at 7..8 is stale" in sentence


def test_noise_is_a_machines(tmp_path, monkeypatch):
    nights = [1.0] * 7 + [1.1]
    assert publish(tmp_path, monkeypatch, nights, QUIET)[0]
    assert publish(tmp_path, monkeypatch, nights, QUIET, machine="other")[0] == []


def test_what_is_counted_needs_no_noise(tmp_path, monkeypatch):
    for nights, expected in (([1000.0] * 7 + [1030.0], True), ([1000.0] * 7 + [1005.0], False)):
        found, _ = publish(
            tmp_path, monkeypatch, nights, [], name="a.B.track_instructions", machine="other"
        )
        assert bool(found) is expected


def test_cells_have_thresholds_of_their_own(tmp_path, monkeypatch):
    nights = [[1.0, 1.0]] * 7 + [[1.0, 1.2]]
    cells = {"params": [["1", "4"]], "param_names": ["batch"]}
    publish(tmp_path, monkeypatch, nights, [], **cells)
    [rows, results] = [[], tmp_path / "results/box/noise.csv"]
    for cell, runs in (("1", LOUD), ("4", QUIET)):
        rows += [
            dict(
                zip(
                    noise.HEADER,
                    [f"2026-12-{day:02}", "c", "code", "env", 2, 10, f"{SERIES}({cell})", value],
                    strict=True,
                )
            )
            for day, value in enumerate(runs, start=1)
        ]
    write = noise.write
    monkeypatch.setattr(noise, "write", lambda *args: None)
    write(results, rows)
    found, _ = publish(tmp_path, monkeypatch, nights, [], **cells)
    assert [regression[0] for regression in found] == [f"{SERIES}(4)"]
    turned = [[b, a] for a, b in nights]
    assert publish(tmp_path, monkeypatch, turned, [], **cells)[0] == []


def test_a_broken_record_of_noise_stops_no_page(tmp_path, monkeypatch, caplog):
    write = noise.write
    monkeypatch.setattr(
        noise, "write", lambda file, rows: write(file, rows) or file.write_text("x")
    )
    assert publish(tmp_path, monkeypatch, [1.0] * 7 + [2.0], QUIET)[0] == []


def test_ours_come_before_and_after_asvs_own():
    assert Levels.order < SummaryList.order
    assert SeriesRegressions.order > SeriesRegressions.__base__.order
    assert "regressions_thresholds" not in asv_settings()
