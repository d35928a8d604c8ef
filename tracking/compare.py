"""Compare two commits: for a pull request, with itself (noise), and with a slowed copy (detection).

Each comparison is `asv continuous` into a results folder of its own, judged by asv's statistics: a
cell has changed if its samples differ significantly and its median by more than a factor. The
factor of a machine is what keeps identical commits apart from changed ones there.
"""

import argparse
import csv
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from asv._stats import is_different
from asv.results import iter_results_for_machine
from asv.util import UserError

from tracking.history import (
    ROOT,
    asv,
    backend_settings,
    check_history,
    derive_config,
    discover,
    environment_name,
    git,
    machine_name,
    record_machine,
    selection,
)
from tracking.lock import acquire
from tracking.report import RESULTS, Value, as_markdown

COMPARED = ("overhead.", "decode.")
NOISE = ("overhead.Auto.", "overhead.GatherRows.", "decode.Auto.", "decode.Contiguous.")
DETECTION = ("overhead.Auto.",)
SLOWDOWNS = (5, 10, 20)  # percent

LEAST_FACTOR = 1.03
# Of each commit, for asv's test (p < 0.002) to see a tenth where samples scatter by a twentieth.
# What a round of few long steps does not give, more rounds do.
SAMPLES = 20
MOST_ROUNDS = 4
UNKNOWN_NOISE = {"ratio": 1.05, "time": 1.5}

NOISE_HEADER = ["benchmarks", "rounds", "comparisons", "cells compared", "largest change", "factor"]
DETECTION_HEADER = [
    "slower by",
    "rounds",
    "factor",
    "cells compared",
    "called slower",
    "called faster",
]

# Added to the package by `slowed`: each call takes some percent longer than it takes.
SLOWER = """

def _slower(call):
    import time

    def called(*args, **kwargs):
        start = time.perf_counter()
        out = call(*args, **kwargs)
        mx.eval(out)
        until = time.perf_counter() + {percent} / 100 * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return out

    return called


decode_attention = _slower(decode_attention)
"""


@dataclass(frozen=True)
class Change:
    """One cell of one benchmark in two commits."""

    name: str
    before: Value
    after: Value
    significant: bool
    samples: int  # of the commit that has fewer

    @property
    def kind(self):
        """Return "ratio", or "time" for everything that is absolute."""
        return "ratio" if ".ratio_" in self.name else "time"

    @property
    def ratio(self):
        """Return the Value of after over before, its interval from the ends farthest apart."""
        ends = self.after.low / self.before.high, self.after.high / self.before.low
        return Value(self.after.value / self.before.value, *ends)

    def verdict(self, factors):
        """Return "worsened", "improved", "unchanged", "failed" or "n/a".

        What ran before and is n/a now counts as failed.
        """
        if None in (self.before.value, self.after.value):
            return "failed"
        if not self.after.known:
            return "failed" if self.before.known else "n/a"
        if not self.before.known:
            return "n/a"
        factor = factors[self.kind]
        if self.significant and self.ratio.value > factor:
            return "worsened"
        if self.significant and self.ratio.value < 1 / factor:
            return "improved"
        return "unchanged"


def _cells(results, machine, commit, environment):
    """Return {name of a cell: (Value, stats, samples)} of a commit."""
    found = {}
    for result in iter_results_for_machine(str(results), machine):
        if result.commit_hash != commit or result.env_name != environment:
            continue
        for name in result.get_all_result_keys():
            params = result.get_result_params(name)
            values = result.get_result_value(name, params)
            stats = result.get_result_stats(name, params)
            samples = result.get_result_samples(name, params)
            for cell, value, stat, some in zip(
                itertools.product(*params), values, stats, samples, strict=True
            ):
                ends = (stat["ci_99_a"], stat["ci_99_b"]) if stat else (math.nan, math.nan)
                found[f"{name}({', '.join(cell)})"] = Value(value, *ends), stat, some
    return found


def changes(results, machine, before, after, environment):
    """Return the Change of each cell that was asked for at either commit in an environment."""
    old, new = (_cells(results, machine, commit, environment) for commit in (before, after))
    nothing = Value(math.nan), None, None
    compared = []
    for name in sorted({*old, *new}):
        (a, stats_a, samples_a), (b, stats_b, samples_b) = (
            x.get(name, nothing) for x in (old, new)
        )
        if a.value is not None and b.value is not None and not a.known and not b.known:
            continue
        # As asv has it: one sample without statistics is compared by its value alone.
        few = not (stats_a and stats_b) or 1 in (stats_a.get("repeat"), stats_b.get("repeat"))
        significant = few or is_different(samples_a, samples_b, stats_a, stats_b)
        samples = min(len(samples_a or ()), len(samples_b or ()))
        compared.append(Change(name, a, b, significant, samples))
    return compared


