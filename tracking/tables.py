"""Tables of results, as text, CSV and Markdown."""

import csv
import io
import re

from pagedkv import blocks_needed
from tracking.repository import commit_labels, phase_commits
from tracking.results import MISSING, Value, load

LAYOUTS = {"A": "BlockMajor", "B": "HeadMajor"}


def fragmentation(context, block_size):
    """Percent of the slots in a sequence's blocks that hold no token."""
    slots = blocks_needed(context, block_size) * block_size
    return 100 * (slots - context) / slots


def percent_over(ratio):
    """Return a Value of a ratio as percent above 1."""
    if not ratio.known:
        return ratio
    return Value(*(100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high)))


def percent(ratio):
    """Return a ratio as a signed percentage of its excess over 1."""
    return f"{100 * (ratio - 1):+.0f}%"


ADR_COLUMNS = [
    "batch",
    "ctx",
    "block",
    "frag %",
    "contiguous ms",
    *(f"gather {layout} ms" for layout in LAYOUTS),
    *(f"gather+SDPA {layout} ms" for layout in LAYOUTS),
    *(f"append {layout} ms" for layout in LAYOUTS),
    *(f"overhead {layout} %" for layout in LAYOUTS),
]


def adr_entries(table):
    """Return the rows under ADR_COLUMNS of every cell with at least one number.

    A row is (cell, entries), an entry (text, name of the benchmark or None).
    """
    rows = []
    contiguous = table.get("decode.Contiguous.time_decode", {})
    for cell in sorted(contiguous, key=lambda cell: [int(x) for x in cell]):
        context, block_size = int(cell[1]), int(cell[2])

        def column(pattern, cell=cell):
            names = [pattern.format(layout) for layout in LAYOUTS.values()]
            return [(name, table.get(name, {}).get(cell, MISSING)) for name in names]

        times = [
            ("decode.Contiguous.time_decode", contiguous[cell]),
            *column("decode.GatherOnly{}.time_gather"),
            *column("decode.Gather{}.time_decode"),
            *column("append.Naive{}.time_append"),
        ]
        overheads = column("overhead.Gather{}.ratio_vs_contiguous")
        if any(value.known for _, value in [*times, *overheads]):
            entries = [(text, None) for text in cell]
            entries.append((f"{fragmentation(context, block_size):.1f}", None))
            entries += [(value.show(1000), name) for name, value in times]
            entries += [(percent_over(value).show(digits=0), name) for name, value in overheads]
            rows.append((cell, entries))
    return rows


def adr_rows(table):
    """Return the rows of `adr_entries` as text."""
    return [[text for text, _ in entries] for _, entries in adr_entries(table)]


def headline(machine, commits, benchmark, environment=None):
    """Return (header, rows): one of the headlines at phase commits and the last that has it.

    Columns are the cells with a number, of those by block size the ones of 32; rows carry 99%
    confidence intervals.
    """
    tables = {
        commit: load(machine, commit, environment=environment).get(benchmark, {})
        for commit in commits
    }
    tables = {c: t for c, t in tables.items() if any(value.known for value in t.values())}
    shown = {*phase_commits(), *list(tables)[-1:]}
    tables = {commit: table for commit, table in tables.items() if commit in shown}
    cells = {cell for table in tables.values() for cell, value in table.items() if value.known}
    cells = sorted((c for c in cells if c[2:] in ((), ("32",))), key=lambda c: [int(x) for x in c])
    header = ["commit", *(f"batch {b}, {_short(int(context))}" for b, context, *_ in cells)]
    labels = commit_labels(tables)
    rows = [
        [labels[commit]] + [table.get(cell, MISSING).show(interval=True) for cell in cells]
        for commit, table in tables.items()
    ]
    return header, rows


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


def code(text):
    """Return text as Markdown's code, in more backticks than stand together in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{fence}{space}{text}{space}{fence}"


def as_markdown(header, rows):
    """Return a Markdown table, numbers to the right; a cell is one line, also with bars in it."""

    def cell(text):
        bars = re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\|", text)
        return re.sub(r"\s", " ", bars)

    rows = [[cell(text) for text in row] for row in rows]
    lines = [header, ["--:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


FORMATS = {"text": as_text, "csv": as_csv, "markdown": as_markdown}


def write_csv(file, header, rows):
    """Write a small table of results, and print it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([header, *rows])
    print(as_markdown(header, [[str(value) for value in row] for row in rows]), end="")
