"""asv plugin: what asv does not look after itself, whichever of its commands runs.

One run measures at a time, the environment changes nothing that is measured, each number is of the
commit that it is recorded of, pip fetches only what requirements.lock lists by hash, and files of
results are valid and written whole.
"""

import fcntl
import functools
import json
import os
import re
import signal
import tempfile
from pathlib import Path

import asv.util
from asv.commands import make_argparser
from asv.config import Config
from asv.console import log
from asv.environment import ExistingEnvironment, get_environments
from asv.machine import MachineCollection
from asv.util import ProcessError, UserError

from tracking import valid
from tracking.files import shown, write_text
from tracking.repository import (
    ROOT,
    check_history,
    check_suite,
    git,
    git_environment,
    uncommitted_suite,
)

MEASURING = ("Run", "Continuous", "Find", "Profile", "Check", "Setup")  # they install commits
OF_HISTORY = ("Run", "Continuous", "Find", "Publish")
WITHOUT_RESULTS = ("Machine", "Preview", "Quickstart", "Update")
LOCK = ROOT / ".asv/lock"
REQUIREMENTS = ROOT / "requirements.lock"

# What decides how the package, MLX, the libraries below it or Python run.
FORCES = re.compile(
    r"(PAGEDKV|MLX|METAL|MTL|MALLOC)_.*|Malloc.*|GLIBC_TUNABLES|\w+_NUM_THREADS|"
    "VECLIB_MAXIMUM_THREADS|CUDA_LAUNCH_BLOCKING|ASV_PYTHONPATH|"
    "PYTHON(DEVMODE|HASHSEED|MALLOC|OPTIMIZE|PROFILEIMPORTTIME|TRACEMALLOC)"
)

WHERE = "import importlib.util; print(importlib.util.find_spec('pagedkv').origin)"


def setup():
    """Look after the command for which asv loads this plugin."""
    args = make_argparser()[0].parse_args()
    command = args.func.__self__.__name__
    # asv has gone to where its config is
    config = Config.load(Path(args.config).name if args.config else None)
    environ = git_environment(os.environ)  # for the git that asv calls
    os.environ.clear()
    os.environ |= environ
    bind_pip(os.environ)
    asv.util.write_json = functools.partial(write_json, config.results_dir)
    environments = get_environments(config, args.env_spec) if getattr(args, "env_spec", 0) else []
    existing = [one for one in environments if isinstance(one, ExistingEnvironment)]
    commit = getattr(args, "set_commit_hash", None)
    of_a_commit = commit or not existing
    if command in MEASURING:
        hold()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, interrupt)
        forget(os.environ, keep=("ASV_PYTHONPATH",) if existing else ())
    if command in OF_HISTORY and of_a_commit:
        check_history()
    if of_a_commit and _records(command, args, config):
        check_suite()
        for environment in existing:
            check_installed(environment, commit)
    elif command in MEASURING and (changed := uncommitted_suite()):
        log.warning(f"{changed} is not committed, and measures all the same")
    if command not in WITHOUT_RESULTS:
        if getattr(args, "machine", None):
            valid.check_machine_name(args.machine)
        machines = Path(MachineCollection.get_machine_file_path())
        if machines.exists():
            valid.load(machines)
        valid.set_aside(config.results_dir)


def bind_pip(environ):
    """Let pip fetch only what is locked: asv installs tools before the project's commands."""
    if not environ.get("ASV_UNLOCKED"):
        environ["PIP_CONSTRAINT"] = REQUIREMENTS.as_uri()  # pip cuts a path at its spaces
        environ["PIP_ONLY_BINARY"] = ":all:"  # to build a package is to fetch more
        environ["PIP_REQUIRE_HASHES"] = "1"


def _records(command, args, config):
    """Whether a command adds to the project's results."""
    if Path(config.results_dir).resolve() != ROOT / "results":
        return False
    if command == "Run":
        return not (args.dry_run or args.bench == ["just-discover"])
    return command == "Continuous" or (command == "Find" and not args.skip_save)


def hold():
    """Take the lock of this checkout until the process ends.

    asv installs each commit into an environment that all its runs share: of two runs at once, one
    would measure the other's commit.
    """
    LOCK.parent.mkdir(exist_ok=True)
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            "another run measures in this checkout (`lsof .asv/lock` names it); two at once would "
            "measure each other's commits. Wait for it, or use another clone."
        ) from None


def interrupt(number, frame):
    """Interrupt asv once; it ends the benchmark that runs, which more signals must not disturb."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def forget(environ, keep=()):
    """Remove what decides how things run from what benchmarks are started with, and say so."""
    names = sorted(name for name in environ if FORCES.fullmatch(name) and name not in keep)
    for name in names:
        del environ[name]
    if names:
        log.warning(f"benchmarks run without {', '.join(names)}, which would change what they say")


def check_installed(environment, commit):
    """Stop unless the package of an existing environment is a commit's, file by file."""
    environ = {**os.environ, "PYTHONPATH": os.environ.get("ASV_PYTHONPATH", "")}  # as asv does
    where = {"env": environ, "cwd": tempfile.gettempdir()}
    try:
        origin = environment.run(["-c", WHERE], display_error=False, **where)
    except ProcessError:
        raise UserError(f"there is no pagedkv in {environment.name}") from None
    folder = Path(origin.strip()).parent
    with tempfile.TemporaryDirectory() as scratch:
        there = {"GIT_INDEX_FILE": f"{scratch}/index", "GIT_WORK_TREE": str(folder.parent)}
        git("read-tree", commit, env=there)
        # Not `git status`, which tells what differs between the index and HEAD, too.
        files = ["ls-files", "-z", "--modified", "--deleted", "--others"]
        package = ("--", "pagedkv", ":(exclude,glob)**/__pycache__/**")
        differ = git(*files, *package, env=there).split("\0")[0]
    if differ:
        raise UserError(
            f"the pagedkv in {environment.name}, {folder}, is not that of {commit}: "
            f"{shown(differ)} differs"
        )


def write_json(results, path, data, api_version=None, compact=False):
    """Write what asv's function of this name does: whole or not at all, and valid in `results`."""
    if api_version is not None:
        data = {**data, "version": api_version}
    layout = {} if compact else {"indent": 4, "sort_keys": True}
    try:
        if Path(results).resolve() in Path(path).resolve().parents:
            valid.write_json(path, data, **layout)
        else:
            write_text(path, json.dumps(data, **layout))
    except OSError as error:
        raise UserError(f"{path} cannot be written and is as it was: {error}") from None
