"""Run the suite over the project's history: `make bench`."""

import argparse
import itertools
import math
import platform
import re
import subprocess
import sys
from pathlib import Path

from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.environment import get_environments
from asv.machine import Machine, MachineCollection
from asv.results import iter_results_for_machine_and_hash
from asv.util import UserError, load_json, write_json

from benchmarks._workload import PARAM_NAMES, QUICK_BLOCK_SIZES, QUICK_CONTEXTS
from tracking.lock import acquire

ROOT = Path(__file__).parents[1]

# The quick grid measures old commits by these alone; every path of today is measured at HEAD,
HISTORY = (
    "overhead.Auto.",
    "append.Auto.",
    "prefill.Write.",
    "prefix_cache.Match.",
    "scheduler.Decode.",
)
# and it leaves out what settled a decision (docs/adr) and says nothing about the package.
SETTLED = (
    "append.PipelinedCopy.",
    "decode.BlockOrder.",
    "decode.Slabs.",
    "memory.GrowByConcatenation.",
)


def git(*args):
    """Return what a git command prints."""
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def asv(*args, config="asv.conf.json"):
    """Run an asv command in the project's root and return its exit status.

    Raises
    ------
    UserError
        If a signal ended it: nothing is known of what it had to do.
    """
    command = [sys.executable, "-m", "asv", args[0], "--config", config, *args[1:]]
    status = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode
    if status < 0:
        raise UserError(f"asv {args[0]} was ended by signal {-status}")
    return status


def phase_commits():
    """Return {commit hash: phase} of the commits with a `Phase:` trailer, oldest first."""
    trailer = "%(trailers:key=Phase,valueonly,separator=%x20)"
    log = git("log", "--reverse", f"--format=%H {trailer}").splitlines()
    return dict(line.split() for line in log if " " in line.strip())


def check_history():
    """Stop with what to do when asv would measure or publish something else than it seems."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        raise UserError("this clone is shallow, its history is cut off: `git fetch --unshallow`")
    if not git("branch", "--list", "main"):
        raise UserError("there is no branch main here: run `git branch main origin/main`")
    if git("status", "--porcelain", "--", "pagedkv", "pyproject.toml"):
        print("note: uncommitted changes in pagedkv/ are not measured, asv builds commits")


def asv_settings():
    """Return what asv.conf.json says."""
    return load_json(str(ROOT / "asv.conf.json"), js_comments=True)


def derive_config(name, **overrides):
    """Write asv.NAME.conf.json: asv.conf.json with some settings replaced. Return its name.

    asv runs in the directory of its config, so that is where it has to be.
    """
    derived = ROOT / f"asv.{name}.conf.json"
    write_json(str(derived), {**asv_settings(), **overrides})
    return derived.name


def backend_settings(backend):
    """Return what a config for this MLX backend replaces: environments of its own, its MLX."""
    if backend == "cpu":
        return {}
    commands = asv_settings()["install_command"]
    installs = [command.replace("mlx[cpu]", f"mlx[{backend}]") for command in commands]
    return {"env_dir": f".asv/env-{backend}", "install_command": installs}


def config_for(backend):
    """Return the name of the config that measures this MLX backend."""
    settings = backend_settings(backend)
    return derive_config(backend, **settings) if settings else "asv.conf.json"


def environment_name(config):
    """Return asv's name of the environment (Python, MLX) that a config measures in."""
    [environment] = get_environments(Config.load(str(ROOT / config)), None)
    return environment.name


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
    if path.exists() and name in load_json(str(path), Machine.api_version):
        return
    macos = platform.mac_ver()[0]
    kernel = ".".join(platform.release().split(".")[:2])
    record = Machine.get_defaults()
    record["os"] = f"macOS {macos}" if macos else f"{platform.system()} {kernel}"
    record["cpu"] = record["cpu"] or platform.processor() or platform.machine()
    record["ram"] = f"{math.ceil(int(record['ram']) / 2**30)} GB"
    path = ROOT / "results" / name / "machine.json"
    if path.exists():
        recorded = load_json(str(path), Machine.api_version)
        if recorded["cpu"] != record["cpu"]:
            raise UserError(
                f"results/{name} was measured on {recorded['cpu']}, this is {record['cpu']}: "
                "give it a name of its own, MACHINE=name"
            )
        record = recorded
    MachineCollection.save(name, {**record, "machine": name})


def discover(machine, config):
    """Have asv list the suite as it is now, and return the list: {name: description}."""
    if asv("run", "--machine", machine, "--bench", "just-discover", "HEAD^!", config=config):
        raise UserError("asv could not list the benchmarks, see above")
    return Benchmarks.load(Config.load(str(ROOT / config)))


def in_quick_grid(cell, names):
    """Whether a cell, as asv names it, is measured in the quick grid; all are off the big grid."""
    if names != PARAM_NAMES:
        return True
    _, context, block_size = cell
    return int(context) in QUICK_CONTEXTS and int(block_size) in QUICK_BLOCK_SIZES


