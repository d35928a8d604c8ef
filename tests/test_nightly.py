"""Results on a branch of their own, and what is measured at night; no benchmark runs here."""

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from asv.util import UserError

from tracking import nightly
from tracking.changes import Change
from tracking.results import RENAMED, Value


def git(root, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clones(tmp_path):
    """Two clones of a repository whose main tracks one machine's results and ignores others."""
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin")
    first = tmp_path / "first"
    git(tmp_path, "clone", "--quiet", "origin", "first")
    git(first, "checkout", "--quiet", "-b", "main")
    (first / "results/old").mkdir(parents=True)
    (first / "results/old/a.json").write_text("old")
    (first / ".gitignore").write_text("/results/*\n")
    git(first, "add", "--force", "results/old", ".gitignore")
    git(first, "commit", "--quiet", "-m", "begin")
    git(first, "push", "--quiet", "origin", "main")
    git(tmp_path, "clone", "--quiet", "origin", "second")
    return first, tmp_path / "second"


def test_results_travel_by_a_branch_and_leave_main_alone(clones, capsys):
    first, second = clones
    nightly.fetch_results(root=second)
    assert "no branch results yet" in capsys.readouterr().out
    nightly.push_results(root=first)
    assert "no new results" in capsys.readouterr().out
    head = git(first, "rev-parse", "HEAD")
    (first / "results/mac").mkdir()
    (first / "results/mac/b.json").write_text("new")
    (first / "results/mac/noise.csv").write_text("main has this")
    (first / "results/benchmarks.json").write_text("derived")
    nightly.push_results(root=first)
    nightly.fetch_results(root=second)
    assert git(second, "ls-tree", "-r", "--name-only", "FETCH_HEAD") == "results/mac/b.json"
    assert (second / "results/mac/b.json").read_text() == "new"
    for clone in clones:
        assert git(clone, "status", "--porcelain") == ""
        assert git(clone, "rev-parse", "HEAD") == head == git(clone, "rev-parse", "origin/main")


def result(**started):
    """A file of results: {benchmark: when it was started}, whose values say when, too."""
    rows = {name: [[float(when)], [], "1", when] for name, when in started.items()}
    columns = ["result", "params", "version", "started_at"]
    return json.dumps({"version": 2, "result_columns": columns, "results": rows})


def test_a_second_push_adds_and_keeps(clones, capsys):
    first, second = clones
    (first / "results/mac").mkdir()
    (first / "results/mac/b.json").write_text(result(a=1))
    nightly.push_results(root=first)
    nightly.push_results(root=first)
    assert "no new results" in capsys.readouterr().out
    (second / "results/mac").mkdir()
    (second / "results/mac/c.json").write_text(result(a=2))
    nightly.push_results(root=second)
    (first / "results/mac/b.json").unlink()
    nightly.fetch_results(root=first)
    files = sorted(path.name for path in (first / "results").rglob("*.json"))
    assert files == ["a.json", "b.json", "c.json"]
    assert git(first, "rev-list", "--count", "FETCH_HEAD") == "2"


def test_what_both_have_is_merged_by_benchmark(clones):
    first, second = clones
    for clone, content in ((first, result(a=1, b=5, c=3)), (second, result(a=4, b=2, d=6))):
        (clone / "results/mac").mkdir()
        (clone / "results/mac/b.json").write_text(content)
        (clone / "results/mac/machine.json").write_text(f'"{clone.name}"')
    nightly.push_results(root=first)
    nightly.fetch_results(root=second)
    merged = json.loads((second / "results/mac/b.json").read_text())["results"]
    assert {name: row[0] for name, row in merged.items()} == {
        "a": [4.0],
        "b": [5.0],
        "c": [3.0],
        "d": [6.0],
    }
    assert (second / "results/mac/machine.json").read_text() == '"second"'


def test_what_the_branch_has_under_old_names_is_renamed(clones):
    first, second = clones
    old, new = next(iter(RENAMED.items()))
    for clone, content in ((first, result(**{old: 4, "a": 1})), (second, result(**{old: 2}))):
        (clone / "results/mac").mkdir()
        (clone / "results/mac/b.json").write_text(content)
    (first / "results/mac/c.json").write_text(result(**{old: 4}))
    nightly.push_results(root=first)
    nightly.fetch_results(root=second)
    for name, names in (("b", {new, "a"}), ("c", {new})):
        merged = json.loads((second / f"results/mac/{name}.json").read_text())["results"]
        assert set(merged) == names
        assert merged[new][0] == [4.0]


def test_a_fuller_run_is_not_replaced_by_a_newer_quick_one(clones):
    first, second = clones
    for clone, values, when in ((first, [1.0, math.nan], 9), (second, [2.0, 3.0], 1)):
        content = json.loads(result(a=when))
        content["results"]["a"][0] = values
        (clone / "results/mac").mkdir()
        (clone / "results/mac/b.json").write_text(json.dumps(content))
    nightly.push_results(root=first)
    nightly.push_results(root=second)
    for clone in clones:
        nightly.fetch_results(root=clone)
        merged = json.loads((clone / "results/mac/b.json").read_text())["results"]
        assert merged["a"][0] == [2.0, 3.0]


def test_a_push_keeps_what_another_pushed_meanwhile(clones):
    first, second = clones
    for clone, when in ((first, 9), (second, 1)):
        (clone / "results/mac").mkdir()
        (clone / "results/mac/b.json").write_text(result(a=when))
        nightly.push_results(root=clone)
    git(second, "fetch", "--quiet", "origin", "results")
    show = git(second, "show", "FETCH_HEAD:results/mac/b.json")
    assert json.loads(show)["results"]["a"][0] == [9.0]


def test_a_push_during_a_push_is_an_error_and_stays(clones, monkeypatch):
    first, second = clones
    for clone, when in ((first, 9), (second, 1)):
        (clone / "results/mac").mkdir()
        (clone / "results/mac/b.json").write_text(result(a=when))
    fetch = nightly.fetch_results

    def fetch_then_another_pushes(remote, root):
        tip = fetch(remote, root)
        monkeypatch.setattr(nightly, "fetch_results", fetch)
        nightly.push_results(root=first)
        return tip

    monkeypatch.setattr(nightly, "fetch_results", fetch_then_another_pushes)
    with pytest.raises(UserError, match="git push"):
        nightly.push_results(root=second)
    git(second, "fetch", "--quiet", "origin", "results")
    show = git(second, "show", "FETCH_HEAD:results/mac/b.json")
    assert json.loads(show)["results"]["a"][0] == [9.0]


def test_what_main_records_later_is_not_overwritten(clones):
    first, second = clones
    (first / "results/old/a.json").write_text(result(a=1))
    nightly.push_results(root=first)
    (second / "results/old/a.json").write_text(result(a=2))
    git(second, "commit", "--quiet", "-am", "a later run")
    nightly.fetch_results(root=second)
    assert (second / "results/old/a.json").read_text() == result(a=2)
    assert git(second, "status", "--porcelain") == ""


def test_results_of_different_formats_are_not_merged(clones):
    first, second = clones
    other = json.loads(result(a=9))
    other |= {"result_columns": ["started_at", "result"], "results": {"a": [9, [9.0]]}}
    for clone, content in ((first, json.dumps(other)), (second, result(a=1))):
        (clone / "results/mac").mkdir()
        (clone / "results/mac/b.json").write_text(content)
    nightly.push_results(root=first)
    with pytest.raises(UserError, match=r"b\.json .* cannot merge"):
        nightly.fetch_results(root=second)
    assert (second / "results/mac/b.json").read_text() == result(a=1)


def test_a_remote_that_is_not_there(clones):
    (clones[0] / "results/old/b.json").write_text("new")
    with pytest.raises(UserError, match=r"ls-remote: .*nowhere"):
        nightly.push_results("nowhere", root=clones[0])


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
    assert nightly.nightly("box", "cpu", "quick") == 0
    assert night.ran == expected
    if {"two", "head"} & set(night.ran):
        assert night.asv.patterns == [r"^decode\.A\.time_a\((1,\ 1024,\ 32)\)$"]


@pytest.mark.parametrize(("status", "goes_on"), [(2, True), (1, False)])
def test_a_failed_benchmark_does_not_end_the_night(status, goes_on, night, monkeypatch):
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: ["one"])
    monkeypatch.setattr(nightly, "again", lambda *args: night.ran.append("again") or 0)
    night.asv.status = status
    assert nightly.nightly("box", "cpu", "quick") == status
    assert ("history" in night.ran) is ("again" in night.ran) is goes_on


