"""Results on a branch of their own; no benchmark runs here."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from asv.util import UserError

from tracking import noise, results_branch


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
    (first / "results/mac/detection.csv").write_text("main has this")
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


def test_what_both_have_is_merged_by_benchmark(clones):
    first, second = clones
    for clone, data in ((first, result(a=1, b=5, c=3)), (second, result(a=4, b=2, d=6))):
        put(clone, data)
        record = {"machine": "mac", "cpu": clone.name, "version": 1}
        (clone / "results/mac/machine.json").write_text(json.dumps(record))
    results_branch.push_results(root=first)
    results_branch.fetch_results(root=second)
    assert values(second / B) == {"a": [4.0], "b": [2.0], "c": [3.0], "d": [6.0]}
    assert json.loads((second / "results/mac/machine.json").read_text())["cpu"] == "second"


@pytest.mark.parametrize("tick", [-1, 0, 1])
def test_what_is_measured_again_replaces_what_it_was_whatever_the_clock_says(tick, clones):
    """In one clone after the other, which then agree."""
    first, second = clones
    for turn, (clone, other) in enumerate([(first, second), (second, first), (first, second)]):
        data = result(a=100 + tick * turn)
        data["results"]["a"][0] = [float(turn)]
        put(clone, data)
        results_branch.push_results(root=clone)
        assert branch(clone, B) == {"a": [float(turn)]}
        results_branch.push_results(root=other)
        results_branch.push_results(root=clone)
        for one in clones:
            assert values(one / B) == branch(one, B) == {"a": [float(turn)]}


def test_what_both_measured_again_is_the_last_that_was_pushed(clones):
    first, second = clones
    put(first, result(a=1))
    results_branch.push_results(root=first)
    results_branch.fetch_results(root=second)
    for clone, value in ((first, 2), (second, 3)):
        put(clone, result(a=value))
        results_branch.push_results(root=clone)
    results_branch.push_results(root=first)
    for clone in clones:
        assert values(clone / B) == branch(clone, B) == {"a": [3.0]}


def test_a_benchmark_that_means_something_else_now_is_no_fuller(clones):
    first, second = clones
    old, new = result(a=1), result(a=2)
    old["results"]["a"] = [[1.0, 2.0], [["1", "2"]], "1", 1]
    new["results"]["a"] = [[3.0, math.nan], [["1", "2"]], "2", 1]
    put(first, old)
    results_branch.push_results(root=first)
    put(second, new)
    results_branch.push_results(root=second)
    assert branch(second, B)["a"][0] == 3.0


def test_a_fuller_run_is_not_replaced_by_a_newer_quick_one(clones):
    first, second = clones
    for clone, numbers, when in ((first, [1.0, math.nan], 9), (second, [2.0, 3.0], 1)):
        data = result(a=when)
        data["results"]["a"][:2] = [numbers, [["1", "2"]]]
        put(clone, data)
    results_branch.push_results(root=first)
    results_branch.push_results(root=second)
    for clone in clones:
        results_branch.fetch_results(root=clone)
        assert values(clone / B) == {"a": [2.0, 3.0]}


def test_a_push_keeps_what_another_pushed_meanwhile(clones):
    first, second = clones
    put(first, result(a=9))
    results_branch.push_results(root=first)
    put(second, result(b=1))
    results_branch.push_results(root=second)
    assert branch(second, B) == {"a": [9.0], "b": [1.0]}


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


def test_what_main_records_later_is_not_overwritten(clones):
    first, second = clones
    put(first, result("a", "old", a=1))
    results_branch.push_results(root=first)
    file = put(second, result("a", "old", a=2))
    git(second, "commit", "--quiet", "-am", "a later run")
    results_branch.fetch_results(root=second)
    assert values(file) == {"a": [2.0]}
    assert git(second, "status", "--porcelain") == ""


def test_results_with_more_columns_are_merged(clones):
    first, second = clones
    longer = result(a=9)
    longer["result_columns"] = [*COLUMNS, "duration"]
    longer["results"]["a"].append(0.5)
    put(first, longer)
    put(second, result(b=1))
    results_branch.push_results(root=first)
    results_branch.fetch_results(root=second)
    assert values(second / B) == {"a": [9.0], "b": [1.0]}
    assert json.loads((second / B).read_text())["result_columns"][-1] == "duration"


def push_by_hand(clone, path, content):
    """Put something on the branch that nobody checks."""
    file = clone.parent / "by hand"
    file.write_bytes(content)
    blob = git(clone, "hash-object", "-w", str(file))
    entry = f"100644 blob {blob}\t{path.split('/')[-1]}"
    for name in (*path.split("/")[-2::-1], None):
        tree = subprocess.run(
            ["git", "-C", str(clone), "mktree", "-z"],
            input=f"{entry}\0".encode(),
            capture_output=True,
            check=True,
        ).stdout.decode()
        entry = f"040000 tree {tree.strip()}\t{name}"
    commit = git(clone, "commit-tree", tree.strip(), "-m", "by hand")
    git(clone, "push", "--quiet", "--force", "origin", f"{commit}:refs/heads/results")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (B, b'{"version": 2, "resu'),
        (B, b""),
        (B, b"[" * 100_000),
        (B, json.dumps(result(a=1) | {"results": {"a": [None, [["0", "1"]] * 60]}}).encode()),
        (B, json.dumps(result(a=1) | {"results": {"a": [["1"], [], "1"]}}).encode()),
        (B, json.dumps(result(a=1)).replace('"a"', '"<b>"').encode()),
        ("results/<b>/bbbbbbbb-env.json", json.dumps(result(machine="<b>", a=1)).encode()),
        ("results/other/bbbbbbbb-env.json", json.dumps(result(a=1)).encode()),
        ("results/mac/machine.json", b'{"machine": "mac"}'),
        ("results/\n::error::/x.json", b"\xff"),
    ],
)
def test_what_is_broken_on_the_branch_stops_nothing(path, content, clones, capsys):
    first, second = clones
    push_by_hand(first, path, content)
    put(second, result("c", a=2))
    for _ in range(2):
        results_branch.push_results(root=second)
        said = capsys.readouterr().err
        assert said.startswith("on the branch results ")
        assert " is broken: " in said
        assert said.count("\n") == 1
        assert not (second / path).exists()
    assert branch(second, "results/mac/cccccccc-env.json") == {"a": [2.0]}
    results_branch.fetch_results(root=first)
    assert values(first / "results/mac/cccccccc-env.json") == {"a": [2.0]}
    # Whoever measures it anew replaces it.
    if path == B:
        put(second, result(a=7))
        results_branch.push_results(root=second)
        results_branch.fetch_results(root=first)
        assert values(first / B) == {"a": [7.0]}


def test_what_was_broken_on_the_branch_is_no_base(clones):
    """It is what both last had in common, and as good as nothing."""
    first, second = clones
    push_by_hand(first, B, b"[" * 100_000)
    results_branch.fetch_results(root=second)
    put(first, result(a=1))
    results_branch.push_results(root=first)
    put(second, result(b=2))
    results_branch.fetch_results(root=second)
    assert values(second / B) == {"a": [1.0], "b": [2.0]}


def test_what_is_broken_here_is_not_pushed(clones, capsys):
    first, second = clones
    put(first, result(a=1))
    broken = put(first, result("c", a=2))
    broken.write_text(broken.read_text()[:100])
    results_branch.push_results(root=first)
    assert "set aside as cccccccc-env.json.broken" in capsys.readouterr().err
    results_branch.fetch_results(root=second)
    assert [file.name for file in (second / "results/mac").iterdir()] == ["bbbbbbbb-env.json"]


def test_a_link_on_the_branch_leads_nowhere(clones, tmp_path, capsys):
    first, second = clones
    secret = put(tmp_path / "first", result("c", "elsewhere", a=1))
    (first / "results/mac").mkdir()
    (first / B).symlink_to(secret)
    git(first, "add", "--force", B)
    commit = git(first, "commit-tree", git(first, "write-tree"), "-m", "a link")
    git(first, "push", "--quiet", "origin", f"{commit}:refs/heads/results")
    results_branch.fetch_results(root=second)
    assert not (second / B).exists()
    assert f"{B} is broken" in capsys.readouterr().err


@pytest.mark.parametrize("machine", ["Müllers Mac", "日本", "box (2)"])
def test_names_that_git_quotes_travel(machine, clones):
    first, second = clones
    put(first, result(machine=machine, a=1))
    put(first, result("a", "old", a=5))
    results_branch.push_results(root=first)
    results_branch.fetch_results(root=second)
    assert values(second / f"results/{machine}/bbbbbbbb-env.json") == {"a": [1.0]}
    put(second, result(machine=machine, a=2))
    results_branch.push_results(root=second)
    results_branch.fetch_results(root=first)
    assert values(first / f"results/{machine}/bbbbbbbb-env.json") == {"a": [2.0]}


def test_a_full_disk_while_fetching_loses_nothing(clones, monkeypatch):
    first, second = clones
    put(first, result(a=1))
    results_branch.push_results(root=first)
    put(second, result(b=2))

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            results_branch.fetch_results(root=second)
    assert values(second / B) == {"b": [2.0]}
    results_branch.push_results(root=second)
    assert branch(second, B) == {"a": [1.0], "b": [2.0]}


def test_a_remote_that_is_not_there(clones):
    put(clones[0], result(a=1))
    with pytest.raises(UserError, match=r"ls-remote: .*nowhere"):
        results_branch.push_results("nowhere", root=clones[0])


def noise_rows(*values):
    about = ["c", "code", "env", 2, 10, "overhead.A.ratio_x"]
    rows = [[f"2026-12-0{day}", *about, value] for day, value in enumerate(values, start=1)]
    return [dict(zip(noise.HEADER, row, strict=True)) for row in rows]


def test_noise_travels_and_is_added(clones):
    first, second = clones
    for clone, numbers in ((first, (1.0, 2.0)), (second, (1.0, 3.0, 4.0))):
        noise.write(clone / "results/mac/noise.csv", noise_rows(*numbers))
        results_branch.push_results(root=clone)
    results_branch.fetch_results(root=first)
    for clone in clones:
        rows = noise.read(clone / "results/mac/noise.csv")
        assert [float(row["value"]) for row in rows] == [1.0, 2.0, 3.0, 4.0]
        assert git(clone, "status", "--porcelain") == ""


@pytest.mark.parametrize("broken", [0, 1])
def test_broken_noise_stops_nothing_and_stays(broken, clones, capsys):
    file = "results/mac/noise.csv"
    noise.write(clones[1 - broken] / file, noise_rows(1.0))
    (clones[broken] / file).parent.mkdir(exist_ok=True)
    (clones[broken] / file).write_text("x")
    for clone in clones:
        results_branch.push_results(root=clone)
    results_branch.fetch_results(root=clones[0])
    assert "noise.csv: expected columns" in capsys.readouterr().out
    assert (clones[broken] / file).read_text() == "x"
    assert len(noise.read(clones[1 - broken] / file)) == 1
    pushed = git(clones[0], "show", f"FETCH_HEAD:{file}")
    assert len(pushed.splitlines()) == 2  # the good one