def cells(benchmark):
    """Return the parameter combinations of a benchmark as asv orders and names them."""
    return list(itertools.product(*benchmark["params"]))


def selection(benchmark, grid):
    """Return asv's options that run the cells of one benchmark that belong to a grid."""
    name = re.escape(benchmark["name"])
    if grid == "full" or not benchmark["params"]:
        return ["--bench", rf"^{name}(\(|$)"]
    wanted = [cell for cell in cells(benchmark) if in_quick_grid(cell, benchmark["param_names"])]
    labels = "|".join(re.escape(", ".join(cell)) for cell in wanted)
    return ["--bench", rf"^{name}\(({labels})\)$"]


def is_measured(values, benchmark, grid):
    """Whether a benchmark's values at a commit need no run: none failed, and the grid's are there.

    asv stores NaN both for n/a and for what was not asked for. A quick run is complete with a
    number in each of its cells, a full one with a number beyond them (cells that are too slow or
    too large stay NaN); and either if there is no number at all, which is what n/a looks like.
    """
    known = [value is not None and not math.isnan(value) for value in values]
    quick = [in_quick_grid(cell, benchmark["param_names"]) for cell in cells(benchmark)]
    if None in values:
        return False
    if grid == "quick":
        complete = all(k for k, q in zip(known, quick, strict=True) if q)
    else:
        complete = all(quick) or any(k for k, q in zip(known, quick, strict=True) if not q)
    return complete or not any(known)


def unmeasured(benchmarks, machine, commit, grid, environment):
    """Return the names of the benchmarks that are to be run at a commit in an environment."""
    done = set()
    for result in iter_results_for_machine_and_hash(str(ROOT / "results"), machine, commit):
        if result.env_name != environment:
            continue
        for name in result.get_result_keys(benchmarks):
            values = result.get_result_value(name, benchmarks[name]["params"])
            if is_measured(values, benchmarks[name], grid):
                done.add(name)
    return [name for name in sorted(benchmarks) if name not in done]


def in_quick_run(names, is_head):
    """Return the benchmarks of a commit that the quick grid asks for."""
    if is_head:
        return [name for name in names if not name.startswith(SETTLED)]
    return [name for name in names if name.startswith(HISTORY)]


def in_one_run(names, grid):
    """Group benchmarks by asv run, which takes seconds to start and saves when it is through."""
    if grid == "full":
        return [[name] for name in names]
    return [list(group) for _, group in itertools.groupby(names, lambda name: name.split(".")[0])]


def run(grid, machine, backend, rounds):
    """Measure every phase commit and HEAD; what is there already is not measured again."""
    check_history()
    record_machine(machine)
    config = config_for(backend)
    benchmarks, environment = discover(machine, config), environment_name(config)
    head = git("rev-parse", "HEAD")
    failed = []
    for commit in [*(commit for commit in phase_commits() if commit != head), head]:
        title = git("log", "-1", "--format=%h %s", commit)
        names = unmeasured(benchmarks, machine, commit, grid, environment)
        if grid == "quick":
            names = in_quick_run(names, commit == head)
        print(f"\n== {title}: {len(names)} benchmarks to run, {grid} grid", flush=True)
        for group in in_one_run(names, grid):
            options = ["--machine", machine, "--show-stderr", "--attribute", f"rounds={rounds}"]
            for name in group:
                print(f"\n== {name} at {title}", flush=True)
                options += selection(benchmarks[name], grid)
            status = asv("run", *options, f"{commit}^!", config=config)
            if status not in (0, 2):
                return status
            if status == 2:
                failed.append(f"one of {', '.join(group)} at {title}")
    if failed:
        print("\nfailed, and tried again next time:", *failed, sep="\n  ")
    return 2 if failed else 0


def prepare(machine, backend):
    """Do what publishing needs: tags of the phases, which asv marks, and the list of benchmarks."""
    check_history()
    for commit, phase in phase_commits().items():
        git("tag", "--force", f"phase-{phase}", commit)
    record_machine(machine)
    discover(machine, config_for(backend))
    return 0


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.history", description=__doc__)
    parser.add_argument("command", choices=["run", "prepare"])
    parser.add_argument("--grid", choices=["quick", "full"], default="quick")
    parser.add_argument("--backend", choices=["cpu", "cuda12", "cuda13"], default="cpu")
    parser.add_argument("--machine", help="name in results/ (default: this host's name)")
    parser.add_argument("--rounds", type=int, help="processes a cell (default: quick 1, full 2)")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.grid == "quick" else 2)
    try:
        machine = args.machine or machine_name(args.backend)
        if args.command == "prepare":
            return prepare(machine, args.backend)
        acquire()
        return run(args.grid, machine, args.backend, rounds)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
