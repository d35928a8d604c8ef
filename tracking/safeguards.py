"""asv plugin: what asv itself does not look after, whichever of its commands is run.

One run measures at a time, the environment changes nothing that is measured, what is recorded is
measured by committed benchmarks, and files of results are valid when asv reads them and are
written whole. Where something is wrong a sentence says what to do.
"""

import functools
import hashlib
import html
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import asv.util
from asv.benchmarks import Benchmarks
from asv.commands import make_argparser
from asv.config import Config
from asv.console import log
from asv.environment import ExistingEnvironment, get_environments
from asv.machine import MachineCollection
from asv.publishing import OutputPublisher
from asv.util import ProcessError, UserError, load_json

from tracking.files import shown, write_text
from tracking.lock import acquire
from tracking.repository import ROOT, check_history, check_suite, git, uncommitted_suite
from tracking.unattended import unattended

try:
    from tracking import valid
except ModuleNotFoundError:  # a machine without network may have asv alone
    valid = None

MEASURING = ("Run", "Continuous", "Find", "Profile", "Check", "Setup")  # they install commits
OF_HISTORY = ("Run", "Continuous", "Find", "Publish")
WITHOUT_RESULTS = ("Machine", "Preview", "Quickstart", "Update")

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
    sys.excepthook = report
    environ = unattended(os.environ)  # for the git that asv calls
    os.environ.clear()
    os.environ |= environ
    asv.util.write_json = functools.partial(write_json, config.results_dir)
    existing, commit = _existing(args, config), getattr(args, "set_commit_hash", None)
    if command in MEASURING:
        acquire()
        forget(os.environ, keep=("ASV_PYTHONPATH",) if existing else ())
    of_no_commit = existing and commit is None
    if command in OF_HISTORY and not of_no_commit:
        check_history()
    if not of_no_commit and _records(command, args, config):
        check_suite()
        for environment in existing:
            check_installed(environment, commit)
    elif command in MEASURING and (changed := uncommitted_suite()):
        log.warning(f"{changed} is not committed, and measures all the same")
    if command == "Preview" and not Path(config.html_dir).is_dir():
        raise UserError("nothing is published here yet: run `make publish`")
    if command in WITHOUT_RESULTS:
        return
    if valid:
        if getattr(args, "machine", None):
            valid.check_machine_name(args.machine)
        check_files(config.results_dir)
    else:
        log.warning("files of results are not checked: jsonschema is not installed")
    if command == "Publish" and not list_of_benchmarks(config.results_dir):
        raise UserError(
            f"{config.results_dir}/benchmarks.json does not list the suite yet: `make publish` "
            "makes the list and publishes, `asv run --bench just-discover` makes it alone"
        )


def _existing(args, config):
    """Return the environments of a command that asv installs nothing in."""
    environments = get_environments(config, args.env_spec) if getattr(args, "env_spec", 0) else []
    return [one for one in environments if isinstance(one, ExistingEnvironment)]


def _records(command, args, config):
    """Whether a command adds to the project's results."""
    if Path(config.results_dir).resolve() != ROOT / "results":
        return False
    if command == "Run":
        return not (args.dry_run or args.bench == ["just-discover"])
    return command == "Continuous" or (command == "Find" and not args.skip_save)


def list_of_benchmarks(results):
    """Return the names in asv's list of the suite; it publishes no other."""
    file = Path(results, "benchmarks.json")
    return load_json(str(file), Benchmarks.api_version).keys() if file.exists() else ()


def report(kind, error, trace):
    """Say in one sentence that a disk is full, or the like; asv would show where in its code."""
    if issubclass(kind, OSError):
        print(f"asv stopped: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def forget(environ, keep=()):
    """Remove what decides how things run from what benchmarks are started with, and say so."""
    names = sorted(name for name in environ if FORCES.fullmatch(name) and name not in keep)
    for name in names:
        del environ[name]
    if names:
        log.warning(f"benchmarks run without {', '.join(names)}, which would change what they say")


def check_installed(environment, commit):
    """Stop unless the package of an existing environment is a commit's, file by file.

    Raises
    ------
    UserError
        If it is another, or none.
    """
    environ = {**os.environ, "PYTHONPATH": os.environ.get("ASV_PYTHONPATH", "")}  # as asv does
    where = {"env": environ, "cwd": tempfile.gettempdir()}
    try:
        origin = environment.run(["-c", WHERE], display_error=False, **where)
    except ProcessError:
        raise UserError(f"there is no pagedkv in {environment.name}") from None
    folder = Path(origin.strip()).parent
    expected = {}
    for entry in git("ls-tree", "-r", "-z", commit, "--", "pagedkv").split("\0")[:-1]:
        about, path = entry.split("\t")
        expected[path.removeprefix("pagedkv/")] = about.split()[2]
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    found = {str(path.relative_to(folder)): _blob(path.read_bytes()) for path in files}
    if differ := sorted(name for name, _ in found.items() ^ expected.items()):
        raise UserError(
            f"the pagedkv in {environment.name}, {folder}, is not that of {commit}: "
            f"{shown(differ[0])} differs"
        )


def _blob(content):
    """Return what git calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_files(results):
    """Set aside what is broken in a folder of results, stop if asv's record of machines is."""
    machines = Path(MachineCollection.get_machine_file_path())
    if machines.exists():
        valid.load(machines)
    valid.set_aside(results)


def write_json(results, path, data, api_version=None, compact=False):
    """Write what asv's function of this name does, whole or not at all.

    Raises
    ------
    UserError
        If it cannot be written, or is in a folder of results and broken.
    """
    if api_version is not None:
        data = {**data, "version": api_version}
    layout = {} if compact else {"indent": 4, "sort_keys": True}
    try:
        if valid and Path(results).resolve() in Path(path).resolve().parents:
            valid.write_json(path, data, **layout)
        else:
            write_text(path, json.dumps(data, **layout))
    except OSError as error:
        raise UserError(f"{path} cannot be written and is as it was: {error}") from None


class CodeAsText(OutputPublisher):
    """Escapes the code of benchmarks, which asv's pages show as HTML."""

    name = "code-as-text"
    button_label = "Code as text"
    description = "Code of benchmarks is no HTML"

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Escape it in what asv writes into index.json after all pages."""
        for benchmark in benchmarks.values():
            benchmark["code"] = html.escape(benchmark.get("code", ""))
