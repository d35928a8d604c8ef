"""asv's own commands, as a user types them, in a small project that has this one's safeguards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from repositories import git

from tracking import safeguards
from tracking.repository import ROOT

MODULES = ("__init__", "files", "project", "repository", "safeguards", "valid")
SUITE = """
import os
import time
import pagedkv


class Answer:
    version = "1"

    def track_answer(self):
        if "WAIT" in os.environ:
            print(f"pid {os.getpid()}", file=open(os.environ["WAIT"], "w"), flush=True)
            time.sleep(600)
        return pagedkv.ANSWER + (100 if os.environ.get("PAGEDKV_DECODE_PATH") else 0)
"""
HERE = ("-E", f"existing:{sys.executable}", "--set-commit-hash", "HEAD")


@pytest.fixture
def project(tmp_path):
    """A git repository with a package, a suite of one benchmark, and a machine `box`."""
    root = tmp_path / "project"
    for folder in ("tracking", "benchmarks", "pagedkv"):
        (root / folder).mkdir(parents=True)
    for module in MODULES:
        shutil.copy(ROOT / f"tracking/{module}.py", root / "tracking")
    shutil.copy(ROOT / "tracking/results.schema.json", root / "tracking")
    (root / "benchmarks/__init__.py").touch()
    (root / "benchmarks/all.py").write_text(SUITE)
    (root / "pagedkv/__init__.py").write_text("ANSWER = 42\n")
    config = {"version": 1, "project": "p", "repo": ".", "branches": ["main"], "dvcs": "git"}
    config |= {"plugins": [".tracking.safeguards"], "html_dir": ".asv/html", "env_dir": ".asv/env"}
    config |= {"environment_type": "virtualenv"}
    (root / "asv.conf.json").write_text(json.dumps(config))
    (root / ".gitignore").write_text("/results\n/.asv\n__pycache__\n/asv.*.conf.json\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", "begin")
    box = {"machine": "box", "os": "", "arch": "", "cpu": "", "num_cpu": "1", "ram": ""}
    (tmp_path / ".asv-machine.json").write_text(json.dumps({"box": box, "version": 1}))
    return root


@pytest.fixture
def asv(project):
    """Runs asv in the project; returns (exit status, what it said)."""

    def run(*args, cwd=project, **env):
        done = subprocess.run(
            [sys.executable, "-m", "asv", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "HOME": str(project.parent), "ASV_PYTHONPATH": str(project), **env},
            timeout=120,
        )
        assert "Traceback" not in done.stdout, done.stdout
        print(done.stdout)
        return done.returncode, done.stdout

    return run


def measured(project):
    """What is recorded of the answer, None if nothing is."""
    for file in project.glob("results/box/*-*.json"):
        return json.loads(file.read_text())["results"]["all.Answer.track_answer"][0]
    return None


def test_a_run_records_what_head_answers_and_the_environment_forces_nothing(asv, project):
    forced = {"PAGEDKV_DECODE_PATH": "gather_sdpa", "MLX_DISABLE_COMPILE": "1"}
    status, said = asv("run", "--machine", "box", *HERE, **forced)
    assert status == 0
    assert re.search(r"without .*MLX_DISABLE_COMPILE, .*PAGEDKV_DECODE_PATH, which", said)
    assert measured(project) == [42]


def test_what_forces_is_forgotten_and_the_rest_stays():
    """asv puts ASV_PYTHONPATH before what it installs; an existing environment may need it."""
    stays = {"PATH": "", "HOME": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", "LC_ALL": ""}
    elsewhere = {"ASV_PYTHONPATH": "/elsewhere"}
    environ = {**stays, **elsewhere, "PAGEDKV_AUTOTUNE": "", "OMP_NUM_THREADS": ""}
    environ["PYTHONOPTIMIZE"] = ""
    safeguards.forget(environ, keep=("ASV_PYTHONPATH",))
    assert environ == stays | elsewhere
    safeguards.forget(environ)
    assert environ == stays


def test_a_hook_of_another_repository_redirects_nothing(asv, project, tmp_path):
    """asv calls git itself: for revisions, tags, branches and checkouts."""
    git(tmp_path, "init", "--quiet", "--initial-branch=main", "users")
    users = tmp_path / "users"
    git(users, "commit", "--quiet", "--allow-empty", "-m", "another project")
    before = {path: path.read_bytes() for path in users.rglob("*") if path.is_file()}
    hook = {"GIT_DIR": str(users / ".git"), "GIT_WORK_TREE": str(users)}
    hook["GIT_INDEX_FILE"] = str(users / ".git/index")
    git(project, "tag", "phase-0")
    assert asv("run", "--machine", "box", *HERE, **hook)[0] == 0
    assert asv("publish", "--no-pull", **hook)[0] == 0
    published = json.loads((project / ".asv/html/index.json").read_text())
    assert published["revision_to_hash"] == {"0": git(project, "rev-parse", "HEAD")}
    assert [*published["tags"]] == ["phase-0"]
    assert {path: path.read_bytes() for path in users.rglob("*") if path.is_file()} == before


def make_dirty(project, name):
    file = project / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(file.read_text() + " \n" if file.exists() else "")


def test_what_is_not_committed_is_not_recorded(asv, project):
    make_dirty(project, "benchmarks/Müller.py")
    for command in (("run", *HERE), ("continuous", "HEAD", "HEAD")):
        status, said = asv(command[0], "--machine", "box", *command[1:])
        assert status == 1
        assert "benchmarks/Müller.py is not committed" in said
        assert "commit or stash it" in said
    assert measured(project) is None


def test_what_records_nothing_may_be_uncommitted(asv, project):
    make_dirty(project, "benchmarks/more.py")
    assert asv("run", "--machine", "box", "--python=same", "--quick")[0] == 0
    assert asv("run", "--machine", "box", *HERE, "--dry-run")[0] == 0
    assert measured(project) is None


def test_an_existing_environment_has_the_commit_that_it_is_recorded_as(asv, project, tmp_path):
    before = git(project, "rev-parse", "HEAD")
    git(project, "worktree", "add", "--quiet", "--detach", str(tmp_path / "older"))
    (project / "pagedkv/__init__.py").write_text("ANSWER = 43\n")
    git(project, "commit", "--quiet", "--all", "-m", "another answer")
    older = ("run", "--machine", "box", *HERE[:-1], before)
    status, said = asv(*older)
    assert status == 1
    assert f"is not that of {before}: pagedkv/__init__.py differs" in said
    make_dirty(project, "pagedkv/more.py")
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 1
    assert "is not that of HEAD: pagedkv/more.py differs" in said
    assert measured(project) is None
    assert asv(*older, ASV_PYTHONPATH=str(tmp_path / "older"))[0] == 0
    assert measured(project) == [42]


def test_broken_files_do_not_stop_asv(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    [result] = project.glob("results/box/*-*.json")
    broken = {
        result: b"[]",
        result.with_name("machine.json"): b'{"machine": "\xff"',
        project / "results/benchmarks.json": b"",
    }
    for file, content in broken.items():
        file.write_bytes(content)
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 0
    for file, content in broken.items():
        assert f"{file.relative_to(project)} is broken: " in said
        assert f"set aside as {file.name}.broken" in said
        assert file.with_name(f"{file.name}.broken").read_bytes() == content
    assert measured(project) == [42]


def test_a_fork_without_main_and_a_shallow_clone_are_told_what_works(asv, project, tmp_path):
    git(project, "branch", "--move", "trunk")
    status, said = asv("run")
    assert status == 1
    assert "there is no branch main here: run `git branch main HEAD`" in said
    assert asv("run", "--machine", "box", "--python=same")[0] == 0
    git(tmp_path, "clone", "--quiet", str(project), "fork")
    fork = tmp_path / "fork"
    advice = re.search("run `git (branch main origin/trunk)`", asv("publish", cwd=fork)[1])
    git(fork, *advice[1].split())
    assert "benchmarks.json missing" in asv("publish", "--no-pull", cwd=fork)[1]
    git(project, "commit", "--quiet", "--allow-empty", "-m", "more")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{project}", "shallow")
    status, said = asv("publish", cwd=tmp_path / "shallow")
    assert status == 1
    assert "`git fetch --unshallow`" in said


@pytest.fixture
def run(asv, project):
    """A command that records again what was, and whose benchmark does not end; that one's pid."""
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    wait = project.parent / "wait"
    options = ("run", "--machine", "box", *HERE)
    code = f"from tracking import project; project.asv(*{options!r})"
    env = {**os.environ, "HOME": str(project.parent), "ASV_PYTHONPATH": str(project)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=project, env={**env, "WAIT": str(wait)}, **pipes) as process:
        until(lambda: wait.exists() and wait.read_text().endswith("\n"))
        yield process, int(wait.read_text().split()[1])
        process.kill()


