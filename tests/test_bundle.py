"""Results on their way to a branch, through jobs that ran foreign code."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from tracking import nightly, valid
from tracking.repository import ROOT

SCRIPT = ROOT / ".github/scripts/bundle.py"
BRANCHES = SCRIPT.with_name("branches.sh")
spec = importlib.util.spec_from_file_location("bundle", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
RefusedError = script.RefusedError
RECORDED = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("results/linux-2core-xeon/*-py*.json")
)
RESULT = json.dumps({"version": 2, "result_columns": ["result"], "results": {"a": [[1.0]]}})


def git(root, *args, **kwargs):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True, **kwargs)
    return done.stdout.strip()


@pytest.fixture
def measured(tmp_path):
    """What a machine handed on."""
    folder = tmp_path / "measured"
    (folder / "mac").mkdir(parents=True)
    (folder / "mac/b.json").write_text(RESULT)
    (folder / "mac/noise.csv").write_text("asv knows it not")
    (folder / "benchmarks.json").write_text("{}")
    return folder


def test_no_valid_file_is_too_large():
    assert script.LARGEST == valid.MOST_BYTES


def test_take(measured, tmp_path):
    script.take(measured, tmp_path / "results")
    assert [p.name for p in (tmp_path / "results").rglob("*.*")] == ["b.json"]
    assert (tmp_path / "results/mac/b.json").read_text() == RESULT


def link(path):
    path.symlink_to("/etc/passwd")


ODD = {
    "link": link,
    "folder": lambda path: path.with_suffix("").symlink_to("/etc"),
    "pipe": os.mkfifo,
    "large": lambda path: path.write_bytes(b" " * (script.LARGEST + 1)),
}


@pytest.mark.parametrize("odd", ODD)
def test_take_refuses_and_takes_nothing(odd, measured, tmp_path):
    ODD[odd](measured / "mac/a.json")
    with pytest.raises(RefusedError, match=r"mac/a"):
        script.take(measured, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", [".hidden", "a<b>", 'a"b', "a`b`", "a\nb", "-" * 201])
def test_names_that_mean_something_elsewhere_are_left_out(name, measured, tmp_path):
    (measured / name).mkdir()
    (measured / name / "c.json").write_text(RESULT)
    (measured / "mac" / f"{name}.json").write_text(RESULT)
    script.take(measured, tmp_path / "results")
    assert [p.name for p in (tmp_path / "results").rglob("*.*")] == ["b.json"]


@pytest.fixture
def origin(tmp_path):
    """A repository with main."""
    return begin(tmp_path)


def begin(tmp_path):
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin")
    job(tmp_path, "first")
    work = tmp_path / "first"
    (work / "README").write_text("main")
    (work / ".gitignore").write_text("/results/*\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "begin")
    git(work, "push", "--quiet", "origin", "HEAD:main")
    return tmp_path / "origin"


def job(tmp_path, name):
    """A clone with a local branch results, as in benchmark-publish."""
    clone = tmp_path / name
    git(tmp_path, "clone", "--quiet", "origin", name)
    if git(clone, "branch", "--remotes"):
        env = {**os.environ, "GITHUB_SHA": git(clone, "rev-parse", "origin/main")}
        subprocess.run(["sh", str(BRANCHES)], cwd=clone, env=env, check=True)
    return clone


def hand_on(clone, number):
    """What the job that checks does with one of RECORDED; return the bundle."""
    file = clone / RECORDED[number]
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / RECORDED[number], file)
    nightly.push_results(".", root=clone)
    assert script.bundle(clone / "b.bundle", clone)
    return clone / "b.bundle"


def on_branch(origin):
    return git(origin, "ls-tree", "-r", "--name-only", "results").splitlines()


def test_results_get_to_the_branch(origin, tmp_path, capsys):
    clone = job(tmp_path, "one")
    assert not script.bundle(clone / "b.bundle", clone)
    script.push(hand_on(clone, 0), str(origin))
    clone = job(tmp_path, "two")
    assert not script.bundle(clone / "b.bundle", clone)
    assert "no new results" in capsys.readouterr().out
    script.push(hand_on(clone, 1), str(origin))
    assert on_branch(origin) == RECORDED[:2]
    assert git(origin, "rev-list", "--count", "results") == "2"


def test_results_that_others_overtook_are_refused(origin, tmp_path):
    one, two = hand_on(job(tmp_path, "one"), 0), hand_on(job(tmp_path, "two"), 1)
    script.push(one, str(origin))
    for stale in (one, two):
        with pytest.raises(RefusedError, match="run the job that makes the commit again"):
            script.push(stale, str(origin))
    assert on_branch(origin) == [RECORDED[0]]


def commit(clone, *changes, parents=("origin/results",)):
    """A hostile job's commit: (mode, path, content), content None to remove. Return its bundle."""
    index = {**os.environ, "GIT_INDEX_FILE": str(clone / "index")}
    git(clone, "read-tree", parents[0] if parents else "--empty", env=index)
    for mode, path, content in changes:
        if content is None:
            git(clone, "update-index", "--force-remove", path, env=index)
            continue
        blob = git(clone, "hash-object", "-w", "--stdin", input=content)
        blob = git(clone, "rev-parse", "HEAD") if mode == "160000" else blob
        git(clone, "update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}", env=index)
    tree = git(clone, "write-tree", env=index)
    parents = [word for parent in parents for word in ("-p", parent)]
    made = git(clone, "commit-tree", tree, *parents, "-m", "results")
    git(clone, "update-ref", "refs/heads/results", made)
    assert script.bundle(clone / "hostile.bundle", clone)
    return clone / "hostile.bundle"


