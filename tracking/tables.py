"""Tables of results, as text, CSV and Markdown."""

import csv
import io
import re

from benchmarks.generate import BLOCK_SIZE
from tracking.results import ATTENTION, BOUND, FIRST, MISSING, NAMES, STEP

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
    """Return a Markdown table, numbers to the right."""
    lines = [header, ["--:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


FORMATS = {"text": as_text, "csv": as_csv, "markdown": as_markdown}


def code(text):
    """Return text as Markdown code for one cell of a table; bars and backticks become spaces."""
    text = re.sub(r"[`|\s]", " ", text)
    return f"`{text}`"


def read_csv(file):
    """Return (header, rows) of a table in CSV."""
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    return header, rows
