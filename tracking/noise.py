"""What each series does between runs of identical code, and so what is a change: `make noise`.

results/MACHINE/noise.csv has a row for each series and run. Runs are of identical code if pagedkv/
and benchmarks/ are the same in git; recorded results of such commits are runs, too.
"""

import argparse
import csv
import datetime
import itertools
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from asv.util import UserError

from tracking.changes import scratch
from tracking.files import write_text
from tracking.grid import selection, series_name
from tracking.project import asv, begin, discover, machine_options
from tracking.repository import git, resolve
from tracking.results import RESULTS, measured
from tracking.tables import as_csv

HEADER = ["time", "commit", "code", "environment", "rounds", "samples", "series", "value"]

LATEST = 20  # runs of a series and code that count
MOST = 200  # changes of a series that count, those of the latest code
# With fewer runs a threshold of its own is too low too often: in a simulation of normal noise, of
# pairs of runs 2% were beyond that of 5 runs, 0.5% beyond that of 10.
OWN = 10  # runs
FEW = 3  # changes of a series: three runs
POOLED = 10  # changes between runs that make a threshold of several series

# Less is no change, however quiet a series.
LEAST = {"count": 1.01, "retired": 1.01, "ratio": 1.03, "time": 1.03}
GUESSED = {"retired": 1.05, "ratio": 1.05, "time": 1.5}

NIGHT = 2  # rounds of a night's run, and of a run for the noise
# Of each commit, for asv's test (p < 0.002) to see a tenth where samples scatter by a twentieth.
# What a round of few long steps does not give, more rounds do.
SAMPLES = 20
MOST_ROUNDS = 4


def kind(series):
    """Return "count" of what is counted, "retired", "ratio", or "time" of everything else."""
    name = series.split("(")[0].rsplit(".", 1)[-1]
    if name in ("track_instructions", "track_allocated"):
        return "count"
    if name == "track_retired":
        return "retired"
    return "ratio" if name.startswith("ratio_") else "time"


@dataclass(frozen=True)
class Threshold:
    """The `factor` by which a series may move, up or down, and still be unchanged; above 1.

    `source` says whose runs it comes from: "series", "benchmark" (all of its cells), "machine" (all
    of its series of the kind), "exact" of what is counted, or "guess" where nothing is recorded.
    `changes` are the changes between these runs, as factors of at least 1, and `own` those of the
    series itself where the others come from several.
    """

    factor: float
    source: str
    changes: tuple = ()
    own: tuple = ()

    @property
    def recorded(self):
        """Whether the series itself, or another cell of its benchmark, was run again."""
        return self.source in ("series", "benchmark", "exact")

    @property
    def largest(self):
        """The factor, or the largest change between runs of identical code if that is more.

        A series that is in another mode now and then is so too seldom for its quartiles to show.
        What other series have done once says nothing of it, unless it was run too seldom itself.
        """
        return max((self.factor, *(self.own if len(self.own) >= FEW else self.changes)))

    def show(self):
        """Return it in words, like "±4.1%, from 45 changes of its own"."""
        of = {"series": "its own", "benchmark": "its benchmark", "machine": "the machine"}
        said = f"±{100 * (self.factor - 1):.1f}%"
        if self.source in of:
            return f"{said}, from {len(self.changes)} changes of {of[self.source]}"
        return f"{said}, counted" if self.source == "exact" else f"{said}, a guess"


class Noise:
    """The thresholds of a machine's series, and the `rounds` that give a ratio enough samples.

    `runs` are (series, what ran, value), the oldest first; what ran is equal for identical code.
    """

    def __init__(self, runs=(), rounds=NIGHT):
        self.rounds = rounds
        values, self._runs, self._changes, self._made = {}, {}, {}, {}
        for series, code, value in runs:
            if value > 0 and math.isfinite(value):
                values.setdefault(series, {}).setdefault(code, []).append(math.log(value))
        for series, by_code in values.items():
            self._runs[series] = max(map(len, by_code.values()))  # of one code
            changes = [
                math.exp(abs(one - other))
                for found in by_code.values()
                for one, other in itertools.combinations(found[-LATEST:], 2)
            ]
            for pool in (series, series.split("(")[0], kind(series)):
                self._changes.setdefault(pool, []).extend(changes[-MOST:])

    def threshold(self, series):
        """Return the Threshold of a series, named like ``"overhead.Auto.ratio_x(1, 1024, 32)"``."""
        of_kind = kind(series)
        if of_kind == "count":
            return Threshold(LEAST[of_kind], "exact")
        own = self._of(series, "series", of_kind)
        if self._runs.get(series, 0) >= OWN:
            return own
        for source, pool in (("benchmark", series.split("(")[0]), ("machine", of_kind)):
            if len(self._changes.get(pool, ())) >= POOLED:
                pooled = self._of(pool, source, of_kind)
                larger = pooled if pooled.factor >= own.factor else own
                return replace(larger, source=source, own=own.changes)
        return Threshold(GUESSED[of_kind], "guess")

    def _of(self, pool, source, of_kind):
        """Return what the changes of a pool say, made once."""
        if (pool, of_kind) not in self._made:
            changes, factor = tuple(self._changes.get(pool, ())), 1.0
            if changes:
                first, third = np.quantile(np.log(changes), [0.25, 0.75])
                factor = math.exp(third + 3 * (third - first))
            self._made[pool, of_kind] = Threshold(max(factor, LEAST[of_kind]), source, changes)
        return self._made[pool, of_kind]


