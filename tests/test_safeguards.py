"""asv's own commands, as a user types them, in a small project that has this one's safeguards."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tracking import lock, safeguards
from tracking.repository import ROOT

MODULES = ("__init__", "files", "lock", "repository", "safeguards", "valid")
SUITE = """
import os
import re
import pagedkv


class Answer:
    version = "1"

    def track_answer(self):
        return pagedkv.ANSWER + (100 if os.environ.get("PAGEDKV_DECODE_PATH") else 0)
"""
HERE = ("-E", f"existing:{sys.executable}", "--set-commit-hash", "HEAD")


def git(root, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


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

    def run(*args, stdin=subprocess.DEVNULL, cwd=project, **env):
        done = subprocess.run(
            [sys.executable, "-m", "asv", *args],
            stdin=stdin,
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
    files = [f for f in project.glob("results/box/*.json") if f.name != "machine.json"]
    return (
        json.loads(files[0].read_text())["results"]["all.Answer.track_answer"][0] if files else None
    )


def test_a_run_records_what_head_answers(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    assert measured(project) == [42]


def test_the_environment_forces_nothing(asv, project):
    forced = {"PAGEDKV_DECODE_PATH": "gather_sdpa", "MLX_DISABLE_COMPILE": "1"}
    status, said = asv("run", "--machine", "box", *HERE, **forced)
    assert status == 0
    assert re.search(
        "benchmarks run without .*MLX_DISABLE_COMPILE, .*PAGEDKV_DECODE_PATH, which", said
    )
    assert measured(project) == [42]


def test_without_the_safeguard_the_environment_falsifies(asv, project):
    config = json.loads((project / "asv.conf.json").read_text())
    (project / "asv.bare.conf.json").write_text(json.dumps({**config, "plugins": []}))
    options = ("--config", "asv.bare.conf.json", "--machine", "box", *HERE)
    assert asv("run", *options, PAGEDKV_DECODE_PATH="gather_sdpa")[0] == 0
    assert measured(project) == [142]


def test_what_forces_is_forgotten_and_the_rest_stays():
    stays = {"PATH": "", "HOME": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", "LC_ALL": ""}
    goes = {"PAGEDKV_AUTOTUNE": "", "OMP_NUM_THREADS": "", "PYTHONOPTIMIZE": "", "GIT_DIR": ""}
    environ = {**stays, **goes}
    safeguards.forget(environ)
    assert environ == stays


@pytest.mark.parametrize(
    ("command", "takes"),
    [
        ("run --machine box HEAD^!", True),
        ("check", True),
        ("publish", False),
    ],
)
def test_the_lock_is_taken_for_commands_that_measure(command, takes, asv, project):
    (project / ".asv").mkdir()
    with (project / ".asv/lock").open("a+") as handle:
        lock.fcntl.flock(handle, lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB)
        status, said = asv(*command.split())
        assert ("another run measures in this checkout" in said) is takes
        assert status == 1
        if command.startswith("run"):  # of who holds the lock
            assert asv("run", "--machine", "box", *HERE, stdin=handle)[0] == 0


def test_broken_files_do_not_stop_asv(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    [result] = [f for f in project.glob("results/box/*.json") if f.name != "machine.json"]
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


def test_what_asv_knows_of_machines_is_broken(asv, project):
    (project.parent / ".asv-machine.json").write_text('{"version": 1, "box": []}')
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 1
    assert ".asv-machine.json is broken: [] is not of type 'object', at box" in said


def test_a_machine_may_not_be_called_so(asv, project):
    record = {"machine": "<b>", "os": "", "arch": "", "cpu": "", "num_cpu": "1", "ram": ""}
    (project.parent / ".asv-machine.json").write_text(json.dumps({"<b>": record, "version": 1}))
    status, said = asv("run", "--machine", "<b>", *HERE)
    assert status == 1
    assert "results/<b>/machine.json would be broken: " in said
    assert not (project / "results").exists()


def test_results_that_cannot_be_written(asv, project):
    (project / "results").mkdir()
    (project / "results/box").touch()  # where a folder should be; a superuser may write all others
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 1
    assert "results/box/machine.json cannot be written and is as it was: " in said


def test_a_clone_without_main(asv, project):
    git(project, "branch", "--move", "trunk")
    for command in ("run", "publish"):
        status, said = asv(command)
        assert status == 1
        assert "there is no branch main here: run `git branch main" in said
    assert asv("run", "--machine", "box", "--python=same")[0] == 0


def test_a_shallow_clone(asv, project, tmp_path):
    git(project, "commit", "--quiet", "--allow-empty", "-m", "more")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{project}", "shallow")
    for command in ("run", "publish"):
        status, said = asv(command, cwd=tmp_path / "shallow")
        assert status == 1
        assert "`git fetch --unshallow`" in said
