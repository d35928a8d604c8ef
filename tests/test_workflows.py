"""What GitHub's jobs may do, read from the workflows."""

import os
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from tracking.repository import ROOT

WORKFLOWS = {
    file.name: YAML(typ="safe").load(file.read_text())
    for file in ROOT.glob(".github/workflows/*.yml")
}
JOBS = {
    f"{file}: {name}": job
    for file, workflow in WORKFLOWS.items()
    for name, job in workflow["jobs"].items()
}
STEPS = [
    pytest.param(job, step, id=f"{name}: {step.get('name') or step.get('uses')}")
    for name, job in JOBS.items()
    for step in job.get("steps", [])
]
INSTALLS = re.compile(r"\b(make|pip|npm|uv|pytest|asv|pagedkv|\.venv)\b")
SECRET = re.compile(r"github\.token|secrets\.")


def writes(job):
    return [name for name, value in (job.get("permissions") or {}).items() if value == "write"]


@pytest.mark.parametrize(("job", "step"), STEPS)
def test_no_step_has_a_token_and_runs_what_was_downloaded(job, step):
    if SECRET.search(str(step.get("env", {}))):
        assert not INSTALLS.search(step["run"])
    assert not SECRET.search(step.get("run", ""))  # a command line is for all to see
    assert not SECRET.search(str(job.get("env", "")))


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if writes(job)])
def test_a_job_that_may_write_installs_nothing(name):
    """Nor does a step of it before leave something behind for the next."""
    for step in JOBS[name]["steps"]:
        assert not INSTALLS.search(step.get("run", ""))
        for line in re.findall(r"python3.*", step.get("run", "")):
            assert re.match(r"python3 -I \.github/scripts/\w+\.py ", line)
    assert JOBS[name]["runs-on"] == "ubuntu-24.04"


def test_which_jobs_may_write():
    assert {name: writes(job) for name, job in JOBS.items() if writes(job)} == {
        "benchmark-pr.yml: comment": ["pull-requests"],
        "benchmark-publish.yml: keep": ["contents"],
        "benchmark-publish.yml: deploy": ["pages", "id-token"],
    }
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == ({"contents": "read"} if name == "ci.yml" else {})


@pytest.mark.parametrize(("job", "step"), STEPS)
def test_actions_are_pinned_and_checkouts_keep_no_token(job, step):
    action, _, version = step.get("uses", "").partition("@")
    if action:
        assert re.fullmatch("[0-9a-f]{40}", version)
    if action == "actions/checkout":
        assert step["with"]["persist-credentials"] is False


def test_ci_runs_for_every_push_on_every_python():
    assert WORKFLOWS["ci.yml"]["on"] == {"push": None, "pull_request": None}
    of = JOBS["ci.yml: test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={of["python"][0]}"' in project
    assert of["python"] == ["3.10", "3.11", "3.12", "3.13"]


METAL = JOBS["ci.yml: metal"]


def step_of_metal(words):
    [step] = [step for step in METAL["steps"] if words in step.get("run", "")]
    return step


def test_metal_runs_on_a_mac_and_its_failures_count():
    assert METAL["runs-on"] == "macos-15"
    for part in (METAL, step_of_metal("run.py")):
        assert "if" not in part
        assert "continue-on-error" not in part
    shards = METAL["strategy"]["matrix"]["shard"]
    assert shards == list(range(1, len(shards) + 1))
    command = step_of_metal("run.py")["run"].split()
    assert (ROOT / command[1]).exists()
    assert command[2:] == ["shard", '"$SHARD"', str(len(shards)), '"$RUNNER_TEMP/metal"']


def test_after_a_failure_on_a_mac_the_canary_says_whether_it_is_the_machine():
    last = JOBS["ci.yml: test"]["steps"][-1]
    assert last["if"] == "failure() && runner.os == 'macOS'"
    assert (ROOT / last["run"].split()[1]).name == "canary.py"


REPORT = """# hosted-mac

| step | what happened | seconds |
| --- | --- | --: |
| tests | ok | 123 |
| step | stopped after 300 s | 300 |

## tests

    | 16 | 4.56 |
"""


def test_no_number_of_a_virtual_gpu_is_kept(tmp_path):
    folder = tmp_path / "results/hosted-mac"
    folder.mkdir(parents=True)
    for name in ("report.md", "machine.json", "0b9e8013-virtualenv.json", "noise.csv"):
        (folder / name).write_text(REPORT)
    script = step_of_metal("make report")["run"].replace("make report MACHINE", "MACHINE")
    subprocess.run(["git", "init", "-q", "-b", "main", tmp_path], check=True)
    author = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    commit = ["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "one"]
    subprocess.run(commit, check=True)
    env = {**os.environ, "GITHUB_WORKSPACE": str(tmp_path), "RUNNER_TEMP": str(tmp_path / "temp")}
    subprocess.run(["bash", "-e", "-c", script], check=True, cwd=tmp_path, env=env)
    kept = tmp_path / "temp/metal/report"
    assert sorted(file.name for file in kept.iterdir()) == ["machine.json", "report.md"]
    assert (kept / "report.md").read_text().splitlines() == [
        "| step | what happened |",
        "| --- | --- |",
        "| tests | ok |",
        "| step | stopped after 300 s |",
    ]
