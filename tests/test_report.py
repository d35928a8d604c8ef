"""`make report`: every step is taken, whatever became of those before; it says nothing private."""

import platform
import re
import signal
import subprocess
import sys
import time

import pytest

from tools import report
from tools.report import Report, Step
from tracking import project, repository

SCRIPT = "import os, signal, subprocess, sys, time; print('said before', flush=True); "


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Another home, and folders of results and logs that are empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home/jane"))
    (tmp_path / "home/jane").mkdir(parents=True)
    monkeypatch.setattr(report, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(project, "ROOT", tmp_path)
    project.record_machine("box")
    return tmp_path


@pytest.fixture
def fake(tmp_path):
    """Make a step of Python text."""

    def make(name, text, minutes=1.0):
        script = tmp_path / f"{name}.py"
        script.write_text(SCRIPT + text)
        return Step(name, minutes, (sys.executable, str(script)))

    return make


def happened(home):
    """Return {step: what happened} of the written report."""
    text = (home / "results/box/report.md").read_text()
    return dict(re.findall(r"^\| (\w+) \| (.*?) \| \d+ \|$", text, re.M))


def runs(number):
    """Whether a process runs; dead, it stays listed until its parent has taken note of it."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", number], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


def test_each_step_survives_the_one_before(home, fake):
    child = home / "child"
    steps = [
        fake("fails", "sys.exit(3)"),
        fake("raises", "raise RuntimeError('[metal::Device] Unable to build metal library')"),
        fake("crashes", "os.abort()"),
        fake("hangs", "time.sleep(600)", minutes=0.02),
        fake(
            "leaves",
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
            f"open({str(child)!r}, 'w').write(str(child.pid))",
        ),
    ]
    Report("box", steps).take()
    assert happened(home) == {
        "fails": "failed (exit status 3)",
        "raises": "failed (exit status 1)",
        "crashes": f"ended by signal 6 ({signal.strsignal(6)})",
        "hangs": "stopped after 1 s",
        "leaves": "ok",
    }
    text = (home / "results/box/report.md").read_text()
    assert "    RuntimeError: [metal::Device] Unable to build metal library\n" in text
    assert text.count("    said before\n") == len(steps)
    for _ in range(100):
        if runs(child.read_text()):
            time.sleep(0.05)
    assert not runs(child.read_text())


def test_what_is_out_of_time_is_not_begun(home, fake):
    Report("box", [fake("late", "")]).take(minutes=0)
    assert happened(home) == {"late": "not run, no time was left"}


def test_interrupted_in_the_middle_it_ends_what_it_started(home, fake, monkeypatch):
    pid = home / "pid"
    interrupts = f"open({str(pid)!r}, 'w').write(str(os.getpid())); "
    interrupts += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    steps = [fake("first", ""), fake("second", interrupts), fake("third", "")]
    monkeypatch.setattr(report, "steps_on", lambda machine: steps)
    monkeypatch.setattr(sys, "argv", ["report", "--machine", "box"])
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert report.main() == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not runs(pid.read_text())
    assert happened(home) == {"first": "ok", "second": "interrupted", "third": "not run"}


def test_nothing_private_is_in_the_folder(home, fake, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "janes-mac.local")
    where = f"{home}/home/jane/lib.py on janes-mac.local (janes-mac) by jane in {repository.ROOT}/x"
    Report("box", [fake("tells", f"print({where!r}); print('janet')")]).take()
    [file] = (home / "results/box").iterdir()
    text = file.read_text()
    assert "~/lib.py on … (…) by … in ./x" in text
    assert "janet" in text
    assert not re.search(r"jane\b|janes-mac", text)


def test_recorded_results_tell_of_nobody():
    for file in (repository.ROOT / "results").rglob("*.*"):
        assert not re.search(r"/home/|/Users/|/root/|\.local\b", file.read_text()), file


@pytest.mark.parametrize(
    ("cpu", "ram", "name"),
    [
        ("Apple M2 Max", 32 * 2**30, "apple-m2-max-32gb"),
        ("", 8 * 2**30 - 10**7, "arm64-8gb"),
    ],
)
def test_a_machine_is_named_after_chip_and_memory(cpu, ram, name, home, monkeypatch):
    about = {"cpu": cpu, "ram": str(ram), "arch": "arm64", "machine": "janes-mac"}
    monkeypatch.setattr(report.Machine, "get_defaults", lambda: about)
    results = home / "results"
    assert report.default_name(results) == name
    (results / name).mkdir(parents=True)  # of another machine
    assert report.default_name(results) == f"{name}-2"
    monkeypatch.setattr(report, "known_machines", lambda: {name: {}})
    assert report.default_name(results) == name


def test_the_steps_are_commands_that_exist_and_fit_into_half_an_hour():
    steps = report.steps_on("box")
    *others, last = steps
    assert last.name == "short grid"  # which can be cut anywhere, and takes what is left
    assert sum(step.minutes for step in others) + 2 < report.MINUTES <= 28
    for step in steps:
        files = [word for word in step.command if word.startswith("tests/")]
        assert all((repository.ROOT / file).exists() for file in files)
        ask = ["--dry-run"] if step.command[0] == "make" else ["--help"]
        command = [*step.command, *ask]
        assert subprocess.run(command, cwd=repository.ROOT, capture_output=True).returncode == 0


def test_it_begins_where_mlx_cannot_be_imported():
    """What is broken on that Mac is what it is to tell."""
    code = "import sys; sys.modules['mlx'] = None; import tools.report"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
