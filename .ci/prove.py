"""Prove the main job in small: asv over HEAD and an old commit, published, seen in a browser.

Run by `make prove`. Results go to a temporary directory, one sample of the smallest cell.
"""

import collections
import math
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from browser import SERIES, OverheadPage, browse, look
from slowed import slowed

from benchmarks.common import DTYPE, HEAD_DIM
from pagedkv import DECODE_PATHS
from tracking.changes import measure
from tracking.noise import Threshold
from tracking.project import asv, derive_config, discover, machine_name, record_machine
from tracking.repository import check_history, commit_label, commit_of, git
from tracking.results import (
    ATTENTION,
    BOUND,
    MISSING,
    RESULTS,
    STEP,
    TOKENS,
    load,
    measured,
    measured_commits,
    of_one_version,
    recorded_commits,
    usual_environment,
)

CELL = ("1", "1024", "32")
RECORDED = ("h200", "linux-2core-xeon", "h100")
STEPLESS = "linux-2core"  # a machine that took no step, and measured much else
MEASURES = {
    "tokens": (TOKENS,),
    "step": (STEP, "step.Batch16.ratio_step_vs_contiguous"),
    "bound": (BOUND, "step.BoundBatch16.ratio_step_vs_bound"),
    "attention": (ATTENTION, "overhead.Batch16.ratio_vs_contiguous"),
}
CAPACITY = "groups.Capacity.track_tokens"  # larger is better
LACKED_BY_OLD = "overhead.GatherRows.ratio_vs_contiguous"


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


def prove_measure(overhead, url, machine, measure, results=RESULTS):
    """Compare what the page says of a measure on a machine with the results."""
    commits, environment = measured_commits(machine, results), usual_environment(machine, results)
    files = {m.commit: m for m in measured(machine, results) if m.environment == environment}
    values = {
        commit: {
            (*c, "32")[:3]: v for name in MEASURES[measure] for c, v in table.get(name, {}).items()
        }
        for commit, table in zip(commits, of_one_version([files[c] for c in commits]), strict=True)
    }
    known = [commit for commit, cells in values.items() if any(v.known for v in cells.values())]
    name = f"{machine}, {measure}"
    if not known:
        overhead.open(url, machine=machine)
        said = overhead.text(f"#{measure}-card"), overhead.text(f"#{measure}")
        expect(
            all("Not measured on this machine: no run asked for it." in text for text in said)
            and not overhead.visible(f"#{measure} :is(table, .chart)"),
            f"{name}: said not to be measured, nothing empty drawn",
        )
        return
    latest = {cell: value for cell, value in values[known[-1]].items() if value.known}
    batch, _, block = next(iter(latest))
    overhead.open(url, machine=machine, commit=known[-1][:8], batch=batch, block=block)
    values_here = [v.value for cell, v in latest.items() if (cell[0], cell[2]) == (batch, block)]
    ends = dict.fromkeys(f"{end:.2f}" for end in (min(values_here), max(values_here)))
    range_ = "\u2013".join(ends)
    expect(f"\n{range_}\n" in overhead.text(f"#{measure}-card"), f"{name}: range {range_}")

    header, *rows = overhead.table(f"{measure}-now")
    said = {
        (row[0], context.removesuffix(" tokens"), block): text
        for row in rows
        for context, text in zip(header[1:], row[1:], strict=True)
    }
    cells = {cell: shown(value) for cell, value in latest.items() if cell[2] == block}
    expect(
        cells == {cell: said[cell] for cell in said if said[cell][:1].isdigit()},
        f"{name}: {len(cells)} cells at {known[-1][:8]} as recorded",
    )

    phases = {
        commit: {cell[1]: v for cell, v in cells.items() if (cell[0], cell[2]) == (batch, block)}
        for commit, cells in values.items()
    }
    phases = {c: cells for c, cells in phases.items() if any(v.known for v in cells.values())}
    if len(phases) < 2:
        expect(not overhead.visible(f"#{measure}-phases"), f"{name}: no chart of a single commit")
        return
    count = collections.Counter(
        context for cells in phases.values() for context in cells if cells[context].known
    )
    contexts = sorted(count, key=int)
    header, *rows = overhead.table(f"{measure}-phases-table")
    said = [title.partition(" ±")[0] for title in header[1:]]
    expect(said == [f"{c} tokens" for c in contexts], f"{name}: contexts in order")
    expected = [
        [commit_label(commit), *(shown(cells.get(context, MISSING)) for context in contexts)]
        for commit, cells in reversed(phases.items())
    ]
    expect(
        rows == expected,
        f"{name}: {len(contexts)} contexts over {len(phases)} commits as recorded, newest first",
    )
    in_lines = sum(points for points in count.values() if points > 1)
    points = overhead.points(f"{measure}-phases")
    expect(points == in_lines, f"{name}: {in_lines} points drawn")


