"""What is published as a regression: by the noise of a series, and which direction is better."""

import pytest
from asv.graph import Graph

from tracking import noise, triage
from tracking.project import asv_settings
from website import regressions

SERIES = "a.B.ratio_c"
QUIET = [1.0, 1.01] * 6  # a threshold of 4.1%
LOUD = [1.0, 1.2, 1.1] * 4


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Publish a benchmark with a value (or one by cell) a night, after runs of identical code.

    Return what is published.
    """
    monkeypatch.setattr(regressions, "commit_labels", lambda commits: {c: c for c in commits})
    monkeypatch.setattr(regressions, "subjects", lambda commits: dict.fromkeys(commits, "Title"))
    monkeypatch.setattr(triage, "between", lambda before, after: [f"{before}..{after}"])

    def call(nights, runs, *, machine="box", accepted=(), **described):
        listed = {"name": SERIES, "params": [], "param_names": []} | described
        graph = Graph(listed["name"], {"machine": machine})
        for revision, value in enumerate(nights):
            graph.add_data_point(revision, value)
        runs = runs if isinstance(runs, dict) else {listed["name"]: runs}
        rows = [
            [f"2026-12-{day:02}", "c", "code", "env", 2, 10, name, value]
            for name, values in runs.items()
            for day, value in enumerate(values, start=1)
        ]
        rows = [dict(zip(noise.HEADER, row, strict=True)) for row in rows]
        noise.write(tmp_path / "box/noise.csv", rows)
        monkeypatch.setattr(triage, "read", lambda: list(accepted))
        revisions = {f"c{number}": number for number in range(len(nights))}
        graphs, benchmarks = [("graphs/x", graph)], {listed["name"]: listed}
        return regressions.regressions(graphs, benchmarks, revisions, str(tmp_path))

    return call


@pytest.mark.parametrize(
    ("nights", "better", "factor"),
    [
        ([80.0, 40.0], "larger", 2),
        ([40.0, 80.0], "larger", None),
        ([40.0, 80.0], "smaller", 2),
        ([80.0, 40.0], "smaller", None),
        ([80.0, 79.0], "larger", None),
        ([80.0, 0.0], "larger", 8e101),
    ],
)
def test_a_regression_is_a_step_away_from_what_is_better(nights, better, factor, publish):
    found = publish([nights[0]] * 3 + [nights[1]] * 3, QUIET, better=better)
    assert [one["factor"] for one in found] == ([] if factor is None else [pytest.approx(factor)])
    for one in found:
        assert (one["name"], one["machine"], one["subject"]) == (SERIES, "box", "Title")
        assert (one["from"], one["to"], one["accepted"]) == ("c2", "c3", None)


@pytest.mark.parametrize(
    ("nights", "runs", "count"),
    [
        ([1.0] * 7 + [1.1], QUIET, 1),  # on the next night
        ([1.0] * 7 + [1.05] * 3, QUIET, 1),
        ([1.0] * 7 + [1.02] * 3, QUIET, 0),
        ([1.0] * 7 + [1.3], LOUD, 0),
        ([1.0] * 7 + [1.3], [], 0),  # the noise is not known
        ([1.0] * 7 + [1.3], [1.0, 1.01], 0),
        ([1.0] * 3 + [1.1] + [1.0] * 3, QUIET, 0),  # it went away
        ([1.0, 1.01, 0.99, 1.0, 1.01, 1.02, 1.0], QUIET, 0),
        ([None, 1.0, None, 1.0, 1.0, 1.1, None], QUIET, 1),
        ([None] * 4, QUIET, 0),
    ],
)
def test_the_noise_of_the_series_decides(nights, runs, count, publish):
    assert len(publish(nights, runs)) == count


def test_what_was_accepted_is_published_as_such(publish, monkeypatch):
    warned = []
    monkeypatch.setattr(regressions.log, "warning", warned.append)
    nights = [1.0] * 4 + [1.1] * 4 + [1.3] * 4
    entry = triage.Accepted("c3..c4", "a.*", "why", "https://x/1")
    stale = triage.Accepted("c7..c8", "b.*", "why", "https://x/1")
    by_commit = {one["to"]: one["accepted"] for one in publish(nights, QUIET, accepted=[entry])}
    assert by_commit == {"c4": {"reason": "why", "link": "https://x/1"}, "c8": None}
    assert warned == []
    publish(nights, QUIET, accepted=[entry, stale])
    assert "b.* at c7..c8 is stale" in warned[0]


def test_noise_is_a_machines_and_what_is_counted_needs_none(publish):
    nights = [1.0] * 7 + [1.1]
    assert publish(nights, QUIET)
    assert not publish(nights, QUIET, machine="other")
    assert publish([1000] * 7 + [1030], [], name="a.B.track_instructions", machine="other")
    assert not publish([1000] * 7 + [1005], [], name="a.B.track_instructions", machine="other")


def test_cells_have_thresholds_of_their_own(publish):
    runs = {f"{SERIES}(1)": LOUD, f"{SERIES}(4)": QUIET}
    cells = {"params": [["1", "4"]], "param_names": ["batch"]}
    found = publish([[1.0, 1.0]] * 7 + [[1.0, 1.2]], runs, **cells)
    assert [one["name"] for one in found] == [f"{SERIES}(4)"]
    assert not publish([[1.0, 1.0]] * 7 + [[1.2, 1.0]], runs, **cells)


def test_a_broken_record_of_noise_stops_no_page(publish, tmp_path, monkeypatch):
    warned, write = [], noise.write
    monkeypatch.setattr(regressions.log, "warning", warned.append)
    monkeypatch.setattr(noise, "write", lambda file, r: write(file, r) or file.write_text("x"))
    assert publish([1.0] * 7 + [2.0], QUIET) == []
    assert warned[0].startswith("the thresholds of box are guesses: ")


def test_asv_looks_for_none_itself():
    assert asv_settings()["regressions_first_commits"] == {".*": None}
