"""One run at a time in a checkout."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from asv.util import UserError

from tracking import lock


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of a checkout until its input ends."""
    code = (
        "import sys; from pathlib import Path; from tracking import lock;"
        f"lock.acquire(Path({str(tmp_path)!r}, 'state/lock')); print('held', flush=True);"
        "sys.stdin.read()"
    )
    env = {key: value for key, value in os.environ.items() if key != lock.HELD}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=lock.FILE.parents[1],
        env=env,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_until_the_first_ends(other, tmp_path, monkeypatch):
    monkeypatch.setenv(lock.HELD, "")  # and acquire's own change is undone after the test
    file = tmp_path / "state/lock"
    with pytest.raises(UserError, match=rf"another run measures .*process {other.pid}"):
        lock.acquire(file)
    assert not os.environ[lock.HELD]
    other.stdin.close()
    other.wait()
    lock.acquire(file)
    assert os.environ[lock.HELD] == str(os.getpid())


def test_what_the_holder_starts_does_not_ask(other, tmp_path, monkeypatch):
    monkeypatch.setenv(lock.HELD, "1")
    lock.acquire(tmp_path / "state/lock")


@pytest.mark.parametrize(
    ("argv", "takes"),
    [
        (["/x/bin/asv", "run", "HEAD^!"], True),
        (["/x/asv/__main__.py", "continuous", "--config", "c", "a", "b"], True),
        (["/x/bin/asv", "check"], True),
        (["/x/bin/asv", "find", "a..b", "decode"], True),
        (["/x/bin/asv", "publish"], False),
        (["/x/tracking/history.py", "run"], False),
    ],
)
def test_asv_takes_it_for_commands_that_measure(argv, takes, monkeypatch):
    taken = []
    monkeypatch.setattr(lock, "acquire", lambda: taken.append(1))
    monkeypatch.setattr(sys, "argv", argv)
    lock.setup()
    assert bool(taken) is takes


def test_asv_refuses(tmp_path):
    """asv's own command line in a project with this plugin, while this process holds its lock."""
    (tmp_path / "tracking").mkdir()
    shutil.copy(lock.__file__, tmp_path / "tracking")
    (tmp_path / "tracking/__init__.py").touch()
    (tmp_path / ".asv").mkdir()
    config = {"version": 1, "project": "p", "repo": ".", "plugins": [".tracking.lock"]}
    (tmp_path / "asv.conf.json").write_text(json.dumps(config))
    with (tmp_path / ".asv/lock").open("a+") as handle:
        lock.fcntl.flock(handle, lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB)
        done = subprocess.run(
            [sys.executable, "-m", "asv", "run", "--machine", "box", "HEAD^!"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, lock.HELD: ""},
            timeout=60,
        )
    assert done.returncode != 0
    assert "another run measures in this checkout" in done.stdout + done.stderr
