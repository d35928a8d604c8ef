"""Prove the main job in small: asv over HEAD and an old commit, published, seen in a browser.

Run by `make prove`. Results go to a temporary directory, one sample of the smallest cell.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import OverheadPage, browse

import tracking.results as read
from tracking.changes import measure
from tracking.noise import Threshold
from tracking.project import asv, derive_config, discover, machine_name, record_machine
from tracking.repository import check_history, commit_label, commit_of, git
from tracking.tables import cells_of

CELL = ("1", "1024", "32")
MEASURES = dict(zip(("first", "tokens", "step", "bound", "attention"), read.NAMES, strict=True))
# What a slowed commit adds to its package.
SLOWER = """
import time
import mlx.core as mx
_fast = decode_attention

def decode_attention(*args, **kwargs):
    start = time.perf_counter()
    out = _fast(*args, **kwargs)
    mx.eval(out)
    time.sleep({share} * (time.perf_counter() - start))
    return out
"""
# Points of every series that flot has drawn into asv's graph, once it has.
SERIES = """() => {
  const plot = window.jQuery && jQuery('#main-graph').data('plot');
  return plot && plot.getData().map(series => series.data.filter(p => p && p[1] !== null));
}"""


def expect(condition, message):
    """Stop unless `condition` holds."""
    if not condition:
        sys.exit(f"not proven: {message}")
    print(f"proven: {message}", flush=True)


def prove_measure(overhead, url, machine, name, results=read.RESULTS):
    """Compare the history of a measure on a machine with the results."""
    commits = read.measured_commits(machine, results)
    tables = read.tables(machine, commits, results)
    tables = {commit: cells_of(table, MEASURES[name]) for commit, table in tables.items()}
    known = {c for table in tables.values() for c, value in table.items() if value.known}
    if not known:
        return
    batch, _, block = min(known)
    overhead.open(url, machine=machine, measure=name, batch=batch, block=block)
    contexts = sorted({c[1] for c in known if (c[0], c[2]) == (batch, block)}, key=int)
    header, *rows = overhead.table("phases-table")
    expected = []
    for commit in git("log", "--format=%H").split():
        values = [tables.get(commit, {}).get((batch, c, block), read.MISSING) for c in contexts]
        if any(value.known for value in values):
            label = commit_label(commit).split(" (")[0]
            expected.append([label, *(value.show(interval=True) for value in values)])
    shown = [[row[0], *(x.removesuffix(" host-bound") for x in row[2:-1])] for row in rows]
    right = shown == expected and [title.split()[0] for title in header[2:-1]] == contexts
    expect(right, f"{machine}, {name}: {len(rows)} commits as recorded, newest first")
    points = sum(text[0].isdigit() for row in expected for text in row[1:]) * (len(rows) > 1)
    expect(overhead.points("phases") == points, f"{machine}, {name}: {points} points drawn")


def prove_page(html, machines, results=read.RESULTS):
    """Compare the page with the results; return what asv draws where a step's number leads."""
    with browse(html) as (tab, address):
        overhead = OverheadPage(tab)
        for machine in machines:
            for name in MEASURES:
                prove_measure(overhead, f"{address}/overhead.html", machine, name, results)
        overhead.open(f"{address}/overhead.html", machine=machines[0], measure="step")
        tab.click("#phases-table td a")
        tab.wait_for_function(f"() => ({SERIES})()?.some(s => s.length)", timeout=20000)
        series = [[value for _, value in points] for points in tab.evaluate(SERIES)]
        expect(len(series) == 1, "a number leads to its series alone, on asv's page, offline")
        overhead.open(f"file://{html}/overhead.html", machine=machines[0], measure="attention")
        expect(overhead.points("phases") > 0, "the page works as a mere file")
    return series[0]


def slowed(share, scratch):
    """Return the hash of a commit, on no branch, whose decode_attention takes longer by a share."""
    path, index = "pagedkv/__init__.py", {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
    source = git("show", f"HEAD:{path}") + SLOWER.format(share=share)
    blob = git("hash-object", "-w", "--stdin", text=source)
    git("read-tree", "HEAD", env=index)
    git("update-index", "--cacheinfo", f"100644,{blob},{path}", env=index)
    return commit_of(git("write-tree", env=index), f"HEAD, decode_attention slower by {share}")


def prove_comparison(machine):
    """Compare a commit with a slowed copy and with an identical one."""
    where = {"machine": machine, "backend": "cpu", "benchmarks": read.ATTENTION, "grid": "short"}
    with tempfile.TemporaryDirectory() as scratch:
        base, slower = slowed(0, scratch), slowed(1, scratch)
    again = commit_of(f"{base}^{{tree}}", "again")
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
    # The first commit whose package has blocks that grow.
    old = git("log", "--reverse", "--format=%H", "-Sdef append_block", "--", "pagedkv").split()[0]
    expect(asv("check") == 0, "asv check")
    with tempfile.TemporaryDirectory() as scratch:
        results, html = Path(scratch, "results"), Path(scratch, "html")
        config = derive_config("prove", results_dir=str(results), html_dir=str(html))
        for commit in (old, head):
            cell = rf"\({', '.join(CELL)}\)$"
            options = ["--machine", machine, "--quick", "--show-stderr", "-b", cell, f"{commit}^!"]
            expect(asv("run", *options, config=config) == 0, f"asv run at {commit[:8]} exits 0")
        new = {name: cells[CELL] for name, cells in read.load(machine, head, results).items()}
        without = {name.split(".")[1] for name, value in new.items() if not value.known}
        expect(len(new) > 10 and without <= {"Fused"}, f"{len(new)} benchmarks run at HEAD")
        before = read.load(machine, old, results)
        lacked = before["overhead.GatherRows.ratio_vs_contiguous"][CELL]
        expect(lacked.show() == "lacks", "a path the old commit lacks has a reason for no number")
        expect(asv("publish", config=config) == 0, "asv publish")
        shown = [round(value, 4) for value in prove_page(html, [machine], results)]
        steps = [round(value.value, 4) for value in (before[read.STEP][CELL], new[read.STEP])]
        expect(shown == steps, f"asv draws the measured steps {steps}, offline")
        config = derive_config("prove", html_dir=str(html))
        discover(machine, config)
        expect(asv("publish", config=config) == 0, "asv publish of the recorded results")
        prove_page(html, ["h200", "linux-2core-xeon", "h100"])
    prove_comparison(machine)


if __name__ == "__main__":
    main()
