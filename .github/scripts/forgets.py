"""Refuse to run a job where an earlier one left something behind.

The first step of jobs on the benchmark machine, before git, Python or pip read any configuration.
It finds a machine that was set up to remember (docs/runner.md says how to set one up that forgets)
and what jobs leave by accident. It is no proof against who has the account: throwing that away is.
"""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

# What a new account of macOS has, and the runner.
NEW_HOME = {
    *(".CFUserTextEncoding", ".DS_Store", ".Trash", ".localized", "Applications", "Desktop"),
    *("Documents", "Downloads", "Library", "Movies", "Music", "Pictures", "Public", "Sites"),
}
IN_LIBRARY = (
    *("LaunchAgents", "Python", "Application Support/pip", "Application Support/virtualenv"),
    *("Caches/pip", "Caches/pagedkv", "Preferences/pip", "Services", "Input Methods"),
)
WORK = {"_actions", "_PipelineMapping", "_temp", "_tool"}  # the runner's own, beside workspaces
SETTINGS = {"ACTIONS_RUNNER_HOOK_JOB_STARTED", "LANG", "MACHINE"}  # in the runner's .env
FORBIDDEN = re.compile(
    r"(BASH_ENV|ENV|CDPATH|IFS|PS4|SHELLOPTS|PERL5.*|RUBY.*|LD_.*|DYLD_.*|GIT_.*|PIP_.*|PYTHON.*"
    r"|VIRTUALENV_.*|UV_.*|NODE_.*|NPM_.*|MAKE(FLAGS|FILES)|CURL_.*|SSL_.*|.*_CA_BUNDLE|.*_PROXY"
    r"|XDG_.*|ASV_.*|MLX_.*|PAGEDKV_.*)",
    re.IGNORECASE,
)
ADMINISTRATORS = {"admin", "docker", "root", "sudo", "wheel"}
SHARED = ("/tmp", "/var/tmp", "/Users/Shared")
# Programs of macOS that run for every account, none of which runs a script; and dead processes.
SYSTEM = re.compile(r"/System/(?!.*Ruby)|/usr/libexec/|/usr/sbin/|/Library/Apple/|\(|.*<defunct>$")


def once(runner):
    """Look whether the runner takes one job only, and whether this is its first."""
    try:
        settings = json.loads((runner / ".runner").read_text("utf-8-sig"))
        kept = {key.lower(): str(value).lower() for key, value in settings.items()}
    except (OSError, ValueError, AttributeError):
        kept = {}
    if kept.get("ephemeral") != "true":
        yield f"{runner / '.runner'} says nothing of ephemeral: the runner takes more than one job"
    logs = list((runner / "_diag").glob("Worker_*.log"))
    if len(logs) > 1:
        yield f"the runner has logs of {len(logs)} jobs"


def configured(runner):
    """Look at what the runner sets for every job."""
    file = runner / ".env"
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        name = line.partition("=")[0].strip()
        if name and name not in SETTINGS:
            yield f"{file} sets {name}"


def environment(environ):
    """Look for variables that change what programs run or where they look."""
    for name in sorted(environ):
        if FORBIDDEN.fullmatch(name):
            yield f"the environment has {name}"


def writable(path, user):
    """Return if the account may change what is at a path."""
    status = path.stat()
    mode, mine = status.st_mode, status.st_uid == user
    theirs = status.st_gid in os.getgroups()
    return bool(mine or (theirs and mode & stat.S_IWGRP) or mode & stat.S_IWOTH)


def path_of_programs(environ, user):
    """Look for folders of programs that a job could have added to."""
    for entry in environ.get("PATH", "").split(os.pathsep):
        if not os.path.isabs(entry):
            yield f"PATH has {entry or 'an empty entry'!r}, which depends on where one is"
        elif os.path.isdir(entry) and writable(Path(entry), user):
            yield f"PATH has {entry}, which this account can write to"


def at_home(home, runner):
    """Look for files that a new account does not have."""
    for path in sorted(home.iterdir()):
        if path.name not in NEW_HOME and path not in (runner, *runner.parents):
            yield f"{path} is there"
    for name in IN_LIBRARY:
        path = home / "Library" / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            yield f"{path} is there"


def at_work(workspace):
    """Look for what an earlier job checked out or downloaded."""
    work = workspace.parents[1]
    if workspace.exists() and any(workspace.iterdir()):
        yield f"the workspace {workspace} is not empty"
    for path in sorted(work.iterdir()):
        if path.name not in WORK and path != workspace.parent:
            yield f"{path} is there"
    if any(work.glob("_tool/*")):
        yield f"{work / '_tool'} has tools of another job"


def in_shared(folders, user, runner):
    """Look for files of this account that are older than its runner: an earlier one's."""
    since = (runner / ".runner").stat().st_ctime if (runner / ".runner").exists() else 0
    for folder in map(Path, folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            status = path.lstat()
            if status.st_uid == user and status.st_ctime < since:
                yield f"{path} is older than the runner"


def account(user, groups):
    """Look whether the account could change the machine."""
    powers = sorted(ADMINISTRATORS & set(groups))
    if user == 0 or powers:
        yield f"this account may change the machine ({', '.join(powers) or 'root'})"


def timed(crontab):
    """Look for what the account's name runs by the clock."""
    if any(line.strip() and not line.startswith("#") for line in crontab.splitlines()):
        yield "crontab -l lists something"


def running(processes, user, me):
    """Look for processes that are neither macOS's nor of this job.

    A line is number, parent's number, user's number and command, as `ps` prints it.
    """
    known, parents = {}, {}
    for line in processes.splitlines():
        number, parent, owner, command = line.split(None, 3)
        parents[int(number)] = int(parent)
        if int(owner) == user:
            known[int(number)] = command
    top = me
    while parents.get(top) in known:
        top = parents[top]
    job = {top}
    while new := {n for n in known if parents[n] in job and n not in job}:
        job |= new
    for number in sorted(set(known) - job):
        if not SYSTEM.match(known[number]):
            yield f"process {number} runs: {known[number]}"


def said(*command):
    """Return what a program of the system prints, nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=30)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace")


def leftovers(environ, user, groups, crontab, processes, shared=SHARED):
    """Return a sentence for each thing that a machine that forgets does not have."""
    home, workspace = Path(environ["HOME"]), Path(environ["GITHUB_WORKSPACE"])
    runner = workspace.parents[2]
    return [
        *once(runner),
        *configured(runner),
        *environment(environ),
        *path_of_programs(environ, user),
        *at_home(home, runner),
        *at_work(workspace),
        *in_shared(shared, user, runner),
        *account(user, groups),
        *timed(crontab),
        *running(processes, user, os.getpid()),
    ]


def main():
    """Say what is left, and exit with 1 if anything is."""
    found = leftovers(
        os.environ,
        os.getuid(),
        said("/usr/bin/id", "-Gn").split(),
        said("/usr/bin/crontab", "-l"),
        said("/bin/ps", "-axww", "-o", "pid=,ppid=,uid=,command="),
    )
    for sentence in found:
        print(f"::error::{sentence}")
    if found:
        sys.exit(
            "::error::this machine remembers earlier jobs; docs/runner.md says how one forgets"
        )
    print("nothing is left of earlier jobs")


if __name__ == "__main__":
    main()
