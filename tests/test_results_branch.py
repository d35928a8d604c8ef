"""Results on a branch of their own; no benchmark runs here."""

import json
import subprocess

import pytest
from asv.util import UserError

from tracking import results_branch


def git(root, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


COLUMNS = ["result", "params", "version", "started_at"]


def result(letter="b", machine="mac", **started):
    """Results of a commit: {benchmark: when it was started}, whose values say when, too."""
    return {
        "version": 2,
        "commit_hash": letter * 40,
        "env_name": "env",
        "date": 0,
        "python": "3",
        "requirements": {},
        "params": {"machine": machine},
        "result_columns": COLUMNS,
        "results": {name: [[float(when)], [], "1", when] for name, when in started.items()},
    }


def put(clone, data):
    """Write a file of results where asv would; return it."""
    machine = data["params"]["machine"]
    file = clone / f"results/{machine}/{data['commit_hash'][:8]}-env.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def values(file):
    """What a file of results has: {benchmark: values}."""
    return {name: row[0] for name, row in json.loads(file.read_text())["results"].items()}


def branch(clone, path):
    """What the branch has in a file of results: {benchmark: values}."""
    git(clone, "fetch", "--quiet", "origin", "results")
    show = git(clone, "show", f"FETCH_HEAD:{path}")
    return {name: row[0] for name, row in json.loads(show)["results"].items()}


B = "results/mac/bbbbbbbb-env.json"


@pytest.fixture
def clones(tmp_path):
    """Two clones of a repository whose main tracks one machine's results and ignores others."""
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin")
    first = tmp_path / "first"
    git(tmp_path, "clone", "--quiet", "origin", "first")
    git(first, "checkout", "--quiet", "-b", "main")
    (first / "results").mkdir()
    put(first, result("a", "old", a=1))
    (first / ".gitignore").write_text("/results/*\n")
    git(first, "add", "--force", "results/old", ".gitignore")
    git(first, "commit", "--quiet", "-m", "begin")
    git(first, "push", "--quiet", "origin", "main")
    git(tmp_path, "clone", "--quiet", "origin", "second")
    return first, tmp_path / "second"


def test_results_travel_by_a_branch_and_leave_main_alone(clones, capsys):
    first, second = clones
    results_branch.fetch_results(root=second)
    assert "no branch results yet" in capsys.readouterr().out
    results_branch.push_results(root=first)
    assert "no new results" in capsys.readouterr().out
    head = git(first, "rev-parse", "HEAD")
    put(first, result(a=1))
    (first / "results/mac/noise.csv").write_text("main has this")
    (first / "results/benchmarks.json").write_text('{"version": 2}')
    results_branch.push_results(root=first)
    results_branch.fetch_results(root=second)
    assert git(second, "ls-tree", "-r", "--name-only", "FETCH_HEAD") == B
    assert values(second / B) == {"a": [1.0]}
    for clone in clones:
        assert git(clone, "status", "--porcelain") == ""
        assert git(clone, "rev-parse", "HEAD") == head == git(clone, "rev-parse", "origin/main")


def test_a_second_push_adds_and_keeps(clones, capsys):
    first, second = clones
    put(first, result(a=1))
    results_branch.push_results(root=first)
    results_branch.push_results(root=first)
    assert "no new results" in capsys.readouterr().out
    put(second, result("c", a=2))
    results_branch.push_results(root=second)
    (first / B).unlink()
    results_branch.fetch_results(root=first)
    files = sorted(path.name[:1] for path in (first / "results").rglob("*.json"))
    assert files == ["a", "b", "c"]
    assert git(first, "rev-list", "--count", "FETCH_HEAD") == "2"


def test_of_each_benchmark_what_was_measured_last_stays(clones):
    first, second = clones
    longer = result(a=1, b=5, c=3)
    longer["result_columns"] = [*COLUMNS, "duration"]
    longer["results"]["a"].append(0.5)
    for clone, data in ((first, longer), (second, result(a=4, b=2, d=6))):
        put(clone, data)
        record = {"machine": "mac", "cpu": clone.name, "version": 1}
        (clone / "results/mac/machine.json").write_text(json.dumps(record))
    results_branch.push_results(root=first)
    results_branch.push_results(root=second)
    results_branch.fetch_results(root=first)
    for clone in clones:
        assert values(clone / B) == branch(clone, B) == {"a": [4], "b": [5], "c": [3], "d": [6]}
        record = json.loads((clone / "results/mac/machine.json").read_text())
        assert record["cpu"] == clone.name


def test_what_main_records_later_is_not_overwritten(clones):
    first, second = clones
    put(first, result("a", "old", a=2))
    results_branch.push_results(root=first)
    file = put(second, result("a", "old", a=3))
    git(second, "commit", "--quiet", "-am", "a later run")
    results_branch.fetch_results(root=second)
    assert values(file) == {"a": [3.0]}
    assert git(second, "status", "--porcelain") == ""


def test_a_push_during_a_push_is_an_error_and_stays(clones, monkeypatch):
    first, second = clones
    for clone, when in ((first, 9), (second, 1)):
        put(clone, result(a=when))
    fetch = results_branch.fetch_results

    def fetch_then_another_pushes(remote, root):
        tip = fetch(remote, root)
        monkeypatch.setattr(results_branch, "fetch_results", fetch)
        results_branch.push_results(root=first)
        return tip

    monkeypatch.setattr(results_branch, "fetch_results", fetch_then_another_pushes)
    with pytest.raises(UserError, match="git push"):
        results_branch.push_results(root=second)
    assert branch(second, B) == {"a": [9.0]}
    assert values(second / B) == {"a": [1.0]}


@pytest.mark.parametrize("content", ['{"version": 2, "resu', "", "[]", "../../secret"])
def test_what_is_broken_on_the_branch_is_left_out_and_replaced(content, clones, capsys):
    first, second = clones
    (first / "results/mac").mkdir()
    if content.startswith(".."):
        (first / B).symlink_to(content)
    else:
        (first / B).write_text(content)
    git(first, "add", "--force", B)
    commit = git(first, "commit-tree", git(first, "write-tree"), "-m", "by hand")
    git(first, "push", "--quiet", "origin", f"{commit}:refs/heads/results")
    results_branch.fetch_results(root=second)
    assert f"on the branch results: {second / B} is broken: " in capsys.readouterr().err
    assert not (second / B).exists()
    put(second, result(a=7))
    results_branch.push_results(root=second)
    assert branch(second, B) == {"a": [7.0]}


def test_what_is_broken_here_is_not_pushed(clones, capsys):
    first, second = clones
    put(first, result(a=1))
    broken = put(first, result("c", a=2))
    broken.write_text(broken.read_text()[:100])
    results_branch.push_results(root=first)
    assert "set aside as cccccccc-env.json.broken" in capsys.readouterr().err
    results_branch.fetch_results(root=second)
    assert [file.name for file in (second / "results/mac").iterdir()] == ["bbbbbbbb-env.json"]


def test_names_that_git_quotes_travel(clones):
    first, second = clones
    put(first, result(machine="Müllers Mac (2)", a=1))
    results_branch.push_results(root=first)
    results_branch.fetch_results(root=second)
    assert values(second / "results/Müllers Mac (2)/bbbbbbbb-env.json") == {"a": [1.0]}


def test_a_remote_that_is_not_there(clones):
    put(clones[0], result(a=1))
    with pytest.raises(UserError, match=r"ls-remote: .*nowhere"):
        results_branch.push_results("nowhere", root=clones[0])
