"""Tables of results, as text, CSV and Markdown."""

import csv
import io
import re

from benchmarks.generate import BLOCK_SIZE
from tracking.repository import commit_labels, phase_commits
from tracking.results import ATTENTION, BOUND, FIRST, MISSING, NAMES, STEP, tables

# The benchmarks of 16 sequences, whose cells a table shows beside those of the headlines.
BATCH_16 = {
    STEP: "step.Batch16.ratio_step_vs_contiguous",
    BOUND: "step.BoundBatch16.ratio_step_vs_bound",
    ATTENTION: "overhead.Batch16.ratio_vs_contiguous",
}


def by_number(cell):
    """Return a sort key: cells by the numbers in their names, words last."""
    return [(0, int(x), "") if x.lstrip("-").isdigit() else (1, 0, x) for x in cell]


def cells_of(table, benchmark):
    """Return {(batch, context, block size): Value} of a benchmark.

    Whole models, whose parameters are sequences and context, or the tokens of one prompt, have
    blocks of one size.
    """
    cells = table.get(benchmark, {})
    if benchmark == FIRST:
        cells = {("1", *cell): x for cell, x in cells.items()}
    return {(*cell, str(BLOCK_SIZE))[:3]: x for cell, x in cells.items()}


def by_cell(table):
    """Return (header, rows) of what users get: the cells that have a number in any column."""
    columns = [cells_of(table, BATCH_16.get(name, name)) | cells_of(table, name) for name in NAMES]
    known = {cell for cells in columns for cell, value in cells.items() if value.known}
    rows = [
        [*cell, *(cells.get(cell, MISSING).show() for cells in columns)]
        for cell in sorted(known, key=by_number)
    ]
    return ["batch", "context", "block", *NAMES.values()], rows


def headline(machine, commits, benchmark, environment=None):
    """Return (header, rows): one of the headlines at phase commits and the last that has it.

    Columns are the cells with a number, of those by block size the ones of 32; rows carry 99%
    confidence intervals.
    """
    of_commits = tables(machine, commits, environment=environment)
    found = {
        commit: {cell: x for cell, x in cells_of(table, benchmark).items() if cell[2] == "32"}
        for commit, table in of_commits.items()
    }
    found = {c: cells for c, cells in found.items() if any(x.known for x in cells.values())}
    shown = {*phase_commits(), *list(found)[-1:]}
    found = {commit: cells for commit, cells in found.items() if commit in shown}
    known = {cell for cells in found.values() for cell, x in cells.items() if x.known}
    known = sorted(known, key=by_number)
    labels = commit_labels(found)
    rows = [
        [labels[commit], *(cells.get(cell, MISSING).show(interval=True) for cell in known)]
        for commit, cells in found.items()
    ]
    return ["commit", *(f"batch {batch}, {_short(int(c))}" for batch, c, _ in known)], rows


def _short(tokens):
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def as_text(header, rows):
    """Align columns to the right for a terminal."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in table]
    return "\n".join("  ".join(line) for line in lines) + "\n"


def as_csv(header, rows):
    """Return comma-separated values."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def as_markdown(header, rows):
    """Return a Markdown table, numbers to the right; a cell is one line, also with bars in it."""

    def cell(text):
        bars = re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\|", text)
        return re.sub(r"\s", " ", bars)

    lines = [header, ["--:"] * len(header), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


FORMATS = {"text": as_text, "csv": as_csv, "markdown": as_markdown}


def code(text):
    """Return text as Markdown's code, in more backticks than stand together in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{fence}{space}{text}{space}{fence}"


def read_csv(file):
    """Return (header, rows) of a table in CSV."""
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    return header, rows
