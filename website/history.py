"""Run the suite over the project's history: `make bench`, and over HEAD twice: `make noise`."""

import argparse
import csv
import itertools
import math
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.machine import Machine, MachineCollection
from asv.results import iter_results_for_machine_and_hash
from asv.util import UserError, load_json, write_json

from benchmarks._workload import QUICK_BLOCK_SIZES, QUICK_CONTEXTS

ROOT = Path(__file__).parents[1]
PHASE_TRAILER = "%H %(trailers:key=Phase,valueonly,separator=%x20)"

# The quick grid measures old commits by these alone; every path of today is measured at HEAD.
HISTORY = ["overhead.Auto", "append"]


def git(*args):
    """Return what a git command prints."""
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def phase_commits():
    """Return {commit hash: phase} of the commits with a `Phase:` trailer, oldest first."""
    lines = [
        line.split() for line in git("log", "--reverse", f"--format={PHASE_TRAILER}").splitlines()
    ]
    return {line[0]: line[1] for line in lines if len(line) > 1}


def check_history():
    """Stop with what to do when asv would measure or publish something else than it seems."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        sys.exit("this clone is shallow, its history is cut off: run `git fetch --unshallow`")
    if not git("branch", "--list", "main"):
        sys.exit("there is no branch main here: run `git branch main origin/main`")
    if git("status", "--porcelain", "--", "pagedkv", "pyproject.toml"):
        print("note: uncommitted changes in pagedkv/ are not measured, asv builds commits")


def derive_config(name, **overrides):
    """Write asv.NAME.conf.json: asv.conf.json with some settings replaced. Return its name.

    asv runs in the directory of its config, so that is where it has to be.
    """
    conf = load_json(str(ROOT / "asv.conf.json"), js_comments=True)
    derived = ROOT / f"asv.{name}.conf.json"
    write_json(str(derived), {**conf, **overrides})
    return derived.name


def backend_settings(backend):
    """Return what a config for this MLX backend replaces: environments of its own, its MLX."""
    if backend == "cpu":
        return {}
    commands = load_json(str(ROOT / "asv.conf.json"), js_comments=True)["install_command"]
    installs = [command.replace("mlx[cpu]", f"mlx[{backend}]") for command in commands]
    return {"env_dir": f".asv/env-{backend}", "install_command": installs}


def machine_name(backend):
    """Return the name asv has for this host, marked with the backend unless it is the default."""
    try:
        name = MachineCollection.load(platform.node())["machine"]
    except UserError:  # asv knows no machine, or several and none by the host's name
        name = platform.node() or "unnamed"
    return name if backend == "cpu" else f"{name}-{backend}"


def record_machine(name):
    """Write the machine's record for asv unless there is one: a changed record splits series."""
    path = Path(MachineCollection.get_machine_file_path())
    if path.exists() and name in load_json(str(path)):
        return
    recorded = ROOT / "results" / name / "machine.json"
    if recorded.exists():
        record = load_json(str(recorded))
    else:
        macos = platform.mac_ver()[0]
        kernel = ".".join(platform.release().split(".")[:2])
        record = Machine.get_defaults()
        record["os"] = f"macOS {macos}" if macos else f"{platform.system()} {kernel}"
        record["ram"] = f"{math.ceil(int(record['ram']) / 2**30)} GB"
    MachineCollection.save(name, {**record, "machine": name})


def asv(*args, config="asv.conf.json", quiet=False):
    """Run an asv command in the project's root and return its exit status."""
    command = [sys.executable, "-m", "asv", args[0], "--config", config, *args[1:]]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, cwd=ROOT, stdout=output, stdin=subprocess.DEVNULL).returncode


def quick_cells(prefix):
    """Return a regex for the benchmarks under `prefix`: of the grid, the quick grid's cells only.

    asv matches it against `module.Class.function(parameters)`.
    """
    contexts, sizes = ("|".join(map(str, values)) for values in (QUICK_CONTEXTS, QUICK_BLOCK_SIZES))
    other = r"(?!.*\(\d+, \d+, \d+\))"
    return rf"^{re.escape(prefix)}\.(?:{other}|.*\(\d+, (?:{contexts}), (?:{sizes})\))"


def suite():
    """Return the names of the suite's modules."""
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