def prove_overhead_page(html_dir, machines):
    """Compare what the overhead page says in a browser with the results, and use it."""
    with browse(html_dir) as (page, address):
        overhead = OverheadPage(page)
        for machine in machines:
            for measure in MEASURES:
                prove_measure(overhead, f"{address}/overhead.html", machine, measure)

        stepped = [c for c in measured_commits(machines[0]) if STEP in load(machines[0], c)]
        where = {"machine": machines[0], "commit": stepped[-1][:8], "batch": 1, "block": 32}
        overhead.open(f"{address}/overhead.html", **where)
        page.goto(overhead.links("step-now")[0])
        page.wait_for_function(f"() => ({SERIES})()?.length", timeout=20000)
        expect(len(page.evaluate(SERIES)) == 1, "a number leads to its series alone")
        expect("overhead.html" in page.inner_html("#nav"), "asv's navigation leads to the page")

        overhead.open(f"file://{html_dir}/overhead.html", machine=machines[0])
        expect(overhead.points("attention-phases") > 0, "the page works as a mere file")


def prove_list(html_dir, machine):
    """Have asv's list show that a ratio and a rate doubled, and look at the colours."""
    doubled = {STEP: "positive-change", CAPACITY: "negative-change"}  # red, green

    def summary(route):
        rows = route.fetch().json()
        for row in rows:
            if row["name"] in doubled and row["last_value"]:
                row["prev_value"] = row["last_value"] / 2
                row["change_rev"] = [None, row["last_rev"]]
        route.fulfill(json=rows)

    with browse(html_dir) as (page, address):
        page.route("**/summary.json*", summary)
        OverheadPage(page).open(f"{address}/overhead.html", machine=machine)
        page.click("a:text-is('List')")
        page.wait_for_selector("#summarylist-body td.change a", timeout=20000)
        for name, colour in doubled.items():
            row = page.locator("#summarylist-body tr", has_text=name).filter(has_text="+100.0%")
            classes = row.first.locator("td.change").get_attribute("class")
            expect(colour in classes.split(), f"asv's list has a rise of {name} as {colour}")


def prove_comparison(machine):
    """Compare a commit with a slowed copy and with an identical one."""
    where = {"machine": machine, "backend": "cpu", "benchmarks": ATTENTION, "grid": "short"}
    base, again, slower = slowed(0), commit_of(f"{slowed(0)}^{{tree}}", "again"), slowed(100)
    # CI machines are noisy.
    noise = SimpleNamespace(threshold=lambda series: Threshold(1.4, "guess"))
    verdicts = [c.verdict(noise) for c in measure(base, slower, rounds=1, **where)]
    expect(verdicts == ["worsened"] * 4, "a commit slower by 100% is called slower in each cell")
    verdicts = [c.verdict(noise) for c in measure(base, again, rounds=1, **where)]
    expect(verdicts == ["unchanged"] * 4, "an identical commit is not")


def main():
    """Run everything in order."""
    check_history()
    machine = machine_name("cpu")
    record_machine(machine)
    head = git("rev-parse", "HEAD")
    old = first_commit_that_has("def append_block")
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
        expect(old_values[STEP][CELL].known, "the step was taken at the old commit")

        shutil.copytree(RESULTS / STEPLESS, results / STEPLESS)
        expect(asv("publish", config=config) == 0, "asv publish")
        series = look(html, machine)
        drawn = {round(y, 4) for points in series.values() for _, y in points}
        values = (old_values[STEP][CELL], new_values[STEP])
        steps = {round(value.value, 4) for value in values}
        expect(drawn == steps, f"asv draws the measured steps {sorted(steps)}, offline")
        with browse(html) as (page, address):
            overhead, url = OverheadPage(page), f"{address}/overhead.html"
            overhead.open(url)
            expect(page.input_value("#machine") == machine, "the page opens on the last measured")
            for measure in MEASURES:
                prove_measure(overhead, url, machine, measure, results)
                prove_measure(overhead, url, STEPLESS, measure, results)

        recorded = [name for name in RECORDED if recorded_commits(name)]
        config = derive_config("prove", html_dir=str(html))
        discover(machine, config)
        expect(asv("publish", config=config) == 0, "asv publish of the recorded results")
        prove_overhead_page(html, recorded)
        prove_list(html, "h100")
    prove_comparison(machine)


if __name__ == "__main__":
    main()
