"""What the benchmark machine does for main: `make nightly`."""

import argparse
import re
import sys
import tempfile

from asv.util import UserError

from tracking import history
from tracking.changes import changes
from tracking.grid import GRIDS, device_of, selection
from tracking.noise import recorded_noise
from tracking.project import asv, begin, config_for, discover, environment_name, machine_options
from tracking.repository import git
from tracking.results import RESULTS, measured_commits

AGAIN = 4  # rounds of what looks like a regression


def nightly(*, machine, backend, grid):
    """Measure what is new on main and the phases, then once more what looks like a regression."""
    config = config_for(backend)
    environment = environment_name(config)
    head, before = git("rev-parse", "HEAD"), measured_commits(machine, environment=environment)
    listed = discover(machine, config)
    asked = {name: selection(one, grid, device_of(backend)) for name, one in listed.items()}
    since = git("rev-list", "--reverse", f"{before[-1]}..HEAD").split() if before else []
    status = 0
    if new := [commit for commit in since if commit not in before]:
        options = [option for selected in asked.values() for option in selected]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(new))  # the oldest first: what a night cut short leaves is later
            file.flush()
            status = run(machine, config, *options, f"HASHFILE:{file.name}")
    if status in (0, 2):
        status = max(status, history.run(grid, machine, backend, rounds=2))
    if status in (0, 2) and (older := [commit for commit in before if commit != head]):
        status = max(status, again(machine, config, environment, older[-1], head, listed, asked))
    return status


def run(machine, config, *options):
    """Run asv on the machine."""
    return asv("run", "--machine", machine, "--show-stderr", *options, config=config)


def again(machine, config, environment, previous, head, listed, asked):
    """Measure once more, at both commits, what looks worse at HEAD; print what stays so."""
    noise = recorded_noise(machine)

    def worse():
        for change in changes(RESULTS, machine, previous, head, environment, listed):
            patterns, verdict = asked.get(change.name.split("(")[0], []), change.verdict(noise)
            in_grid = any(re.search(pattern, change.name) for pattern in patterns[1:])
            if in_grid and verdict in ("worsened", "failed"):
                yield verdict, change

    names = sorted({change.name.split("(")[0] for _, change in worse()})
    if not names:
        print("no regressions")
        return 0
    options = [option for name in names for option in asked[name]]
    options += ["--attribute", f"rounds={AGAIN}"]
    status = max(run(machine, config, *options, f"{commit}^!") for commit in (previous, head))
    for verdict, change in worse():
        by = change.ratio.show(interval=True) if change.known else ""
        print(f"{verdict}: {change.name} {by}")
    return status


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.nightly", description=__doc__)
    parser.add_argument("--grid", choices=GRIDS, default="short")
    machine_options(parser)
    args = parser.parse_args()
    try:
        return nightly(grid=args.grid, **begin(args))
    except (UserError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
