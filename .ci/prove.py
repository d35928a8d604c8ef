"""Prove the main job in small: asv over HEAD and an old commit, published, seen in a browser.

Run by `make prove`. Results go to a temporary directory, one sample of the smallest cell.
"""

import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx

from benchmarks._workload import DTYPE, HEAD_DIM
from pagedkv import DECODE_PATHS
from website.check import look
from website.history import asv, check_history, derive_config, git, machine_name, record_machine
from website.report import HEADLINE, load

CELL = ("1", "1024", "32")
LACKED_BY_OLD = "overhead.GatherHeadMajor.ratio_vs_contiguous"


def expect(condition, message):
    """Stop unless `condition` holds."""
    if not condition:
        sys.exit(f"not proven: {message}")
    print(f"proven: {message}", flush=True)


def main():
    """Run everything in order."""
    check_history()
    machine = machine_name("cpu")
    record_machine(machine)
    head = git("rev-parse", "HEAD")
    old = git("log", "--reverse", "--format=%H", "--", "pagedkv/attention.py").split()[0]
    expect(asv("check") == 0, "asv check")

    with tempfile.TemporaryDirectory() as scratch:
        results, html = Path(scratch, "results"), Path(scratch, "html")
        config = derive_config("prove", results_dir=str(results), html_dir=str(html))
        for commit in (old, head):
            cell = rf"\({', '.join(CELL)}\)$"
            options = ["--machine", machine, "--quick", "--show-stderr", "-b", cell, f"{commit}^!"]
            expect(asv("run", *options, config=config) == 0, f"asv run at {commit[:8]} exits 0")

        new_values = {name: cells[CELL] for name, cells in load(machine, head, results).items()}
        without = [name for name, value in new_values.items() if not value.known]
        fused = DECODE_PATHS["fused"].supports(mx.default_device(), DTYPE, HEAD_DIM)
        expected = (
            [] if fused else ["decode.Fused.time_decode", "overhead.Fused.ratio_vs_contiguous"]
        )
        expect(
            len(new_values) > 10 and sorted(without) == expected,
            f"{len(new_values)} benchmarks run at HEAD, n/a are {expected or 'none'}",
        )
        old_values = load(machine, old, results)
        lacked = old_values[LACKED_BY_OLD][CELL].value
        expect(lacked is not None and math.isnan(lacked), "a path the old commit lacks is n/a")
        expect(old_values[HEADLINE][CELL].known, "the headline series reaches the old commit")

        expect(asv("publish", config=config) == 0, "asv publish")
        series = look(html, machine)
        drawn = {round(y, 4) for points in series.values() for _, y in points}
        values = (old_values[HEADLINE][CELL], new_values[HEADLINE])
        measured = {round(value.value, 4) for value in values}
        expect(drawn == measured, f"the page draws the measured values {sorted(measured)}, offline")


if __name__ == "__main__":
    main()
