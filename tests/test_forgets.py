"""What earlier jobs leave on a machine is found, and what it would do if it was not."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from tracking.repository import ROOT

SCRIPT = ROOT / ".github/scripts/forgets.py"
spec = importlib.util.spec_from_file_location("forgets", SCRIPT)
forgets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forgets)
USER = 501 + os.getuid()  # not the one whose files these are
PROCESSES = f"""\
    1     0     0 /sbin/launchd
  300     1 {USER} /usr/libexec/lsd
  301     1 {USER} /System/Library/CoreServices/Finder.app/Contents/MacOS/Finder
  400     1     0 /bin/sh /usr/local/libexec/pagedkv-runner
  410   400 {USER} /bin/bash /Users/bench/actions-runner/run.sh
  411   410 {USER} /Users/bench/actions-runner/bin/Runner.Listener run
  412   411 {USER} /Users/bench/actions-runner/bin/Runner.Worker spawnclient 1 2
  413   412 {USER} /bin/bash --noprofile step.sh
  {os.getpid()}   413 {USER} python3 -I forgets.py
  415   411 {USER} (node)
  500     1   777 python3 somebody/elses.py
"""


@pytest.fixture
def machine(tmp_path):
    """A new account with a runner at the first step of its first job."""
    home = tmp_path / "bench"
    runner = home / "actions-runner"
    workspace = runner / "_work/pagedkv/pagedkv"
    for folder in (workspace, runner / "_work/_temp", runner / "_diag", home / "Library/Python"):
        folder.mkdir(parents=True)
    for name in ("Documents", "Library/Caches", "Library/LaunchAgents"):
        (home / name).mkdir(exist_ok=True)
    shared, programs = tmp_path / "shared", tmp_path / "programs"
    shared.mkdir()
    programs.mkdir(mode=0o555)
    (runner / ".runner").write_text("\ufeff" + json.dumps({"agentId": 1, "ephemeral": True}))
    (runner / ".env").write_text("LANG=en_US.UTF-8\nMACHINE=mac\n")
    (runner / "_diag/Worker_1.log").touch()
    environ = {"HOME": str(home), "GITHUB_WORKSPACE": str(workspace), "PATH": str(programs)}
    made = SimpleNamespace(
        home=home, runner=runner, workspace=workspace, shared=shared, environ=environ,
        user=USER, groups=["staff"], crontab="# nothing\n", processes=PROCESSES,
    )  # fmt: skip
    made.found = lambda: forgets.leftovers(
        made.environ, made.user, made.groups, made.crontab, made.processes, [shared]
    )
    return made


def test_a_new_machine_has_nothing(machine):
    assert machine.found() == []


def file(name, text="left"):
    def leave(machine):
        path = machine.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return leave


def variable(name, value="1"):
    return lambda machine: machine.environ.update({name: value})


def process(command, parent=1):
    def leave(machine):
        machine.processes += f"  600 {parent} {USER} {command}\n"

    return leave


LEFT = {
    "git's configuration": (file(".gitconfig"), ".gitconfig is there"),
    "git's other configuration": (file(".config/git/config"), ".config is there"),
    "git's hooks": (file(".hooks/post-checkout"), ".hooks is there"),
    "pip.conf": (file(".pip/pip.conf"), ".pip is there"),
    "macOS's pip.conf": (file("Library/Application Support/pip/pip.conf"), "Support/pip is there"),
    "pip's cache": (file("Library/Caches/pip/http/a"), "Caches/pip is there"),
    "packages": (file("Library/Python/3.12/lib/python/site-packages/a.pth"), "Python is there"),
    "packages on Linux": (file(".local/lib/python3.12/site-packages/a.pth"), ".local is there"),
    "a shell's": (file(".zshenv"), ".zshenv is there"),
    "npm's": (file(".npmrc"), ".npmrc is there"),
    "curl's": (file(".curlrc"), ".curlrc is there"),
    "keys": (file(".ssh/authorized_keys"), ".ssh is there"),
    "asv's record": (file(".asv-machine.json"), ".asv-machine.json is there"),
    "what pagedkv found out": (file("Library/Caches/pagedkv/a.json"), "Caches/pagedkv is there"),
    "an agent": (file("Library/LaunchAgents/a.plist"), "LaunchAgents is there"),
    "anything": (file("notes.txt"), "notes.txt is there"),
    "a checkout": (
        file("actions-runner/_work/pagedkv/pagedkv/.git/hooks/post-checkout"),
        "is not empty",
    ),
    "another checkout": (file("actions-runner/_work/other/other/a"), "_work/other is there"),
    "a tool": (file("actions-runner/_work/_tool/Python/a"), "tools of another job"),
    "the runner's .env": (file("actions-runner/.env", "LANG=C\nBASH_ENV=/x\n"), "sets BASH_ENV"),
    "a job's log": (file("actions-runner/_diag/Worker_0.log"), "logs of 2 jobs"),
    "a runner that stays": (file("actions-runner/.runner", '{"agentId": 1}'), "nothing of ephem"),
    "a runner that is broken": (file("actions-runner/.runner", "[]"), "nothing of ephemeral"),
    "BASH_ENV": (variable("BASH_ENV"), "has BASH_ENV"),
    "an index": (variable("PIP_INDEX_URL"), "has PIP_INDEX_URL"),
    "a library": (variable("DYLD_INSERT_LIBRARIES"), "has DYLD_INSERT_LIBRARIES"),
    "a proxy": (variable("https_proxy"), "has https_proxy"),
    "a decode path": (variable("PAGEDKV_DECODE_PATH"), "has PAGEDKV_DECODE_PATH"),
    "where one is": (variable("PATH", "/usr/bin:"), "an empty entry"),
    "a daemon": (process("/Users/bench/left --daemon"), "process 600 runs"),
    "a script": (process("/usr/bin/python3 /tmp/left.py"), "process 600 runs"),
    "a timed job": (lambda m: setattr(m, "crontab", "* * * * * x"), "crontab -l"),
    "an administrator": (lambda m: m.groups.append("admin"), "may change the machine (admin)"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_is_found(what, machine):
    leave, sentence = LEFT[what]
    leave(machine)
    [found] = machine.found()
    assert sentence in found


def test_what_the_job_itself_runs_is_its_own(machine):
    process("/Users/bench/actions-runner/externals/node20/bin/node x.js", parent=411)(machine)
    assert machine.found() == []


@pytest.mark.parametrize("mode", [0o757, 0o777])
def test_a_folder_of_programs_that_anybody_writes_to(mode, machine, tmp_path):
    (tmp_path / "programs").chmod(mode)
    assert "this account can write to" in machine.found()[0]


def test_a_folder_of_programs_that_is_its_own(machine):
    machine.user = os.getuid()
    assert any("this account can write to" in found for found in machine.found())


def test_files_of_an_account_with_the_same_number(machine):
    (machine.shared / "left").touch()
    time.sleep(0.02)
    (machine.runner / ".runner").chmod(0o600)  # set up after it
    (machine.shared / "new").touch()
    found = list(forgets.in_shared([machine.shared], os.getuid(), machine.runner))
    assert found == [f"{machine.shared / 'left'} is older than the runner"]
    assert list(forgets.in_shared([machine.shared], USER, machine.runner)) == []


def test_root_may_do_everything():
    assert list(forgets.account(0, []))


CHECKS = {
    "once": "a runner that stays",
    "configured": "the runner's .env",
    "environment": "BASH_ENV",
    "path_of_programs": "where one is",
    "at_home": "git's configuration",
    "at_work": "a checkout",
    "account": "an administrator",
    "timed": "a timed job",
    "running": "a daemon",
}


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_check_it_stays(check, machine, monkeypatch):
    LEFT[CHECKS[check]][0](machine)
    assert machine.found()
    monkeypatch.setattr(forgets, check, lambda *args: [])
    assert machine.found() == []


def runs(machine, *command, **variables):
    """Run a program as the next job would, in its workspace; return what it prints."""
    env = {"HOME": str(machine.home), "PATH": os.environ["PATH"], **variables}
    done = subprocess.run(
        command, cwd=machine.workspace, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout


def script(machine):
    """A program that an approved pull request left, and the trace it makes when it runs."""
    trace, program = machine.shared / "harm", machine.shared / "program"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    return trace, program


@pytest.mark.parametrize("key", ["core.fsmonitor", "core.hooksPath", "init.templateDir"])
def test_git_runs_what_was_left(key, machine):
    trace, program = script(machine)
    hooks = machine.shared / "hooks"
    hooks.mkdir()
    for hook in ("post-checkout", "reference-transaction"):
        (hooks / hook).symlink_to(program)
    value = {"core.fsmonitor": program, "core.hooksPath": hooks, "init.templateDir": machine.shared}
    runs(machine, "git", "config", "--global", key, str(value[key]))
    runs(machine, "git", "init", "--quiet")
    (machine.workspace / "a").touch()
    runs(machine, "git", "add", "a")
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    runs(machine, "git", *identity, "commit", "--quiet", "-m", "a")
    assert trace.exists()
    assert f"{machine.home / '.gitconfig'} is there" in machine.found()


def test_git_fetches_from_where_was_left(machine):
    other = machine.shared / "other"
    for command in (
        ["init", "--quiet", str(other)],
        ["-C", str(other), "-c", "user.name=t", "-c", "user.email=t@localhost",
         "commit", "--quiet", "--allow-empty", "-m", "something else"],
        ["config", "--global", f"url.{machine.shared}/.insteadOf", "https://example.org/o/"],
        ["clone", "--quiet", "https://example.org/o/other", "."],
    ):  # fmt: skip
        runs(machine, "git", *command)
    assert "something else" in runs(machine, "git", "log", "-1")
    assert f"{machine.home / '.gitconfig'} is there" in machine.found()


def test_a_shell_runs_what_was_left_in_dotenv(machine):
    trace, program = script(machine)
    setting = {"BASH_ENV": str(program)}
    runs(machine, "bash", "-p", "-c", "true", **setting)
    assert not trace.exists()  # the shell of the step that looks
    runs(machine, "bash", "--noprofile", "--norc", "-e", "-c", "true", **setting)
    assert trace.exists()
    machine.environ |= setting
    assert machine.found() == ["the environment has BASH_ENV"]


def test_pip_takes_packages_from_where_was_left(machine):
    file(".config/pip/pip.conf", "[global]\nindex-url = https://example.org/left\n")(machine)
    said = runs(machine, sys.executable, "-m", "pip", "config", "list")
    assert "https://example.org/left" in said
    assert f"{machine.home / '.config'} is there" in machine.found()


def test_it_runs_by_the_systems_python_alone(machine):
    """And says what is left in GitHub's words; as root, or in a home like this, it refuses."""
    file(".gitconfig")(machine)
    env = {**machine.environ, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"::error::{machine.home / '.gitconfig'} is there" in done.stdout
    assert "docs/runner.md says how" in done.stderr
    assert "Traceback" not in done.stderr


def steps_on_the_machine(workflow):
    jobs = YAML(typ="safe").load((ROOT / ".github/workflows" / workflow).read_text())["jobs"]
    [steps] = [job["steps"] for job in jobs.values() if "self-hosted" in job.get("runs-on", "")]
    return steps


@pytest.mark.parametrize("workflow", ["benchmark-pr.yml", "benchmark-publish.yml"])
def test_it_is_what_jobs_on_the_machine_begin_with(workflow):
    fetch, look, *later = steps_on_the_machine(workflow)
    assert "/contents/.github/scripts/" in fetch["run"]
    assert "ref=$GITHUB_WORKFLOW_SHA" in fetch["run"]
    assert look["run"] == '/usr/bin/python3 -I "$RUNNER_TEMP/forgets.py"'
    for step in (fetch, look):
        assert re.fullmatch(r"/bin/bash --noprofile --norc -p -e \{0\}", step["shell"])
        assert "if" not in step
        assert "continue-on-error" not in step
    for step in later:
        if "always()" in step.get("if", ""):  # not if this machine was refused
            assert "outcome" in step["if"]


@pytest.mark.skipif(not os.path.exists("/usr/bin/curl"), reason="curl is elsewhere")
@pytest.mark.parametrize("workflow", ["benchmark-pr.yml", "benchmark-publish.yml"])
def test_the_step_before_fetches_mains_scripts(workflow, tmp_path):
    (tmp_path / "repos/o/p").mkdir(parents=True)
    (tmp_path / "repos/o/p/contents").symlink_to(ROOT)
    handler = partial(Quiet, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {
            "GITHUB_API_URL": f"http://127.0.0.1:{server.server_port}",
            "GITHUB_REPOSITORY": "o/p",
            "GITHUB_WORKFLOW_SHA": "abc",
            "GH_TOKEN": "secret",
            "RUNNER_TEMP": str(tmp_path),
        }
        command = ["bash", "--noprofile", "--norc", "-p", "-e", "-c"]
        fetch = steps_on_the_machine(workflow)[0]["run"]
        subprocess.run([*command, fetch], env=env, check=True)
        server.shutdown()
    got = {file.name for file in tmp_path.glob("*.py")}
    assert got == {"forgets.py"} | ({"pull_request.py"} if "pr" in workflow else set())
    for name in got:
        assert (tmp_path / name).read_text() == SCRIPT.with_name(name).read_text()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