FILE = ("100644", "results/mac/new.json", RESULT)
HOSTILE = {
    "a workflow": [FILE, ("100644", ".github/workflows/x.yml", "on: push")],
    "beside machines": [("100644", "results/x.json", RESULT)],
    "deeper": [("100644", "results/mac/x/y.json", RESULT)],
    "another kind": [("100644", "results/mac/x.html", RESULT)],
    "a link": [("120000", "results/mac/x.json", "/etc/passwd")],
    "a program": [("100755", "results/mac/x.json", RESULT)],
    "a submodule": [("160000", "results/mac/x.json", RESULT)],
    "markup": [("100644", "results/mac/<script>.json", RESULT)],
    "two lines": [("100644", "results/mac/x\n.json", RESULT)],
    "hidden": [("100644", "results/.x/x.json", RESULT)],
    "large": [("100644", "results/mac/x.json", " " * (script.LARGEST + 1))],
    "cut": [("100644", "results/mac/x.json", RESULT[:9])],
    "empty": [("100644", "results/mac/x.json", "")],
    "deep": [("100644", "results/mac/x.json", "[" * 200_000)],
    "removed": [FILE, ("", RECORDED[0], None)],
    "nothing": [],
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(A repository with results, a job's clone of it)."""
    folder = tmp_path_factory.mktemp("hostile")
    origin = begin(folder)
    script.push(hand_on(job(folder, "one"), 0), str(origin))
    return origin, job(folder, "two")


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_commits_are_refused(what, hostile):
    origin, clone = hostile
    bundle = commit(clone, *HOSTILE[what])
    with pytest.raises(RefusedError) as refused:
        script.push(bundle, str(origin))
    assert not str(refused.value).startswith("git")  # our rule, not git's word
    assert on_branch(origin) == RECORDED[:1]


@pytest.mark.parametrize("parents", [(), ("results",), ("origin/results", "results")])
def test_hostile_histories_are_refused(parents, hostile):
    """Another beginning, two commits, a merge."""
    origin, clone = hostile
    commit(clone, FILE)
    bundle = commit(clone, ("100644", "results/mac/2.json", RESULT), parents=parents)
    with pytest.raises(RefusedError, match="does not follow"):
        script.push(bundle, str(origin))
    assert git(origin, "rev-list", "--count", "results") == "1"


def test_a_bundle_that_is_none(hostile):
    origin, clone = hostile
    (clone / "b.bundle").write_bytes(b"# v2 git bundle\n")
    with pytest.raises(RefusedError):
        script.push(clone / "b.bundle", str(origin))


def test_it_runs_by_the_systems_python_alone(measured, tmp_path):
    """-I and -S: no site-packages, no PYTHONPATH; a refusal is one sentence."""
    run = [sys.executable, "-I", "-S", str(SCRIPT), "take", str(measured)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "took 1 files of results\n"), done.stderr
    link(measured / "mac/a.json")
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("refused: ")
    assert "Traceback" not in done.stderr
