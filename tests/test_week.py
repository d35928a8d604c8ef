"""The simulated week: real commits and a real `asv publish`, with results that a script makes."""

import csv
import json

import pytest
from asv.util import UserError

from tracking import noise, project, week
from tracking.detection import DETECTION
from tracking.repository import git

BENCHMARK = {
    "code": "",
    "name": DETECTION,
    "param_names": ["batch", "context", "block_size"],
    "params": [["1", "4"], ["1024"], ["32"]],
    "timeout": 60,
    "type": "ratio",
    "unit": "x",
    "version": "1",
}


@pytest.fixture(params=["quiet", "loud"])
def host(request, tmp_path, monkeypatch):
    """A machine that is (quiet) or not, whose runs give what `times` has next, in both cells."""
    results = tmp_path / "results"
    monkeypatch.setattr(week, "RESULTS", results)
    rows = [
        [
            f"2026-11-{day:02}T00:00:00+00:00",
            "c",
            "code",
            "env",
            2,
            10,
            f"{DETECTION}({cell})",
            value,
        ]
        for day, value in enumerate([0.5, 0.6 if request.param == "loud" else 0.5] * 6, start=1)
        for cell in ("1, 1024, 32", "4, 1024, 32")
    ]
    noise.write(results / "box/noise.csv", [dict(zip(noise.HEADER, r, strict=True)) for r in rows])
    known = noise.recorded_noise("box", results)
    monkeypatch.setattr(week, "recorded_noise", lambda machine, results=None: known)
    monkeypatch.setattr(week, "environment_name", lambda config: "env")
    monkeypatch.setattr(week, "FOLDER", tmp_path / ".asv/week")
    monkeypatch.setattr(
        week,
        "derive_config",
        lambda name, **settings: project.derive_config("week-test", **settings),
    )
    times = []

    def discover(machine, config):
        folder = tmp_path / ".asv/week/results"
        (folder / "benchmarks.json").write_text(json.dumps({DETECTION: BENCHMARK, "version": 2}))
        machine = {"machine": "box", "os": "", "arch": "", "cpu": "", "num_cpu": "", "ram": ""}
        (folder / "box/machine.json").write_text(json.dumps({**machine, "version": 1}))
        return {DETECTION: BENCHMARK}

    monkeypatch.setattr(week, "discover", discover)

    def asv(command, *args, config):
        if command == "publish":
            return project.asv(command, *args, config=config)
        commit, value = args[-1].removesuffix("^!"), times.pop(0)
        if value is None:
            return 2
        columns = ["result", "params", "version", "started_at"]
        row = [[value, value], BENCHMARK["params"], "1", 1]
        (tmp_path / f".asv/week/results/box/{commit[:8]}-env.json").write_text(
            json.dumps(
                {
                    "commit_hash": commit,
                    "env_name": "env",
                    "date": 1,
                    "params": {"machine": "box", "python": "3"},
                    "python": "3",
                    "requirements": {},
                    "env_vars": {},
                    "result_columns": columns,
                    "results": {DETECTION: row},
                    "durations": {},
                    "version": 2,
                }
            )
        )
        return 0

    monkeypatch.setattr(week, "asv", asv)
    return times, results / "box/week.csv", request.param == "quiet"


def test_a_week_is_measured_and_published_night_by_night(host, monkeypatch):
    times, file, quiet = host
    monkeypatch.setattr(week, "NIGHTS", 2)
    monkeypatch.setattr(week, "AFTER", ((10, 1), (5, 1)))
    times += [0.5, 0.505, 0.56, 0.53]
    before = git("for-each-ref")
    assert week.week(machine="box", backend="cpu") == 0
    assert git("for-each-ref") == before
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    assert header == week.HEADER
    assert rows == [
        ["1", "0%", "0", "0", "0", "0"],
        ["2", "0%", "0", "2", "0", "0"],
        # 10% slower and 5% slower are two histories.
        ["3", "10%", "2", "4", "4", "0"] if quiet else ["3", "10%", "0", "4", "0", "0"],
        ["3", "5%", "2", "4", "4", "0"] if quiet else ["3", "5%", "0", "4", "0", "0"],
    ]


def test_a_failure_ends_the_week_and_leaves_nothing(host):
    times, file, _ = host
    times += [None]
    before = git("for-each-ref")
    with pytest.raises(UserError, match="a benchmark failed"):
        week.week(machine="box", backend="cpu")
    assert git("for-each-ref") == before
    assert not file.exists()


def test_a_week_needs_the_noise(monkeypatch):
    monkeypatch.setattr(week, "recorded_noise", lambda machine: noise.Noise())
    with pytest.raises(UserError, match="run `make noise`"):
        week.week(machine="box", backend="cpu")
