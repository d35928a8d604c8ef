"""Tables of results, as text, CSV and Markdown."""

import csv
import io
import re
from dataclasses import dataclass

from benchmarks.generate import BLOCK_SIZE
from pagedkv import blocks_needed
from tracking.files import write_text
from tracking.repository import commit_labels, phase_commits
from tracking.results import ATTENTION, BOUND, FIRST, MISSING, NAMES, STEP, TOKENS, tables

LAYOUTS = {"A": "BlockMajor", "B": "HeadMajor"}


def by_number(cell):
    """Return a sort key: cells by the numbers in their names, words last."""
    return [(0, int(x), "") if x.lstrip("-").isdigit() else (1, 0, x) for x in cell]


def fragmentation(context, block_size):
    """Percent of the slots in a sequence's blocks that hold no token."""
    slots = blocks_needed(context, block_size) * block_size
    return 100 * (slots - context) / slots if slots else 0


@dataclass(frozen=True)
class Column:
    """A column of a table by cell; the first of some benchmarks that has the cell is shown."""

    title: str
    benchmarks: tuple  # of names
    unit: str = "ratio"  # or "ms", "percent" above 1, "fragmentation" of the cell itself

    def value(self, table, cell):
        """Return the Value of a cell, MISSING if no benchmark has it."""
        found = (cells_of(table, name).get(cell) for name in self.benchmarks)
        return next((value for value in found if value), MISSING)

    def show(self, table, cell):
        """Return the text of a cell."""
        if self.unit == "fragmentation":
            return f"{fragmentation(*map(int, cell[1:])):.1f}"
        value = self.value(table, cell)
        if self.unit == "percent" and value.known:
            return f"{100 * (value.value - 1):.0f}"
        return value.show(1000 if self.unit == "ms" else 1)


def cells_of(table, benchmark):
    """Return {(batch, context, block size): Value} of a benchmark.

    Whole models, whose parameters are sequences and context, or the tokens of one prompt, have
    blocks of one size.
    """
    cells = table.get(benchmark, {})
    if benchmark == FIRST:
        cells = {("1", *cell): x for cell, x in cells.items()}
    return {(*cell, str(BLOCK_SIZE))[:3]: x for cell, x in cells.items()}


USERS = [
    Column(NAMES[FIRST], (FIRST,)),
    Column(NAMES[TOKENS], (TOKENS,)),
    Column(NAMES[STEP], (STEP, "step.Batch16.ratio_step_vs_contiguous")),
    Column(NAMES[BOUND], (BOUND, "step.BoundBatch16.ratio_step_vs_bound")),
    Column(NAMES[ATTENTION], (ATTENTION, "overhead.Batch16.ratio_vs_contiguous")),
]
"""What users get, in the order in which they notice it."""

ADR = [
    Column("frag %", (), "fragmentation"),
    Column("contiguous ms", ("decode.Contiguous.time_decode",), "ms"),
    *(
        Column(title.format(layout), (benchmark.format(name),), unit)
        for title, benchmark, unit in (
            ("gather {} ms", "decode.GatherOnly{}.time_gather", "ms"),
            ("gather+SDPA {} ms", "decode.Gather{}.time_decode", "ms"),
            ("append {} ms", "append.Naive{}.time_append", "ms"),
            ("overhead {} %", "overhead.Gather{}.ratio_vs_contiguous", "percent"),
        )
        for layout, name in LAYOUTS.items()
    ),
]
"""What ADR 0001 decided on: the paths of phase 0."""

COLUMNS = {"users": USERS, "adr": ADR}


def by_cell(table, columns):
    """Return (header, rows): every cell that has a number in at least one of some columns."""
    cells = {
        cell for column in columns for name in column.benchmarks for cell in cells_of(table, name)
    }
    rows = [
        [*cell, *(column.show(table, cell) for column in columns)]
        for cell in sorted(cells, key=by_number)
        if any(column.value(table, cell).known for column in columns)
    ]
    return ["batch", "context", "block", *(column.title for column in columns)], rows


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
    """Return (header, rows) of a table that `write_csv` wrote."""
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    return header, rows


def write_csv(file, header, rows):
    """Write a small table of results, and print it."""
    write_text(file, as_csv(header, rows))
    print(as_markdown(header, [[str(value) for value in row] for row in rows]), end="")
