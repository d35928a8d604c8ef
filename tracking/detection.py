"""What a machine finds of a slowdown that is really there: `make detect`."""

import tempfile
from pathlib import Path

from asv.util import UserError

from tracking.changes import measure
from tracking.noise import recorded_noise
from tracking.repository import commit_of, git
from tracking.results import RESULTS
from tracking.tables import read_csv, write_csv

DETECTION = "overhead.Auto.ratio_vs_contiguous"
SLOWDOWNS = (5, 10, 20)  # percent
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

    import mlx.core as mx

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


def slowed(percent):
    """Return the hash of a commit like HEAD whose decode_attention takes `percent` longer."""
    path = "pagedkv/__init__.py"
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        source = git("show", f"HEAD:{path}") + SLOWER.format(percent=percent)
        blob = git("hash-object", "-w", "--stdin", text=source)
        git("read-tree", "HEAD", env=index)
        git("update-index", "--cacheinfo", f"100644,{blob},{path}", env=index)
        tree = git("write-tree", env=index)
    return commit_of(tree, f"HEAD, decode_attention slower by {percent}%")


def detect(times, rounds, *, machine, backend):
    """Compare a commit with slowed ones, and `times` with one that is not; record what is said.

    Rows of another number of rounds stay in the record.
    """
    noise = recorded_noise(machine)
    if not noise.threshold(DETECTION).recorded:
        raise UserError(f"the noise of machine {machine} is not recorded: run `make noise`")
    rounds = rounds or noise.rounds
    where = {"machine": machine, "backend": backend, "benchmarks": DETECTION, "grid": "short"}
    file = RESULTS / machine / "detection.csv"
    rows = read_csv(file)[1] if file.exists() else []
    rows = [row for row in rows if row[1] != str(rounds)]
    base = slowed(0)
    for percent, count in [(0, times), *((percent, 1) for percent in SLOWDOWNS)]:
        other = commit_of(f"{slowed(percent)}^{{tree}}", f"slower by {percent}%, again")
        verdicts = []
        for _ in range(count):
            compared = measure(base, other, rounds=rounds, **where)
            verdicts += [change.verdict(noise) for change in compared]
        if {"failed", "repaired"} & set(verdicts):
            raise UserError("a benchmark failed, see above")
        said = (verdicts.count("worsened"), verdicts.count("improved"))
        factor = max(noise.threshold(change.name).factor for change in compared)
        rows.append([f"{percent}%", str(rounds), f"{factor:.2f}", len(verdicts), *said])
        write_csv(file, DETECTION_HEADER, rows)
    return 0