def measure(before, after, *, machine, backend, benchmarks, grid, rounds):
    """Run `asv continuous` on two commits into an empty folder and return the changes.

    Raises
    ------
    UserError
        If asv could not measure one of them at all, or a cell failed in some rounds only.
    """
    folder = ROOT / ".asv/compare"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {**backend_settings(backend), "results_dir": str(folder)}
    config = derive_config("compare", **settings)
    try:
        environment = environment_name(config)
        options = ["--machine", machine, "--attribute", f"rounds={rounds}", "--record-samples"]
        options += ["--interleave-rounds", "--show-stderr"]
        for name, benchmark in discover(machine, config).items():
            if name.startswith(benchmarks):
                options += selection(benchmark, grid)
        status = asv("continuous", *options, before, after, config=config)
    finally:
        (ROOT / config).unlink()
    for commit in (before, after):
        if not _cells(folder, machine, commit, environment):
            raise UserError(
                f"asv measured nothing at {commit[:8]} (exit status {status}), see above"
            )
    compared = changes(folder, machine, before, after, environment)
    if status == 2 and not any(None in (c.before.value, c.after.value) for c in compared):
        raise UserError(f"a benchmark failed in one of {rounds} rounds, see above")
    return compared


def resolve(name):
    """Return the hash of a commit."""
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except subprocess.CalledProcessError:
        raise UserError(f"expected a commit, got {name!r}: is it fetched?") from None


def commit_of(tree, message):
    """Return the hash of a commit of a tree, on no branch, child of HEAD."""
    identity = ["-c", "user.name=compare", "-c", "user.email=compare@localhost"]
    return git(*identity, "commit-tree", tree, "-p", "HEAD", "-m", message)


