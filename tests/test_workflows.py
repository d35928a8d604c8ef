"""What GitHub's jobs may do, read from the workflows."""

import re

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
    for step in JOBS[name].get("steps", []):
        assert not INSTALLS.search(step.get("run", ""))
        for line in re.findall(r"python3.*", step.get("run", "")):
            assert re.match(r"python3 -I \.github/scripts/\w+\.py ", line)
    assert JOBS[name].get("runs-on", "ubuntu-24.04") == "ubuntu-24.04"


def test_which_jobs_may_write():
    assert {name: writes(job) for name, job in JOBS.items() if writes(job)} == {
        "benchmark-comment.yml: comment": ["pull-requests"],
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
