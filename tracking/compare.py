"""Compare a commit with the one where it left another branch: `make compare`."""

import argparse
import contextlib
import sys
import traceback
from pathlib import Path

from asv.util import UserError

from tracking import valid
from tracking.changes import StoppedError, measure, verdict
from tracking.grid import GRIDS
from tracking.noise import recorded_noise
from tracking.project import begin, machine_options
from tracking.repository import git, resolve
from tracking.results import RESULTS
from tracking.tables import as_markdown, code

COMPARED = (
    "overhead.",
    "decode.",
    "host.",
    "scheduler.Instructions.",
    "scheduler.Allocated.",
    "scheduler.Retired.",
    "step.Auto.ratio_",
    "step.Instructions.",
    "step.Allocated.",
    "step.Retired.",
)
ORDER = ("failed", "worsened", "improved", "repaired", "unchanged", "n/a")


def markdown(compared, noise, *, before, after, about):
    """Return the comparison as Markdown: the verdict, and what failed or changed."""
    verdicts = [(change.verdict(noise), change) for change in compared]
    count = {v: sum(said == v for said, _ in verdicts) for v in ORDER}
    counts = ", ".join(f"{number} {said}" for said, number in count.items())
    lines = [f"**{verdict(compared, noise)}**", "", f"{after} against {before}: {counts}", ""]
    shown = [(v, change) for v, change in verdicts if v not in ("unchanged", "n/a")]
    shown.sort(key=lambda item: ORDER.index(item[0]))
    rows = []
    for said, change in shown:
        scale, unit = (1e3, " ms") if ".time_" in change.name else (1, "")
        values = [value.show(scale) + unit * value.known for value in (change.before, change.after)]
        ratio = change.ratio.show(interval=True) if change.known else ""
        threshold = noise.threshold(change.name).show()
        rows.append([said, ratio, threshold, *values, code(change.name)])
    if rows:
        header = ["", "ratio [99% interval]", "threshold", "before", "after", "benchmark"]
        lines += [as_markdown(header, rows)]
    return "\n".join([*lines, about, ""])


def duration(machine, names, runs, results=RESULTS):
    """Say how long `runs` of benchmarks take, as the machine's newest results have it."""
    seconds = {}
    files = Path(results, machine).glob("*-*.json")
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        with contextlib.suppress(valid.BrokenFileError):  # said elsewhere
            data = valid.load(file)
            for name, row in data["results"].items():
                took = dict(zip(data["result_columns"], row, strict=False)).get("duration")
                seconds[name] = took or seconds.get(name)
    known = [seconds[name] for name in names if seconds.get(name)]
    if not known:
        return f"{len(names)} benchmarks; how long they take is not recorded on {machine}"
    minutes = sum(known) / len(known) * len(names) * runs / 60
    return f"{len(names)} benchmarks, about {minutes:.0f} minutes; Ctrl-C shows the verdict so far"


def compare(base, commit, *, machine, backend, grid, pattern, rounds, output):
    """Compare a commit with where it left `base`: 0, 1 if something is slower, 2 if broken."""
    after = resolve(commit)
    before = git("merge-base", resolve(base), after)
    if before == after:
        raise UserError(f"{commit} is part of {base}, there is nothing to compare")
    noise = recorded_noise(machine)
    rounds = rounds or noise.rounds
    about = (
        f"Machine {machine}, {grid} grid, {rounds} rounds. Changed means significantly, by more "
        "than the threshold of the series, and each median outside of the other's middle half."
    )
    what = {"benchmarks": COMPARED, "grid": grid, "pattern": pattern, "rounds": rounds}
    what |= {"about": lambda names: print(duration(machine, names, 2 * rounds), flush=True)}
    stopped = False
    try:
        compared = measure(before, after, machine=machine, backend=backend, **what)
    except StoppedError as error:
        compared, stopped = error.compared, True
        about = f"Interrupted: this is of the rounds that were through. {about}"
    labels = [f"{one[:8]} ({git('log', '-1', '--format=%s', one)})" for one in (before, after)]
    text = markdown(compared, noise, before=labels[0], after=labels[1], about=about)
    print("\n" + text, end="")
    if output:
        Path(output).write_text(text)
    verdicts = {change.verdict(noise) for change in compared}
    status = 2 if stopped or "failed" in verdicts else 1 if "worsened" in verdicts else 0
    said = ("nothing worsened", "something worsened", "something failed to run")[status]
    print("interrupted" if stopped else said)
    return status


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.compare", description=__doc__)
    parser.add_argument("--base", default="main", help="(default: %(default)s)")
    parser.add_argument("--commit", default="HEAD", help="(default: %(default)s)")
    parser.add_argument("--grid", choices=GRIDS, default="short")
    parser.add_argument("--bench", default="", help="only cells that this regular expression finds")
    parser.add_argument("--rounds", type=int, help="processes a cell (default: as noise has it)")
    parser.add_argument("--output", help="write the Markdown table here, too")
    machine_options(parser)
    args = parser.parse_args()
    try:
        where = begin(args, records=False)
        what = {"grid": args.grid, "pattern": args.bench, "rounds": args.rounds}
        return compare(args.base, args.commit, output=args.output, **what, **where)
    except KeyboardInterrupt:
        print("interrupted, nothing was compared", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except Exception:  # Python would exit with 1, which here says that something is slower
        traceback.print_exc()
        return 2


if __name__ == "__main__":
    sys.exit(main())
