"""Results on their way to the branch `results`, from a job that ran downloaded code."""

import importlib.util
import os
import subprocess
import sys

import pytest
from repositories import git

from tracking.repository import ROOT

SCRIPT = ROOT / ".github/scripts/keep_results.py"
spec = importlib.util.spec_from_file_location("keep_results", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def origin(tmp_path):
    """A repository whose main has recorded one file of results and ignores others."""
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin")
    git(tmp_path, "clone", "--quiet", "origin", "main")
    put(tmp_path / "main/results", "mac/old.json", "main's")
    (tmp_path / "main/.gitignore").write_text("/results/*\n")
    git(tmp_path / "main", "add", "--force", ".gitignore", "results")
    git(tmp_path / "main", "commit", "--quiet", "-m", "begin")
    git(tmp_path / "main", "push", "--quiet", "origin", "HEAD:main")
    return tmp_path / "origin"


def put(folder, name, text):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def checkout(origin, name):
    """A clone like that of the job that measures, with the branch's files in results/."""
    clone = origin.with_name(name)
    git(origin.parent, "clone", "--quiet", "--branch", "main", "origin", name)
    env = {**os.environ, "GITHUB_SHA": git(clone, "rev-parse", "HEAD")}
    branches = SCRIPT.with_name("branches.sh")
    subprocess.run(["sh", str(branches)], cwd=clone, env=env, check=True)
    return clone


def keep(clone, origin):
    script.keep(clone / "results", str(origin), origin.with_name("main") / "results")


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.json")}


def test_results_travel_by_a_branch_and_leave_main_alone(origin, capsys):
    first = checkout(origin, "first")
    keep(first, origin)
    assert "no new results" in capsys.readouterr().out
    put(first / "results", "mac/a.json", "a")
    put(first / "results", "mac/noise.csv", " " * (script.LARGEST + 1))
    put(first / "results", "benchmarks.json", "asv makes this again")
    keep(first, origin)
    assert git(origin, "ls-tree", "-r", "--name-only", "results") == "results/mac/a.json"
    second = checkout(origin, "second")
    assert content(second / "results") == {"mac/old.json": "main's", "mac/a.json": "a"}
    put(second / "results", "mac/old.json", "measured again")
    put(second / "results", "Müllers Mac (2)/b.json", "b")
    (second / "results/mac/a.json").unlink()
    keep(second, origin)
    keep(second, origin)
    assert "no new results" in capsys.readouterr().out
    last = content(checkout(origin, "third") / "results")
    assert last.pop("mac/old.json") == "measured again"
    assert last == {"mac/a.json": "a", "Müllers Mac (2)/b.json": "b"}
    assert git(origin, "rev-list", "--count", "results") == "2"
    assert git(origin, "rev-list", "--count", "main") == "1"


ODD = {
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "pipe": os.mkfifo,
    "large": lambda path: path.write_bytes(b" " * (script.LARGEST + 1)),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_file_of_results_is_refused_with_all_others(odd, origin, tmp_path):
    measured = tmp_path / "measured"
    put(measured, "mac/a.json", "a")
    ODD[odd](measured / "mac/b.json")
    with pytest.raises(script.RefusedError, match=r"got 'mac/b\.json'"):
        script.keep(measured, str(origin))
    assert git(origin, "branch", "--list", "results") == ""


def test_names_that_mean_something_elsewhere_are_left_out(origin, tmp_path):
    measured = tmp_path / "measured"
    names = ["x.json", "mac/x/y.json", "mac/x.html", ".github/workflows/x.json", ".x/x.json"]
    names += ["mac/a<b>.json", 'mac/a"b.json', "mac/a\nb.json", "mac/.x.json"]
    for name in ["mac/a.json", *names]:
        put(measured, name, "")
    script.keep(measured, str(origin))
    assert git(origin, "ls-tree", "-r", "--name-only", "results") == "results/mac/a.json"


def test_it_runs_by_the_systems_python_alone(tmp_path):
    """-I and -S: no site-packages, no PYTHONPATH; a refusal is one sentence."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), "measured", "--remote", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("refused: git: ")
    assert "Traceback" not in done.stderr
