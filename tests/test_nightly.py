"""What is measured at night; no benchmark runs here."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tracking import nightly
from tracking.changes import Change
from tracking.results import Value


@pytest.fixture
def night(monkeypatch):
    """What a night would run, in order; `measured` are the commits that need no run."""
    ran = []
    history = ["one", "two", "three", "head"]

    def git(command, *args):
        since = args[-1].removesuffix("..HEAD")
        return "head" if command == "rev-parse" else "\n".join(history[history.index(since) + 1 :])

    monkeypatch.setattr(nightly, "git", git)
    monkeypatch.setattr(nightly, "environment_name", lambda config: "env")
    monkeypatch.setattr(nightly, "config_for", lambda backend: "config")

    def asv(*args, config):
        commits = args[-1]
        if commits.startswith("HASHFILE:"):
            asv.patterns = [args[i + 1] for i, arg in enumerate(args) if arg == "--bench"]
            ran.extend(Path(commits.removeprefix("HASHFILE:")).read_text().split())
        else:
            ran.append(args)
        return asv.status

    asv.status = 0
    params = [["1"], ["1024", "32768"], ["32"]]
    names = ["batch", "context", "block_size"]
    listed = {
        name: {"name": name, "params": params, "param_names": names}
        for name in ("decode.A.time_a", "settled.B.ratio_b")
    }
    monkeypatch.setattr(nightly, "discover", lambda *args: listed)
    run = SimpleNamespace(run=lambda *args, **kw: ran.append("history") or 0)
    monkeypatch.setattr(nightly, "asv", asv)
    monkeypatch.setattr(nightly, "history", run)
    return SimpleNamespace(ran=ran, asv=asv)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([], ["history"]),
        (["one"], ["two", "three", "head", "history", "again"]),
        (["one", "three"], ["head", "history", "again"]),
        (["one", "head"], ["history", "again"]),
        (["head"], ["history"]),
    ],
)
def test_a_night(measured, expected, night, monkeypatch):
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: measured)
    monkeypatch.setattr(nightly, "again", lambda *args: night.ran.append("again") or 0)
    assert nightly.nightly("box", "cpu", "short") == 0
    assert night.ran == expected
    if {"two", "head"} & set(night.ran):
        assert night.asv.patterns == [r"^decode\.A\.time_a\((1,\ 1024,\ 32)\)$"]


@pytest.mark.parametrize(("status", "goes_on"), [(2, True), (1, False)])
def test_a_failed_benchmark_does_not_end_the_night(status, goes_on, night, monkeypatch):
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: ["one"])
    monkeypatch.setattr(nightly, "again", lambda *args: night.ran.append("again") or 0)
    night.asv.status = status
    assert nightly.nightly("box", "cpu", "short") == status
    assert ("history" in night.ran) is ("again" in night.ran) is goes_on


def test_what_looks_worse_is_measured_again(night, monkeypatch, capsys):
    def change(name, after, better="smaller"):
        before, now = Value(1.0, 0.99, 1.01), Value(after, after, after) if after else Value(None)
        return Change(f"{name}(1)", before, now, True, better)

    rounds = iter(
        [
            [
                change("overhead.A.ratio_x", 1.3),
                change("decode.B.time_x", None),
                change("memory.C.track_c", 3.0, "larger"),
                change("scheduler.E.track_e", 0.5, "larger"),
                change("gone.D.time_d", None),
                change("settled.F.ratio_f", None),
                change("host.G.ratio_g", 1.4),
            ],
            [
                change("overhead.A.ratio_x", 1.01),
                change("decode.B.time_x", None),
                change("memory.C.track_c", 3.0, "larger"),
                change("gone.D.time_d", None),
                change("host.G.ratio_g", 1.4),
            ],
        ]
    )
    monkeypatch.setattr(nightly, "changes", lambda *args: next(rounds))
    kept = []
    monkeypatch.setattr(nightly, "rows_of_results", lambda *args: [(len(night.ran), args)])
    monkeypatch.setattr(nightly, "record", lambda machine, rows: kept.extend(rows))
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: ["old", "head"])
    monkeypatch.setattr(nightly.triage, "between", lambda before, after: ["c" * 40, "head"])
    entry = nightly.triage.Accepted("c" * 8, "host.G.*", "correct now", "https://x/1")
    monkeypatch.setattr(nightly.triage, "read", lambda: [entry])
    names = ("overhead.A.ratio_x", "decode.B.time_x", "memory.C.track_c", "scheduler.E.track_e")
    names = (*names, "host.G.ratio_g", "settled.F.ratio_f")  # the quick grid does not ask for it
    listed = {name: {"name": name, "params": [], "param_names": []} for name in names}
    monkeypatch.setattr(nightly, "discover", lambda *args: listed)
    assert nightly.again("box", "cpu", "env", "head", "short") == 0
    assert [args[-1] for args in night.ran] == ["old^!", "head^!"]
    asked = " ".join(night.ran[0])
    assert "overhead" in asked
    assert "decode" in asked
    assert "track_e" in asked
    assert "track_c" not in asked
    assert "gone" not in asked
    assert "settled" not in asked
    assert f"rounds={nightly.AGAIN}" in asked
    said = "accepted (correct now, https://x/1): host.G.ratio_g(1) 1.40 [1.39, 1.41]"
    assert capsys.readouterr().out == f"failed: decode.B.time_x(1) \n{said}\n"
    # Before they were measured again.
    asked = ["decode.B.time_x", "host.G.ratio_g", "overhead.A.ratio_x", "scheduler.E.track_e"]
    assert kept == [(0, ("box", ("old", "head"), "env", asked))]


def test_nothing_looks_worse(night, monkeypatch, capsys):
    monkeypatch.setattr(nightly, "changes", lambda *args: [])
    monkeypatch.setattr(nightly, "discover", lambda *args: {})
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: ["old", "head"])
    assert nightly.again("box", "cpu", "env", "head", "short") == 0
    assert (night.ran, capsys.readouterr().out) == ([], "no regressions\n")


def test_the_newest_mlx_is_an_axis_of_its_own(monkeypatch):
    ran = []
    monkeypatch.setenv("ASV_UNLOCKED", "")  # it sets that
    monkeypatch.setattr(nightly, "newest_mlx", lambda: "99.0")
    monkeypatch.setattr(nightly, "derive_config", lambda name, **s: ran.append(s) or "config")
    monkeypatch.setattr(nightly, "discover", lambda *args: {})
    monkeypatch.setattr(nightly, "asv", lambda *args, **kw: 0)
    assert nightly.with_newest_mlx("box", "cpu") == 0
    assert ran[0]["matrix"]["req"]["mlx"] == ["99.0"]
    assert "pip+asv_runner" in ran[0]["matrix"]["req"]


def test_the_pinned_mlx_is_not_measured_twice(monkeypatch, capsys):
    pinned = nightly.asv_settings()["matrix"]["req"]["mlx"][0]
    monkeypatch.setattr(nightly, "newest_mlx", lambda: pinned)
    assert nightly.with_newest_mlx("box", "cpu") == 0
    assert "measured anyway" in capsys.readouterr().out