def slowed(percent):
    """Return the hash of a commit like HEAD whose decode_attention takes `percent` longer."""
    path = "pagedkv/attention/calls.py"
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "GIT_INDEX_FILE": str(Path(scratch, "index"))}

        def plumbing(*args, text=None):
            command = ["git", "-C", str(ROOT), *args]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, input=text, env=env
            )
            return done.stdout.strip()

        source = subprocess.run(
            ["git", "-C", str(ROOT), "show", f"HEAD:{path}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        blob = plumbing(
            "hash-object", "-w", "--stdin", text=source + SLOWER.format(percent=percent)
        )
        plumbing("read-tree", "HEAD")
        plumbing("update-index", "--cacheinfo", f"100644,{blob},{path}")
        tree = plumbing("write-tree")
    return commit_of(tree, f"HEAD, decode_attention slower by {percent}%")


def recorded_noise(machine, results=RESULTS):
    """Return ({kind: factor}, rounds, whether they were measured) of a machine."""
    file = results / machine / "noise.csv"
    rows = []
    if file.exists():
        with file.open() as lines:
            reader = csv.DictReader(lines)
            rows = list(reader) if reader.fieldnames == NOISE_HEADER else []
    if not rows:
        return UNKNOWN_NOISE, 2, False
    factors = {row["benchmarks"]: float(row["factor"]) for row in rows}
    return factors, int(rows[0]["rounds"]), True


def write_csv(file, header, rows):
    """Write a small table of results, and print it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([header, *rows])
    print(as_markdown(header, [[str(value) for value in row] for row in rows]), end="")


def markdown(compared, factors, *, before, after, about):
    """Return the comparison as Markdown: what failed and changed, and how many did not."""
    verdicts = [(change.verdict(factors), change) for change in compared]
    count = {v: sum(verdict == v for verdict, _ in verdicts) for v in ORDER}
    said = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
    lines = [f"### {after} against {before}", "", f"**{said}**", ""]
    shown = [(v, change) for v, change in verdicts if v in ("failed", "worsened", "improved")]
    shown.sort(key=lambda item: ORDER.index(item[0]))
    rows = []
    for verdict, change in shown:
        time = change.kind == "time" and ".time_" in change.name
        scale, unit = (1e3, " ms") if time else (1, "")
        values = [value.show(scale) + unit * value.known for value in (change.before, change.after)]
        known = change.before.known and change.after.known
        ratio = change.ratio.show(interval=True) if known else ""
        rows.append([verdict, ratio, *values, f"`{change.name}`"])
    if rows:
        header = ["", "ratio [99% interval]", "before", "after", "benchmark"]
        lines += [as_markdown(header, rows)]
    return "\n".join([*lines, about, ""])


ORDER = ("failed", "worsened", "improved", "unchanged", "n/a")


def pull_request(base, rounds, *, machine, backend, grid, output):
    """Compare HEAD with where it left `base`: 0, 1 if something is slower, 2 if something broke."""
    after = resolve("HEAD")
    before = git("merge-base", resolve(base), after)
    if before == after:
        raise UserError(f"HEAD is part of {base}, there is nothing to compare")
    factors, usual, known = recorded_noise(machine)
    rounds = rounds or usual
    compared = measure(
        before,
        after,
        machine=machine,
        backend=backend,
        benchmarks=COMPARED,
        grid=grid,
        rounds=rounds,
    )
    source = (
        f"from its noise with {usual} rounds"
        if known
        else "guessed: `make noise` was not run on this machine"
    )
    about = (
        f"Machine {machine}, {grid} grid, {rounds} rounds. Changed means significantly, and by "
        f"more than a factor of {factors['ratio']} (ratio) or {factors['time']} (time), {source}."
    )
    labels = (
        f"{commit[:8]} ({git('log', '-1', '--format=%s', commit)})" for commit in (before, after)
    )
    before_label, after_label = labels
    text = markdown(compared, factors, before=before_label, after=after_label, about=about)
    print("\n" + text, end="")
    if output:
        Path(output).write_text(text)
    verdicts = {change.verdict(factors) for change in compared}
    status = 2 if "failed" in verdicts else 1 if "worsened" in verdicts else 0
    print(("nothing worsened", "something worsened", "something failed to run")[status])
    return status


def noise(times, rounds, *, machine, backend):
    """Compare HEAD with identical commits and record the rounds and factors this machine needs."""
    head = resolve("HEAD")
    twin = commit_of("HEAD^{tree}", "HEAD again, to measure noise")
    where = {"machine": machine, "backend": backend, "benchmarks": NOISE, "grid": "quick"}
    rounds = rounds or rounds_needed(measure(head, twin, rounds=1, **where))
    runs = [measure(head, twin, rounds=rounds, **where) for _ in range(times)]
    write_csv(RESULTS / machine / "noise.csv", NOISE_HEADER, noise_rows(runs, rounds))
    return 0


def rounds_needed(compared):
    """Return how many rounds give each ratio enough samples, from a comparison of one round."""
    samples = [c.samples for c in compared if c.kind == "ratio" and c.after.known]
    if not samples:
        raise UserError("no ratio was measured, see above")
    return min(MOST_ROUNDS, -(-SAMPLES // max(1, min(samples))))


def noise_rows(runs, rounds):
    """Return the rows of noise.csv from comparisons of identical commits.

    The factor is the largest significant change, rounded up to the next percent.

    Raises
    ------
    UserError
        If a cell failed: what is not there makes no noise.
    """
    if any(None in (c.before.value, c.after.value) for run in runs for c in run):
        raise UserError("a benchmark failed, see above")
    rows = []
    for kind in ("ratio", "time"):
        cells = [
            c for run in runs for c in run if c.kind == kind and c.after.known and c.before.known
        ]
        apart = [max(c.ratio.value, 1 / c.ratio.value) for c in cells if c.significant]
        largest = max(apart, default=1.0)
        factor = max(LEAST_FACTOR, math.ceil(100 * largest) / 100)
        rows.append([kind, rounds, len(runs), len(cells), f"{largest:.3f}", f"{factor:.2f}"])
    return rows


def detect(times, rounds, *, machine, backend):
    """Compare a commit with slowed ones, and `times` with one that is not; record what is said.

    Rows of another number of rounds stay in the record.
    """
    factors, usual, known = recorded_noise(machine)
    if not known:
        raise UserError(f"the noise of machine {machine} is not recorded: run `make noise`")
    rounds = rounds or usual
    where = {"machine": machine, "backend": backend, "benchmarks": DETECTION, "grid": "quick"}
    file = RESULTS / machine / "detection.csv"
    rows = []
    if file.exists():
        with file.open() as lines:
            rows = [row for row in list(csv.reader(lines))[1:] if row[1] != str(rounds)]
    base = slowed(0)
    for percent, count in [(0, times), *((percent, 1) for percent in SLOWDOWNS)]:
        other = commit_of(f"{slowed(percent)}^{{tree}}", f"slower by {percent}%, again")
        verdicts = []
        for _ in range(count):
            compared = measure(base, other, rounds=rounds, **where)
            verdicts += [change.verdict(factors) for change in compared]
        if "failed" in verdicts:
            raise UserError("a benchmark failed, see above")
        said = (verdicts.count("worsened"), verdicts.count("improved"))
        rows.append([f"{percent}%", str(rounds), factors["ratio"], len(verdicts), *said])
        write_csv(file, DETECTION_HEADER, rows)
    return 0


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.compare", description=__doc__)
    parser.add_argument("what", choices=["pull-request", "noise", "detect"])
    parser.add_argument("--base", default="main", help="what HEAD is compared with")
    parser.add_argument("--grid", choices=["quick", "full"], default="quick")
    parser.add_argument("--times", type=int, help="comparisons of identical commits")
    parser.add_argument("--rounds", type=int, help="processes a cell (default: as noise has it)")
    parser.add_argument("--output", help="write the Markdown table here, too")
    parser.add_argument("--backend", choices=["cpu", "cuda12", "cuda13"], default="cpu")
    parser.add_argument("--machine", help="name in results/ (default: this host's name)")
    args = parser.parse_args()
    try:
        acquire()
        machine = args.machine or machine_name(args.backend)
        where = {"machine": machine, "backend": args.backend}
        check_history()
        record_machine(machine)
        if args.what == "noise":
            return noise(args.times or 2, args.rounds, **where)
        if args.what == "detect":
            return detect(args.times or 20, args.rounds, **where)
        return pull_request(args.base, args.rounds, grid=args.grid, output=args.output, **where)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception:  # Python would exit with 1, which here says that something is slower
        traceback.print_exc()
        return 2


if __name__ == "__main__":
    sys.exit(main())