def read(file):
    """Return the rows of a noise.csv as dictionaries, none without a file."""
    if not file.exists():
        return []
    rows = []
    try:
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            if reader.fieldnames != HEADER:
                raise ValueError(f"expected columns {','.join(HEADER)}")
            for row in reader:
                numbers = {"rounds": int(row["rounds"]), "samples": int(row["samples"])}
                rows.append({**row, **numbers, "value": float(row["value"])})
                datetime.datetime.fromisoformat(row["time"])
                if len(row) != len(HEADER) or min(numbers.values()) < 1:
                    raise ValueError(f"got {row}")
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file}: {error}. Remove it, and run `make noise`") from error
    return rows


def write(file, rows):
    """Write a noise.csv, whole or not at all, by time and each row once."""
    unique = {tuple(str(row[column]) for column in HEADER) for row in rows}
    write_text(file, as_csv(HEADER, sorted(unique)))


def codes(commits):
    """Return {commit: what of it decides what is measured} of the commits that this clone has."""
    folders = [f"{commit}:{folder}" for commit in commits for folder in ("pagedkv", "benchmarks")]
    said = git("cat-file", "--batch-check=%(objectname)", text="\n".join(folders)).splitlines()
    pairs = zip(commits, said[::2], said[1::2], strict=True)
    return {
        commit: package[:8] + suite[:8]
        for commit, package, suite in pairs
        if not any(name.endswith(" missing") for name in (package, suite))
    }


def rows_of(one, code, rounds):
    """Return a `results.Measured` as rows of noise.csv."""
    when = datetime.datetime.fromtimestamp(one.started_at / 1000, datetime.timezone.utc)
    about = [when.isoformat(timespec="seconds"), one.commit[:8], code, one.environment, rounds]
    return [
        dict(zip(HEADER, [*about, samples, series_name(name, cell), value.value], strict=True))
        for name, values in one.table.items()
        for cell, value in values.items()
        if value.known
        for samples in [(value.stats or {}).get("repeat", 1)]
    ]


def record(machine, rows, results=RESULTS):
    """Add rows to a machine's noise.csv."""
    file = Path(results, machine, "noise.csv")
    write(file, [*read(file), *rows])


def recorded_noise(machine, results=RESULTS):
    """Return the Noise of a machine: what its noise.csv has, and what its results have besides."""
    rows, stored = read(Path(results, machine, "noise.csv")), measured(machine, results)
    rounds, same = rounds_needed(rows), codes([one.commit for one in stored])
    times = Counter([*same.values(), *{row["code"] for row in rows}])
    for one in stored:
        if times[same.get(one.commit)] > 1:  # what ran once has no noise
            rows += rows_of(one, same[one.commit], NIGHT)
    rows.sort(key=lambda row: row["time"])
    runs = [(row["series"], (row["code"], row["environment"]), row["value"]) for row in rows]
    return Noise(runs, rounds)


def rounds_needed(rows):
    """Return how many rounds give each ratio enough samples, from the rows of noise.csv."""
    samples = [r["samples"] / r["rounds"] for r in rows if kind(r["series"]) == "ratio"]
    return min(MOST_ROUNDS, math.ceil(SAMPLES / min(samples))) if samples else NIGHT


def noise(times, pause, benchmarks, *, machine, backend):
    """Measure HEAD `times` times as a night does, `pause` seconds apart, and record each run."""
    head = resolve("HEAD")
    for number in range(times):
        if number:
            time.sleep(pause)
        with scratch("noise", backend) as (folder, config):
            listed = discover(machine, config)
            options = ["--machine", machine, "--attribute", f"rounds={NIGHT}", "--show-stderr"]
            for name, benchmark in listed.items():
                if name.startswith(benchmarks):
                    options += selection(benchmark, "short")
            status = asv("run", *options, f"{head}^!", config=config)
            found = measured(machine, folder)
        if status not in (0, 2) or not found:
            raise UserError(f"asv measured nothing (exit status {status}), see above")
        rows = [row for one in found for row in rows_of(one, codes([head])[head], NIGHT)]
        record(machine, rows)
        print(f"run {number + 1} of {times}: {len(rows)} series in results/{machine}/noise.csv")
    return 0


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.noise", description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="runs")
    parser.add_argument("--pause", type=float, default=0, help="seconds between runs")
    parser.add_argument("--benchmarks", nargs="*", default=[""], help="prefixes (default: all)")
    machine_options(parser)
    args = parser.parse_args()
    try:
        return noise(args.times, args.pause, tuple(args.benchmarks), **begin(args))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
