"""Run the suite over the project's history: `make bench`."""

import argparse
import sys
import time
from itertools import groupby

from asv.util import UserError

from benchmarks.kinds import WHY
from tracking.grid import GRIDS, asked, device_of, selection
from tracking.project import asv, begin, config_for, discover, environment_name, machine_options
from tracking.repository import commit_labels, git, phase_commits
from tracking.results import MISSING, NAMES, RESULTS, load, measured

QUICK_REPEAT = (3, 12, 2.0)  # fewest and most samples, and seconds after which none begins


def is_measured(values):
    """Whether cells with these Values need no run: each has a number, or the reason for none."""
    return all(value.known or value.why in WHY.values() for value in values)


def unmeasured(benchmarks, machine, commit, grid, device, environment, results=RESULTS):
    """Return the names of the benchmarks that are to be run at a commit in an environment."""
    done = set()
    for one in measured(machine, results):
        if (one.commit, one.environment) != (commit, environment):
            continue
        for name, benchmark in benchmarks.items():
            if one.versions.get(name) == benchmark["version"]:
                found = one.table[name]
                if is_measured([found.get(c, MISSING) for c in asked(benchmark, grid, device)]):
                    done.add(name)
    return [n for n in sorted(benchmarks) if n not in done and asked(benchmarks[n], grid, device)]


def in_one_run(names, grid):
    """Group benchmarks by asv run, which takes seconds to start and saves when it is through."""
    parts = {"quick": 0, "short": 1, "full": 3}[grid]  # of module.Class.function
    return [list(group) for _, group in groupby(names, lambda name: name.split(".")[:parts])]


def run(grid, machine, backend, rounds, only_head=False):
    """Measure HEAD, then the phases, the newest first; what is there is not measured again.

    Of a phase the short grid asks for what the quick one does.
    """
    config, device = config_for(backend), device_of(backend)
    benchmarks, environment = discover(machine, config), environment_name(config)
    head = git("rev-parse", "HEAD")
    phases = [] if only_head else [commit for commit in reversed(phase_commits()) if commit != head]
    grids = {head: grid} | dict.fromkeys(phases, "full" if grid == "full" else "quick")
    missing = {
        commit: unmeasured(benchmarks, machine, commit, part, device, environment)
        for commit, part in grids.items()
    }
    todo = [commit for commit, names in missing.items() if names]
    labels, failed, began = commit_labels(grids), [], time.monotonic()
    for done, commit in enumerate(todo):
        part, names, left = grids[commit], missing[commit], ""
        if done:
            seconds = (time.monotonic() - began) / done * (len(todo) - done)
            left = f", about {seconds / 60:.0f} min left"
        print(f"\n== {done + 1} of {len(todo)} commits: {labels[commit]}{left}", flush=True)
        for group in in_one_run(names, part):
            options = ["--machine", machine, "--show-stderr", "--attribute", f"rounds={rounds}"]
            if part == "quick":
                options += ["--attribute", f"repeat={QUICK_REPEAT}"]
            for name in group:
                options += selection(benchmarks[name], part, device)
            status = asv("run", *options, f"{commit}^!", config=config)
            if status not in (0, 2):
                return status
            if status == 2:
                failed.append(f"one of {', '.join(group)} at {labels[commit]}")
        print(f"== {labels[commit]}: {headlines(machine, commit, environment)}", flush=True)
    if failed:
        print("\nfailed, and tried again next time:", *failed, sep="\n  ")
    return 2 if failed else 0


def headlines(machine, commit, environment, results=RESULTS):
    """Return in words what a machine measured of the headlines at a commit."""
    table, said = load(machine, commit, results, environment), []
    for benchmark, name in NAMES.items():
        known = [value.value for value in table.get(benchmark, {}).values() if value.known]
        if known:
            ends = dict.fromkeys(f"{end:.2f}" for end in (min(known), max(known)))
            said.append(f"{name} {' to '.join(ends)}")
    return "; ".join(said) or "no headline has a number"


def prepare(machine, backend):
    """Do what publishing needs: tags of phases and the list of benchmarks."""
    for commit, phase in phase_commits().items():
        git("tag", "--force", f"phase-{phase}", commit)
    discover(machine, config_for(backend))
    return 0


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.history", description=__doc__)
    parser.add_argument("command", choices=["run", "prepare"])
    parser.add_argument("--grid", choices=GRIDS, default="quick")
    machine_options(parser)
    parser.add_argument("--rounds", type=int, help="processes a cell (default: full 2, else 1)")
    parser.add_argument("--head", action="store_true", help="measure HEAD and no phase's commit")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.grid == "full" else 1)
    try:
        where = begin(args, records=args.command == "run")
        if args.command == "prepare":
            return prepare(**where)
        return run(args.grid, rounds=rounds, only_head=args.head, **where)
    except (UserError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
