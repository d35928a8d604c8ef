"""Results on a branch of their own, and what is measured at night; no benchmark runs here."""

import subprocess
from types import SimpleNamespace

import pytest
from asv.util import UserError

from website import nightly


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
    head = git(first, "rev-parse", "HEAD")
    (first / "results/mac").mkdir()
    (first / "results/mac/b.json").write_text("new")
    (first / "results/benchmarks.json").write_text("derived")
    nightly.push_results(root=first)
    nightly.fetch_results(root=second)
    assert (second / "results/mac/b.json").read_text() == "new"
    assert not (second / "results/benchmarks.json").exists()
    for clone in clones:
        assert git(clone, "status", "--porcelain") == ""
        assert git(clone, "rev-parse", "HEAD") == head == git(clone, "rev-parse", "origin/main")


def test_a_second_push_adds_and_keeps(clones, capsys):
    first, second = clones
    (first / "results/mac").mkdir()
    (first / "results/mac/b.json").write_text("one")
    nightly.push_results(root=first)
    nightly.push_results(root=first)
    assert "no new results" in capsys.readouterr().out
    (second / "results/mac").mkdir()
    (second / "results/mac/c.json").write_text("two")
    nightly.push_results(root=second)
    nightly.fetch_results(root=first)
    files = sorted(path.name for path in (first / "results").rglob("*.json"))
    assert files == ["a.json", "b.json", "c.json"]
    assert git(first, "rev-list", "--count", "FETCH_HEAD") == "2"


def test_a_remote_that_is_not_there(clones):
    with pytest.raises(UserError, match=r"ls-remote: .*nowhere"):
        nightly.push_results("nowhere", root=clones[0])


@pytest.fixture
def night(monkeypatch):
    """What a night would run: the asv commands and website.history's run."""
    ran = []
    monkeypatch.setattr(nightly, "git", lambda *args: "head")
    monkeypatch.setattr(nightly, "asv", lambda *args, **kw: ran.append(args) or 0)
    monkeypatch.setattr(
        nightly, "history", SimpleNamespace(run=lambda *args, **kw: ran.append("history") or 0)
    )
    monkeypatch.setattr(nightly, "again", lambda *args: ran.append("again") or 0)
    return ran


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([], ["history"]),
        (["old", "older"], ["NEW", "history", "again"]),
        (["old", "head"], ["history", "again"]),
    ],
)
def test_a_night(measured, expected, night, monkeypatch):
    monkeypatch.setattr(nightly, "measured_commits", lambda machine: measured)
    assert nightly.nightly("box", "cpu", "quick") == 0
    assert [what if isinstance(what, str) else what[-1] for what in night] == expected


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
