"""Run the suite over the project's history: `make bench`."""

import argparse
import sys

from asv.util import UserError

from benchmarks.kinds import WHY
from tracking import valid
from tracking.grid import asked, belongs, cells, in_one_run, in_run, selection
from tracking.lock import acquire
from tracking.project import (
    asv,
    config_for,
    discover,
    environment_name,
    machine_name,
    machine_options,
    record_machine,
)
from tracking.repository import check_history, check_suite, git, phase_commits
from tracking.results import MISSING, RESULTS, measured, rename


def is_measured(values, benchmark, grid, explained=True):
    """Whether a benchmark's Values at a commit need no run: none failed, and the grid's are there.

    A cell is there with a number, or with the reason why it has none. Older results are not
    `explained`: a full run is complete with a number beyond the quick grid, and any run if there is
    no number at all, which is what n/a looks like.
    """
    there = [value.known or value.why in WHY.values() for value in values]
    part = "quick" if grid == "full" else grid
    quick = [belongs(cell, benchmark, part) for cell in cells(benchmark)]
    if any(value.value is None for value in values):
        return False
    if grid != "full":
        complete = all(t for t, q in zip(there, quick, strict=True) if q)
    elif explained:
        complete = all(there)
    else:
        complete = all(quick) or any(t for t, q in zip(there, quick, strict=True) if not q)
    return complete or not (explained or any(there))


def unmeasured(benchmarks, machine, commit, grid, environment, results=RESULTS):
    """Return the names of the benchmarks that are to be run at a commit in an environment."""
    done = set()
    for one in measured(machine, results):
        if (one.commit, one.environment) != (commit, environment):
            continue
        for name, benchmark in benchmarks.items():
            if one.versions.get(name) == benchmark["version"]:
                found = one.table[name]
                values = [found.get(cell, MISSING) for cell in cells(benchmark)]
                if is_measured(values, benchmark, grid, one.explained):
                    done.add(name)
    return [n for n in sorted(benchmarks) if n not in done and asked(benchmarks[n], grid)]


def run(grid, machine, backend, rounds, only_head=False):
    """Measure every phase commit and HEAD; what is there already is not measured again."""
    check_history()
    check_suite()
    record_machine(machine)
    config = config_for(backend)
    benchmarks, environment = discover(machine, config), environment_name(config)
    head = git("rev-parse", "HEAD")
    failed = []
    phases = [] if only_head else [commit for commit in phase_commits() if commit != head]
    for commit in [*phases, head]:
        title = git("log", "-1", "--format=%h %s", commit)
        part = "history" if grid == "quick" and commit != head else grid
        names = in_run(unmeasured(benchmarks, machine, commit, part, environment), part)
        print(f"\n== {title}: {len(names)} benchmarks to run, {grid} grid", flush=True)
        for group in in_one_run(names, part):
            options = ["--machine", machine, "--show-stderr", "--attribute", f"rounds={rounds}"]
            for name in group:
                print(f"\n== {name} at {title}", flush=True)
                options += selection(benchmarks[name], part)
            status = asv("run", *options, f"{commit}^!", config=config)
            if status not in (0, 2):
                return status
            if status == 2:
                failed.append(f"one of {', '.join(group)} at {title}")
    if failed:
        print("\nfailed, and tried again next time:", *failed, sep="\n  ")
    return 2 if failed else 0


def prepare(machine, backend):
    """Do what publishing needs: tags of phases, benchmarks' names of today and their list."""
    check_history()
    valid.set_aside(RESULTS)
    for commit, phase in phase_commits().items():
        git("tag", "--force", f"phase-{phase}", commit)
    for file in valid.files(RESULTS):
        rename(file)
    record_machine(machine)
    discover(machine, config_for(backend))
    return 0


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.history", description=__doc__)
    parser.add_argument("command", choices=["run", "prepare"])
    parser.add_argument("--grid", choices=["quick", "full"], default="quick")
    machine_options(parser)
    parser.add_argument("--rounds", type=int, help="processes a cell (default: quick 1, full 2)")
    parser.add_argument("--head", action="store_true", help="measure HEAD and no phase's commit")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.grid == "quick" else 2)
    try:
        machine = args.machine or machine_name(args.backend)
        if args.command == "prepare":
            return prepare(machine, args.backend)
        acquire()
        return run(args.grid, machine, args.backend, rounds, args.head)
    except (UserError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
