"""One run at a time in a checkout: processes that hold the lock of a folder, and end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tracking import lock

ROOT = lock.FILE.parents[1]
ACQUIRE = """
import os, subprocess, sys
from pathlib import Path
from asv.util import UserError
from tracking import lock
try:
    lock.acquire(Path(sys.argv[1], "state/lock"))
except UserError as error:
    sys.exit(str(error))
"""
HOLD = ACQUIRE + "print('held', flush=True); sys.stdin.read()"
# As asv starts benchmarks: no descriptor but the standard ones, a process group of its own.
START = """
print("held", flush=True)
options = {"stdin": subprocess.DEVNULL} if sys.argv[2:] else {}
code = "import time; print('measures', flush=True); time.sleep(600)"
call = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
command = [sys.executable, "-c", call]
child = subprocess.Popen(command, close_fds=True, start_new_session=True, **options)
child.wait()
"""


def python(code, *args, **options):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes | options)


def refusal(folder, **options):
    """What a run that comes is told, None if it gets the lock."""
    process = python(ACQUIRE, folder, **options)
    _, said = process.communicate(timeout=60)
    return said if process.returncode else None


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock until its input ends."""
    with python(HOLD, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_until_the_first_ends(held, tmp_path):
    said = refusal(tmp_path)
    assert "another run measures in this checkout" in said
    assert f"process {held.pid}: -c" in said
    assert "ended" not in said
    held.stdin.close()
    assert held.wait() == 0  # it read its input to the end, behind the lock
    assert refusal(tmp_path) is None


def test_the_environment_does_not_open_the_lock(held, tmp_path):
    """A variable did, until somebody's shell had a stale one."""
    assert refusal(tmp_path, env={**os.environ, "PAGEDKV_MEASURING": "1"})


@pytest.mark.parametrize("inherits", [True, False])
def test_what_a_killed_run_started_holds_the_lock(inherits, tmp_path):
    """And what if it did not inherit it: a second run measures beside it."""
    with python(ACQUIRE + START, tmp_path, *([] if inherits else ["no input"])) as process:
        assert process.stdout.readline() == "held\n"
        assert process.stdout.readline() == "measures\n"
        [child] = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            said = refusal(tmp_path)
            if inherits:
                assert f"process {process.pid}: -c" in said
                assert "that has ended, but not what it started, see `lsof" in said
            else:
                assert said is None
        finally:
            os.killpg(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while refusal(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert refusal(tmp_path) is None


def children(pid):
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [map(int, line.split()) for line in listed.stdout.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def test_what_the_holder_starts_holds_it_and_may_ask_again(tmp_path):
    again = f"""
lock.acquire(Path(sys.argv[1], "state/lock"))
sys.exit(subprocess.call([sys.executable, "-c", {ACQUIRE!r}, sys.argv[1]]))
"""
    process = python(ACQUIRE + again, tmp_path)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_there_may_be_no_input(tmp_path):
    command = f'"{sys.executable}" -c "$CODE" "{tmp_path}" <&-'
    env = {**os.environ, "CODE": ACQUIRE + START.replace("600", "0")}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("held\nmeasures\n", "")
