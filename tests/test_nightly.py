"""What is measured at night; no benchmark runs here."""

import itertools
from pathlib import Path

import pytest

from tracking import nightly
from tracking.changes import Change
from tracking.results import Value

GRID = {
    "param_names": ["batch", "context", "block_size"],
    "params": [["1"], ["1024", "32768"], ["32"]],
}
NAMES = ("decode.A.time_a", "host.B.ratio_b", "memory.C.track_c", "settled.D.ratio_d")
LISTED = {name: {"name": name, **GRID} for name in NAMES}


@pytest.fixture
def night(monkeypatch):
    """What a night runs, in order, after `night.measured`; asv's exit status is `night.status`."""
    history = ["one", "two", "three", "head"]

    def git(command, *args):
        since = args[-1].removesuffix("..HEAD")
        return "head" if command == "rev-parse" else "\n".join(history[history.index(since) + 1 :])

    def asv(*args, config):
        file = args[-1].removeprefix("HASHFILE:")
        night.ran += [file] if file == args[-1] else Path(file).read_text().split()
        options = itertools.pairwise(args)
        night.asked = [value for name, value in options if name in ("--bench", "--attribute")]
        return night.status

    def night():
        return nightly.nightly(machine="box", backend="cpu", grid="short")

    night.ran, night.status, night.worse = [], 0, [[]]
    for name, value in {
        "git": git,
        "asv": asv,
        "environment_name": lambda config: "env",
        "config_for": lambda backend: "config",
        "discover": lambda *args: LISTED,
        "measured_commits": lambda machine, environment: night.measured,
        "changes": lambda *args: night.worse[0] and night.worse.pop(0),
    }.items():
        monkeypatch.setattr(nightly, name, value)
    monkeypatch.setattr(nightly.history, "run", lambda *args, **kw: night.ran.append("phases") or 0)
    return night


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([], ["phases"]),
        (["one"], ["two", "three", "head", "phases"]),
        (["one", "three"], ["head", "phases"]),
        (["one", "head"], ["phases"]),
    ],
)
def test_what_is_new_is_measured_the_oldest_first(measured, expected, night, capsys):
    night.measured = measured
    assert night() == 0
    assert night.ran == expected
    if "head" in expected:
        assert night.asked[0] == r"^decode\.A\.time_a\((1,\ 1024,\ 32)\)$"
        assert len(night.asked) == 3  # what settled a decision is not measured
    assert ("no regressions" in capsys.readouterr().out) == bool(measured)


@pytest.mark.parametrize(("status", "goes_on"), [(2, True), (1, False)])
def test_a_failed_benchmark_does_not_end_the_night(status, goes_on, night):
    night.measured, night.status = ["one"], status
    assert night() == status
    assert ("phases" in night.ran) is goes_on


def change(name, after, better="smaller"):
    return Change(f"{name}(1, 1024, 32)", Value(1.0), Value(after), True, better)


def test_what_looks_worse_is_measured_again_at_both_commits(night, capsys):
    night.measured = ["one", "head"]
    fails, slow = change("decode.A.time_a", None), change("host.B.ratio_b", 1.3)
    night.worse = [
        [
            *(fails, slow, change("memory.C.track_c", 3.0, "larger")),
            *(change("settled.D.ratio_d", 2.0), change("gone.E.time_e", None)),
            Change("host.B.ratio_b(1, 32768, 32)", Value(1.0), Value(2.0), True),  # is in no night
        ],
        [fails, change("host.B.ratio_b", 1.0)],
    ]
    assert night() == 0
    assert night.ran == ["phases", "one^!", "head^!"]
    patterns = [r"^decode\.A\.time_a\((1,\ 1024,\ 32)\)$", r"^host\.B\.ratio_b\((1,\ 1024,\ 32)\)$"]
    assert night.asked == [*patterns, f"rounds={nightly.AGAIN}"]
    assert capsys.readouterr().out == "failed: decode.A.time_a(1, 1024, 32) \n"