def run(grid, machine, backend, rounds):
    """Measure every phase commit and HEAD; what is there already is not measured again."""
    check_history()
    record_machine(machine)
    settings = backend_settings(backend)
    config = derive_config(backend, **settings) if settings else "asv.conf.json"
    head = git("rev-parse", "HEAD")
    if grid == "full":
        asv("run", "--machine", machine, "-b", "just-discover", "HEAD^!", config=config)

    failed = False
    for commit in [*(commit for commit in phase_commits() if commit != head), head]:
        if grid == "full":
            prefixes = unmeasured(machine, commit)
            selections = [["-b", rf"^{re.escape(prefix)}(\(|$)"] for prefix in prefixes]
        else:
            prefixes = suite() if commit == head else HISTORY
            skip = "--skip-existing-successful"
            selections = [[skip, "-b", quick_cells(prefix)] for prefix in prefixes]
        # One asv run a module or class: asv saves when it is through, so that much can be lost.
        for prefix, selection in zip(prefixes, selections, strict=True):
            print(
                f"\n== {grid} grid, {git('log', '-1', '--format=%h %s', commit)}: {prefix}",
                flush=True,
            )
            options = ["--machine", machine, "--show-stderr", "-a", f"rounds={rounds}", *selection]
            status = asv("run", *options, f"{commit}^!", config=config)
            if status not in (0, 2):
                return status
            failed = failed or status == 2
    if failed:
        print("\nsome benchmarks failed, see above; they are tried again next time")
    return 2 if failed else 0


def unmeasured(machine, commit):
    """Return the benchmarks without a value beyond the quick grid at this commit."""
    conf = Config.load(str(ROOT / "asv.conf.json"))
    benchmarks = Benchmarks.load(conf)
    measured = set()
    for result in iter_results_for_machine_and_hash(conf.results_dir, machine, commit):
        for name in result.get_result_keys(benchmarks):
            params = benchmarks[name]["params"]
            values = result.get_result_value(name, params)
            labels = [f"{name}({', '.join(cell)})" for cell in itertools.product(*params)]
            quick = re.compile(quick_cells(name.rsplit(".", 1)[0]))
            beyond = [v for v, label in zip(values, labels, strict=True) if not quick.search(label)]
            if any(value is not None and not math.isnan(value) for value in beyond or values):
                measured.add(name)
    return [name for name in sorted(benchmarks) if name not in measured]


def noise(machine, backend):
    """Compare HEAD with an identical commit and record how many cells asv calls changed."""
    check_history()
    record_machine(machine)
    shutil.rmtree(ROOT / ".asv/noise", ignore_errors=True)
    settings = {**backend_settings(backend), "results_dir": ".asv/noise"}
    config = derive_config("noise", **settings)
    head = git("rev-parse", "HEAD")
    twin = git("commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", "HEAD again, to measure noise")
    cells = [
        argument for module in ("overhead", "decode") for argument in ("-b", quick_cells(module))
    ]
    status = asv("continuous", "--machine", machine, *cells, head, twin, config=config)
    if status not in (0, 1):
        return status

    rows = []
    for factor in ("1.05", "1.10"):
        options = ["--config", config, "--machine", machine, "--factor", factor]
        compare = [sys.executable, "-m", "asv", "compare", *options, head, twin]
        table = subprocess.run(compare, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for kind in ("ratio", "time"):
            marks = re.findall(rf"^\| (.) .*\.{kind}_\w+\(.*\)", table, re.MULTILINE)
            compared = [mark for mark in marks if mark in " +-"]
            flagged = [mark for mark in compared if mark != " "]
            rows.append([head[:8], kind, factor, len(compared), len(flagged)])
    output = ROOT / "results" / machine / "noise.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["commit", "kind", "factor", "cells", "flagged"], *rows])
    print(output.read_text())
    return 0


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m website.history", description=__doc__)
    parser.add_argument("command", choices=["run", "noise"])
    parser.add_argument("--grid", choices=["quick", "full"], default="quick")
    parser.add_argument("--backend", choices=["cpu", "cuda12", "cuda13"], default="cpu")
    parser.add_argument("--machine", help="name in results/ (default: this host's name)")
    parser.add_argument("--rounds", type=int, help="processes a cell (default: quick 1, full 2)")
    args = parser.parse_args()
    machine = args.machine or machine_name(args.backend)
    if args.command == "run":
        rounds = args.rounds or (1 if args.grid == "quick" else 2)
        return run(args.grid, machine, args.backend, rounds)
    return noise(machine, args.backend)


if __name__ == "__main__":
    sys.exit(main())
