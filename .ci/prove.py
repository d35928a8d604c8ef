"""Prove the main job in small: asv over HEAD and an old commit, published, seen in a browser.

Run by `make prove`. Results go to a temporary directory, one sample of the smallest cell.
"""

import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from browser import OverheadPage, browse, look

from benchmarks.common import DTYPE, HEAD_DIM
from pagedkv import DECODE_PATHS
from tracking.changes import measure
from tracking.detection import DETECTION, slowed
from tracking.lock import acquire
from tracking.project import asv, derive_config, discover, machine_name, record_machine
from tracking.repository import check_history, commit_label, commit_of, git
from tracking.results import ATTENTION, load, measured_commits, recorded_commits
from tracking.tables import as_csv

CELL = ("1", "1024", "32")
RECORDED = ("h200", "linux-2core-xeon")
LACKED_BY_OLD = "overhead.GatherHeadMajor.ratio_vs_contiguous"


def expect(condition, message):
    """Stop unless `condition` holds."""
    if not condition:
        sys.exit(f"not proven: {message}")
    print(f"proven: {message}", flush=True)


def first_commit_that_has(code):
    """Return the hash of the first commit whose package has some code, wherever it lies."""
    return git("log", "--reverse", "--format=%H", f"-S{code}", "--", "pagedkv").split()[0]


def shown(value):
    """Return a Value as the overhead page writes it."""
    return value.show(interval=True)


def prove_overhead_page(html_dir, machines):
    """Compare what the overhead page says in a browser with the results, and use it."""
    with browse(html_dir) as (page, address):
        overhead = OverheadPage(page)
        for machine in machines:
            commits = measured_commits(machine)
            tables = [load(machine, commit) for commit in commits]
            latest = [t[ATTENTION] for t in tables if any(v.known for v in t[ATTENTION].values())][
                -1
            ]
            batch, _, block = next(cell for cell, value in latest.items() if value.known)
            overhead.open(f"{address}/overhead.html", machine=machine, batch=batch, block=block)

            header, *rows = overhead.table("phases-table")
            expected = {
                context: [shown(table[ATTENTION][batch, context, block]) for table in tables]
                for context in sorted({cell[1] for cell in latest}, key=int)
            }
            said = {context: values for context, *values in rows}
            expect(header[1:] == [commit_label(c) for c in commits], f"{machine}: phases in order")
            expect(
                said == {context: expected[context] for context in said} and len(said) >= 2,
                f"{machine}: {len(said)} contexts over {len(commits)} commits as recorded",
            )
            headlines = [value for table in tables for value in table[ATTENTION].values()]
            known = {shown(value) for value in headlines if value.known}
            drawn = sum(text in known for values in said.values() for text in values)
            expect(overhead.points("phases") == drawn, f"{machine}: {drawn} points drawn")

        machine = machines[0]
        overhead.open(f"{address}/overhead.html", machine=machine, batch=1, block=32)
        batch_1 = overhead.table("phases-table")
        overhead.choose("batch", "4")
        expect(overhead.table("phases-table") != batch_1, "choosing a batch changes the numbers")
        overhead.choose("path", "gather_rows")
        said = overhead.table("phases-table")[1][1:]
        name = "overhead.GatherRows.ratio_vs_contiguous"
        expected = [
            shown(table[name]["4", "1024", "32"])
            for commit in measured_commits(machine)
            if name in (table := load(machine, commit))
        ]
        expect(said == expected, "choosing a path shows that path")
        with page.expect_download() as download:
            page.click("#csv")
        text = Path(download.value.path()).read_text()
        rows = overhead.table("table")
        expect(text == as_csv(rows[0], rows[1:]), "the CSV is the table")

        link = overhead.links("phases-table")[0]
        page.goto(link)
        page.wait_for_function("() => document.querySelector('#main-graph canvas')", timeout=20000)
        expect("overhead.html" in page.inner_html("#nav"), "asv's navigation leads to the page")

        overhead.open(f"file://{html_dir}/overhead.html", machine=machine)
        expect(overhead.points("phases") > 0, "the page works as a mere file")
        page.set_viewport_size({"width": 390, "height": 800})
        overhead.open(f"{address}/overhead.html", machine=machine)
        wide = page.evaluate("document.documentElement.scrollWidth")
        expect(wide <= 390, "nothing sticks out on a phone")


def prove_comparison(machine):
    """Compare a commit with a slowed copy and with an identical one."""
    where = {"machine": machine, "backend": "cpu", "benchmarks": DETECTION, "grid": "quick"}
    base, again, slower = slowed(0), commit_of(f"{slowed(0)}^{{tree}}", "again"), slowed(100)
    factors = {"ratio": 1.4, "time": 2.0}  # CI machines are noisy
    verdicts = [c.verdict(factors) for c in measure(base, slower, rounds=1, **where)]
    expect(verdicts == ["worsened"] * 4, "a commit slower by 100% is called slower in each cell")
    verdicts = [c.verdict(factors) for c in measure(base, again, rounds=1, **where)]
    expect(verdicts == ["unchanged"] * 4, "an identical commit is not")


def main():
    """Run everything in order."""
    acquire()
    check_history()
    machine = machine_name("cpu")
    record_machine(machine)
    head = git("rev-parse", "HEAD")
    old = first_commit_that_has("def decode_attention")
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
        expect(old_values[ATTENTION][CELL].known, "the headline series reaches the old commit")

        expect(asv("publish", config=config) == 0, "asv publish")
        series = look(html, machine)
        drawn = {round(y, 4) for points in series.values() for _, y in points}
        values = (old_values[ATTENTION][CELL], new_values[ATTENTION])
        measured = {round(value.value, 4) for value in values}
        expect(drawn == measured, f"the page draws the measured values {sorted(measured)}, offline")

        recorded = [name for name in RECORDED if recorded_commits(name)]
        config = derive_config("prove", html_dir=str(html))
        discover(machine, config)
        expect(asv("publish", config=config) == 0, "asv publish of the recorded results")
        prove_overhead_page(html, recorded)
    prove_comparison(machine)


if __name__ == "__main__":
    main()
