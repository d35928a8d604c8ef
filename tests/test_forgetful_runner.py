"""The account of a job is made, used once and thrown away, whatever happens; no Mac is needed."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from tracking.repository import ROOT

SCRIPT = ROOT / ".github/scripts/forgetful-runner.sh"
# What only root on a Mac can do. Each says what it was asked; the account is a folder.
PROGRAMS = {
    "sysadminctl": 'case $1 in -addUser) touch "$LOG.account" ;; *) rm -f "$LOG.account" ;; esac',
    "createhomedir": 'mkdir "$ACCOUNTS/bench"',
    "id": 'test -e "$LOG.account"',
    "launchctl": "exit 1",
    "pkill": "exit 1",
    "crontab": "exit 1",
    "chown": "",
    "find": "",
    "uuidgen": "echo a-password",
    "curl": """echo '{"encoded_jit_config": "for one job"}'""",
    "sudo": 'while [ "$1" != env ]; do shift; done; exec "$@"',
}


@pytest.fixture
def mac(tmp_path):
    """A folder of stubs, the store of the script, and how to start it."""
    programs, store = tmp_path / "programs", tmp_path / "store"
    (store / "runner").mkdir(parents=True)
    programs.mkdir()
    (tmp_path / "accounts").mkdir()
    for name, does in PROGRAMS.items():
        said = f'echo "{name} $*" >>"$LOG"\n'
        (programs / name).write_text(f"#!/bin/bash\n{said}{does}\n")
        (programs / name).chmod(0o755)
    run = store / "runner/run.sh"
    run.write_text('#!/bin/bash\nenv >"$HOME/../environment"\necho "$@" >"$HOME/../arguments"\n')
    run.chmod(0o755)
    (store / "token").write_text("secret")
    (store / "number").write_text("600")
    (store / "environment").write_text("MACHINE=mac\n")
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PROGRAMS": os.environ["PATH"],
        "LOG": str(tmp_path / "log"),
        "STORE": str(store),
        "ACCOUNTS": str(tmp_path / "accounts"),
        "REPOSITORY": "o/p",
    }
    command = ["bash", str(SCRIPT)]
    return SimpleNamespace(
        folder=tmp_path,
        home=tmp_path / "accounts/bench",
        run=run,
        asked=lambda: (tmp_path / "log").read_text().splitlines(),
        start=lambda: subprocess.Popen(command, env=env, start_new_session=True),
    )


def thrown_away(mac, number):
    """Whether the last thing that was asked is to forget an account of a number."""
    last = [line.split()[0] for line in mac.asked()[-6:]]
    assert last == ["launchctl", "pkill", "crontab", "id", "sysadminctl", "find"]
    assert mac.asked()[-5] == f"pkill -KILL -U {number}"
    assert "-deleteUser bench" in mac.asked()[-2]
    assert f"-user {number} -delete" in mac.asked()[-1]
    return not mac.home.exists()


def test_an_account_is_for_one_job(mac):
    for number in (601, 602):
        assert mac.start().wait(30) == 0
        assert thrown_away(mac, number)
    made = [line for line in mac.asked() if "-addUser" in line]
    assert [line.split("-UID ")[1].split()[0] for line in made] == ["601", "602"]
    assert not any("-admin" in line for line in made)


def test_the_runner_gets_one_job_and_no_token(mac):
    """Nor does what root has in its environment get to it."""
    assert mac.start().wait(30) == 0
    assert (mac.folder / "accounts/arguments").read_text() == "--jitconfig for one job\n"
    environment = (mac.folder / "accounts/environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in environment}
    assert names <= {"HOME", "USER", "LOGNAME", "LANG", "PATH", "PWD", "OLDPWD", "SHLVL", "_"}
    assert "secret" not in "".join(mac.asked())


def test_the_settings_of_the_runner_are_roots(mac):
    mac.run.write_text('#!/bin/bash\ncp .env "$HOME/../seen"\necho BASH_ENV=/x >>.env\n')
    for _ in range(2):
        assert mac.start().wait(30) == 0
        assert (mac.folder / "accounts/seen").read_text() == "MACHINE=mac\n"


def test_a_job_that_fails_is_forgotten_too(mac):
    mac.run.write_text('#!/bin/bash\ntouch "$HOME/left"\nexit 3\n')
    assert mac.start().wait(30) == 3
    assert thrown_away(mac, 601)


def test_a_power_cut_is_made_up_for(mac):
    """Killed in the middle of a job, the next start forgets that account before it makes one."""
    mac.run.write_text('#!/bin/bash\ntouch "$HOME/left"\nsleep 60\n')
    process = mac.start()
    deadline = time.monotonic() + 30
    while not (mac.home / "left").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert (mac.home / "left").exists()
    before = len(mac.asked())
    mac.run.write_text("#!/bin/bash\ntest ! -e $HOME/left\n")
    assert mac.start().wait(30) == 0
    assert mac.asked()[before + 1] == "pkill -KILL -U 601"
    assert thrown_away(mac, 602)


def test_without_a_configuration_nothing_runs(mac):
    (mac.folder / "programs/curl").write_text("#!/bin/bash\nexit 22\n")
    assert mac.start().wait(30) != 0
    assert not (mac.folder / "accounts/arguments").exists()
    assert thrown_away(mac, 601)