def test_what_looks_worse_is_measured_again(night, monkeypatch, capsys):
    def change(name, after, better="smaller"):
        before, now = Value(1.0, 0.99, 1.01), Value(after, after, after) if after else Value(None)
        return Change(f"{name}(1)", before, now, True, 9, better)

    rounds = iter(
        [
            [
                change("overhead.A.ratio_x", 1.3),
                change("decode.B.time_x", None),
                change("memory.C.track_c", 3.0, "larger"),
                change("scheduler.E.track_e", 0.5, "larger"),
                change("gone.D.time_d", None),
                change("settled.F.ratio_f", None),
            ],
            [
                change("overhead.A.ratio_x", 1.01),
                change("decode.B.time_x", None),
                change("memory.C.track_c", 3.0, "larger"),
                change("gone.D.time_d", None),
            ],
        ]
    )
    monkeypatch.setattr(nightly, "changes", lambda *args: next(rounds))
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: ["old", "head"])
    names = ("overhead.A.ratio_x", "decode.B.time_x", "memory.C.track_c", "scheduler.E.track_e")
    names = (*names, "settled.F.ratio_f")  # the quick grid does not ask for it
    listed = {name: {"name": name, "params": []} for name in names}
    monkeypatch.setattr(nightly, "discover", lambda *args: listed)
    assert nightly.again("box", "config", "env", "head", "quick") == 0
    assert [args[-1] for args in night.ran] == ["old^!", "head^!"]
    asked = " ".join(night.ran[0])
    assert "overhead" in asked
    assert "decode" in asked
    assert "track_e" in asked
    assert "track_c" not in asked
    assert "gone" not in asked
    assert "settled" not in asked
    assert f"rounds={nightly.AGAIN}" in asked
    assert capsys.readouterr().out == "failed: decode.B.time_x(1) \n"


def test_nothing_looks_worse(night, monkeypatch, capsys):
    monkeypatch.setattr(nightly, "changes", lambda *args: [])
    monkeypatch.setattr(nightly, "discover", lambda *args: {})
    monkeypatch.setattr(nightly, "measured_commits", lambda machine, environment: ["old", "head"])
    assert nightly.again("box", "config", "env", "head", "quick") == 0
    assert (night.ran, capsys.readouterr().out) == ([], "no regressions\n")


def test_the_newest_mlx_is_an_axis_of_its_own(monkeypatch):
    ran = []
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
