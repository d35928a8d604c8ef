"""What a machine calls changed between identical commits: `make noise`."""

import csv
import math

from asv.util import UserError

from tracking.changes import measure
from tracking.repository import commit_of, resolve
from tracking.results import RESULTS
from tracking.tables import write_csv

NOISE = ("overhead.Auto.", "overhead.GatherRows.", "decode.Auto.", "decode.Contiguous.")
LEAST_FACTOR = 1.03

# Of each commit, for asv's test (p < 0.002) to see a tenth where samples scatter by a twentieth.
# What a round of few long steps does not give, more rounds do.
SAMPLES = 20
MOST_ROUNDS = 4
UNKNOWN_NOISE = {"ratio": 1.05, "time": 1.5}
NOISE_HEADER = ["benchmarks", "rounds", "comparisons", "cells compared", "largest change", "factor"]


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
