"""What the benchmark machine does for main: measure what is new, keep results on a branch."""

import argparse
import re
import subprocess
import sys
import tempfile

from asv.util import UserError

from tracking import history, requirements, triage
from tracking.changes import changes
from tracking.compare import COMPARED
from tracking.grid import GRIDS, device_of, selection
from tracking.noise import record, recorded_noise, rows_of_results
from tracking.project import (
    asv,
    asv_settings,
    backend_settings,
    begin,
    config_for,
    derive_config,
    discover,
    environment_name,
    machine_options,
)
from tracking.repository import git
from tracking.results import RESULTS, measured_commits
from tracking.results_branch import fetch_results, push_results

AGAIN = 4  # rounds of what looks like a regression


def new_commits(measured):
    """Return the commits since the last measured one, oldest first; none if none is measured."""
    if not measured:
        return []
    since = git("rev-list", "--reverse", f"{measured[-1]}..HEAD").split()
    return [commit for commit in since if commit not in measured]


def nightly(machine, backend, grid):
    """Measure what is new on main and the phases, then once more what looks like a regression."""
    environment = environment_name(config_for(backend))
    head, before = git("rev-parse", "HEAD"), measured_commits(machine, environment=environment)
    status = 0
    if new := new_commits(before):
        status = run_commits(new, machine, backend, grid)
    if status in (0, 2):
        status = max(status, history.run(grid, machine, backend, rounds=2))
    if any(commit != head for commit in before) and status in (0, 2):
        status = max(status, again(machine, backend, environment, head, grid))
    return status


def run_commits(commits, machine, backend, grid):
    """Run a grid at commits, the oldest first: what a night cut short leaves is later."""
    config = config_for(backend)
    options = ["--machine", machine, "--show-stderr"]
    for benchmark in discover(machine, config).values():
        options += selection(benchmark, grid, device_of(backend))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(commits))
        file.flush()
        return asv("run", *options, f"HASHFILE:{file.name}", config=config)


def again(machine, backend, environment, head, grid):
    """Measure once more, at both commits, what looks worse at HEAD; print what stays so.

    What the two had before are runs of their code, for the noise.
    """
    measured = measured_commits(machine, environment=environment)
    previous = [commit for commit in measured if commit != head][-1]
    noise = recorded_noise(machine)
    config = config_for(backend)
    listed = discover(machine, config)
    asked = {name: selection(one, grid, device_of(backend)) for name, one in listed.items()}

    def worse():
        found = {}
        for change in changes(RESULTS, machine, previous, head, environment, listed):
            patterns = asked.get(change.name.split("(")[0], [])[1:]
            if any(re.search(pattern, change.name) for pattern in patterns):
                verdict = change.verdict(noise)
                if verdict in ("worsened", "failed"):
                    found[change] = verdict
        return found

    suspects = worse()
    if not suspects:
        print("no regressions")
        return 0
    names = sorted({change.name.split("(")[0] for change in suspects})
    options = ["--machine", machine, "--attribute", f"rounds={AGAIN}", "--show-stderr"]
    for name in names:
        options += asked[name]
    runs = rows_of_results(machine, (previous, head), environment, names)
    status = max(asv("run", *options, f"{commit}^!", config=config) for commit in (previous, head))
    record(machine, runs)
    entries, commits = triage.read(), triage.between(previous, head)
    for change, verdict in worse().items():
        known = change.before.known and change.after.known
        entry = known and triage.acceptance(entries, change.name, machine, commits)
        said = f"accepted ({entry.reason}, {entry.link})" if entry else verdict
        print(f"{said}: {change.name} {change.ratio.show(interval=True) if known else ''}")
    return status


def newest_mlx():
    """Return the newest released version of MLX."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "mlx"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip does not know MLX's versions: {done.stderr.strip()}")
    return re.match(r"mlx \((\S+)\)", done.stdout)[1]


def with_newest_mlx(machine, backend):
    """Measure HEAD with the newest MLX, as an axis of its own beside the pinned version."""
    version, matrix = newest_mlx(), asv_settings()["matrix"]
    if version in matrix["req"]["mlx"]:
        print(f"MLX {version} is the newest and the one that is measured anyway")
        return 0
    requirements.unlock()  # no lock can know it
    newest = {**matrix, "req": {**matrix["req"], "mlx": [version]}}
    config = derive_config("newest", **backend_settings(backend), matrix=newest)
    options = ["--machine", machine, "--show-stderr"]
    for name, benchmark in discover(machine, config).items():
        if name.startswith(COMPARED):
            options += selection(benchmark, "short")
    return asv("run", *options, "HEAD^!", config=config)


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.nightly", description=__doc__)
    commands = ["run", "newest-mlx", "fetch-results", "push-results"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("--grid", choices=GRIDS, default="short")
    parser.add_argument("--remote", default="origin", help="where the branch results is")
    machine_options(parser)
    args = parser.parse_args()
    try:
        if args.command == "fetch-results":
            fetch_results(args.remote)
            return 0
        if args.command == "push-results":
            return push_results(args.remote)
        machine = begin(args)["machine"]
        if args.command == "newest-mlx":
            return with_newest_mlx(machine, args.backend)
        return nightly(machine, args.backend, args.grid)
    except (UserError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