def until(done):
    """Wait until something is so, for a minute."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def parent(pid):
    """The process that started one that runs, None if it does not run."""
    fields = ["ps", "-o", "ppid=,stat=", "-p", str(pid)]
    said = subprocess.run(fields, capture_output=True, text=True).stdout.split()
    return int(said[0]) if said and not said[1].startswith("Z") else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_ends_what_it_started(number, run, asv, project):
    process, benchmark = run
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    until(lambda: parent(benchmark) is None)
    assert measured(project) == [42]
    assert asv("run", "--machine", "box", *HERE)[0] == 0


def test_one_run_at_a_time_and_after_kill_9_nothing_is_lost(run, asv, project):
    """The asv of a killed command goes on, and so does its lock."""
    process, benchmark = run
    its_asv = parent(benchmark)
    for _ in range(2):
        status, said = asv("run", "--machine", "box", *HERE)
        assert status == 1
        assert "another run measures in this checkout" in said
        process.kill()
        process.wait()
    assert "another run" not in asv("publish")[1]
    os.kill(its_asv, signal.SIGKILL)
    until(lambda: parent(its_asv) is None)
    os.kill(benchmark, signal.SIGKILL)
    assert measured(project) == [42]
    assert asv("run", "--machine", "box", *HERE)[0] == 0
