"""Tables of recorded results: for the terminal, as CSV, and between the markers of the documents.

A marker in a Markdown file looks like `<!-- results: NAME key=value … -->` and everything up to the
next `<!-- end results -->` is what this module writes there.
"""

import argparse
import functools
import itertools
import re
import statistics
import sys

from asv.util import UserError

from benchmarks.common import PARAM_NAMES
from tracking.files import write_text
from tracking.noise import thresholds
from tracking.project import machine_name
from tracking.repository import ROOT, commit_label, commit_labels
from tracking.results import (
    MISSING,
    NAMES,
    RESULTS,
    load,
    measured_commits,
    over,
    recorded,
    recorded_commits,
    recorded_environment,
)
from tracking.tables import (
    ADR,
    COLUMNS,
    FORMATS,
    LAYOUTS,
    as_markdown,
    by_cell,
    by_number,
    headline,
    percent,
    read_csv,
)

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DIGITS = {"track_tokens": 0, "track_instructions": 0, "track_error": 4}  # others: 2
MARKER = re.compile(
    r"(<!-- results: (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end results -->)", re.DOTALL
)


def mark_adr_table(machine, commit):
    """Write the ADR's table of one machine at one commit."""
    return as_markdown(*by_cell(recorded(machine, commit), ADR))


def mark_headline(machine, benchmark):
    """Write the table of a headline."""
    commits, environment = recorded_commits(machine), recorded_environment(machine)
    return as_markdown(*headline(machine, commits, benchmark, environment))


def mark_series(machine, benchmark, commits=None, params=None, unit="ms"):
    """Write the cells of one benchmark, times in ms or us, at `commits` or all that have any."""
    tables = {
        commit: recorded(machine, commit).get(benchmark, {})
        for commit in (commits.split(",") if commits else recorded_commits(machine))
    }
    if not commits:
        tables = {c: t for c, t in tables.items() if any(value.known for value in t.values())}
    params = params.split(",") if params else PARAM_NAMES
    factor = {"ms": 1e3, "us": 1e6}[unit] if ".time_" in benchmark else 1
    digits = DIGITS.get(benchmark.rpartition(".")[2], 2)

    def row(cell):
        found = [table.get(cell, MISSING) for table in tables.values()]
        shown = [value.show(factor, digits, interval=True) for value in found]
        return [*(param.strip("'") for param in cell), *shown]

    rows = [
        row(cell)
        for cell in sorted({*itertools.chain(*tables.values())}, key=by_number)
        if any(table.get(cell, MISSING).known for table in tables.values())
    ]
    return as_markdown([*params, *commit_labels(tables).values()], rows)


def mark_tracks(machine, kind):
    """Write the numbers of a class without parameters, a line each; `kind` ends in a dot."""
    tables = {commit: recorded(machine, commit) for commit in recorded_commits(machine)}
    names = sorted({name for table in tables.values() for name in table if name.startswith(kind)})
    tables = {
        commit: table
        for commit, table in tables.items()
        if any(table.get(name, {}).get((), MISSING).known for name in names)
    }
    rows = [
        [
            name.removeprefix(f"{kind}track_").replace("_", " "),
            *(table.get(name, {}).get((), MISSING).show() for table in tables.values()),
        ]
        for name in names
    ]
    return as_markdown(["", *commit_labels(tables).values()], rows)


def mark_layouts(machine, commit):
    """Write in words how the layouts compare on gather-then-SDPA, from paired ratios."""
    table = recorded(machine, commit)
    a, b = (table[f"overhead.Gather{layout}.ratio_vs_contiguous"] for layout in LAYOUTS.values())
    lines = []
    for batch, (layout, ratios) in itertools.product(("1", "4"), (("A", a), ("B", b))):
        known = [ratio.value for cell, ratio in ratios.items() if cell[0] == batch and ratio.known]
        lines.append(
            f"- batch {batch}, layout {layout}: {percent(min(known))} to {percent(max(known))} "
            f"over contiguous, median {percent(statistics.median(known))} of {len(known)} cells"
        )
    both = [over(a[cell].value, b[cell].value) for cell in a if a[cell].known and b[cell].known]
    lines.append(
        f"- time of A over time of B: median {statistics.median(both):.2f}, "
        f"{min(both):.2f} to {max(both):.2f} over {len(both)} cells"
    )
    return "\n".join(lines) + "\n"


def mark_pattern(machine, commit):
    """Write the ratio of a random block order over the reversed one."""
    [(cell, ratio)] = recorded(machine, commit)[
        "settled.BlockOrder.ratio_random_vs_reversed"
    ].items()
    batch, context, block_size = cell
    where = f"batch {batch}, {context} tokens, block {block_size}"
    return f"{where}: {ratio.show(interval=True)}\n"


def mark_watermark(machine, commit):
    """Write tokens and steps of the watermark's traces over those without one, in percent."""
    table = recorded(machine, commit)
    tokens = table["settled.WatermarkTokens.track_tokens"]
    steps = table["settled.WatermarkSteps.track_steps"]
    marks = [mark for mark in sorted({int(cell[3]) for cell in tokens}) if mark]

    def more(values, trace, mark):
        return percent(over(values[(*trace, str(mark))].value, values[(*trace, "0")].value))

    rows = [
        [*trace, *(f"{more(tokens, trace, m)}, {more(steps, trace, m)}" for m in marks)]
        for trace in sorted({cell[:3] for cell in tokens}, key=lambda trace: [*map(int, trace)])
    ]
    header = ["prompt", "new", "blocks", *("half of running" if m < 0 else str(m) for m in marks)]
    return as_markdown(header, rows)


def mark_noise(machine):
    """Write the thresholds of a machine's series."""
    return as_markdown(*thresholds(machine))


def mark_csv(name, machine):
    """Write what `make detect` or `make week` recorded."""
    return as_markdown(*read_csv(RESULTS / machine / name))


def mark_quality(machine):
    """Write what `make quality` recorded of a machine, perplexity with percent over 16 bits."""
    _, rows = read_csv(RESULTS / "quality.csv")
    rows = [row[1:] for row in rows if row[0] == machine]
    cells = {
        (text, name, measure): f"{value} ({over})"
        if "perplexity" in measure and name != "16"
        else value
        for text, name, measure, value, over in rows
    }
    measures = list(dict.fromkeys(measure for _, _, measure, *_ in rows))
    formats = dict.fromkeys((text, name) for text, name, *_ in rows)
    table = [[*key, *(cells.get((*key, one), "not asked") for one in measures)] for key in formats]
    return as_markdown(["text", "format", *measures], table)


MARKS = {
    "adr-table": mark_adr_table,
    "headline": mark_headline,
    "series": mark_series,
    "tracks": mark_tracks,
    "layouts": mark_layouts,
    "pattern": mark_pattern,
    "watermark": mark_watermark,
    "noise": mark_noise,
    "detection": functools.partial(mark_csv, "detection.csv"),
    "week": functools.partial(mark_csv, "week.csv"),
    "quality": mark_quality,
}


def fill(text):
    """Return a document's text with every marker's content written anew."""

    def write(match):
        begin, name, arguments, end = match.groups()
        return begin + MARKS[name](**dict(a.split("=", 1) for a in arguments.split())) + end

    return MARKER.sub(write, text)


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.documents", description=__doc__)
    parser.add_argument("what", choices=["table", "headline", "documents"])
    parser.add_argument("--machine", help="name in results/ (default: this host's)")
    parser.add_argument("--backend", default="cpu", help="part of this host's name")
    parser.add_argument("--commit", help="(default: the newest that has a number in the table)")
    parser.add_argument(
        "--columns", choices=COLUMNS, default="users", help="(default: %(default)s)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_args()
    try:
        return write_documents() if args.what == "documents" else show(args)
    except (UserError, ValueError, OSError) as error:
        sys.exit(str(error))


def write_documents():
    """Write recorded results into the documents, all or none."""
    texts = {path: fill(path.read_text()) for path in DOCUMENTS}
    for path, text in texts.items():
        write_text(path, text)
    return 0


def show(args):
    """Print a machine's tables."""
    machine = args.machine or machine_name(args.backend)
    commits = measured_commits(machine)
    if not commits:
        sys.exit(f"nothing measured on machine {machine} in {RESULTS}: run `make bench`")
    table_of = FORMATS[args.format]
    if args.what == "headline":
        for benchmark, name in NAMES.items():
            header, rows = headline(machine, commits, benchmark)
            if rows:
                print(f"{name}, machine {machine}, blocks of 32 tokens\n{table_of(header, rows)}")
            else:
                print(f"{name} was not measured on {machine}\n")
    else:
        print_table(machine, commits, args.commit, args.columns, table_of)
    return 0


def print_table(machine, commits, chosen, columns, table_of):
    """Print the table by cell of a commit, of the newest with a number in it if none is chosen."""
    for commit in [chosen] if chosen else reversed(commits):
        header, rows = by_cell(load(machine, commit), COLUMNS[columns])
        if rows:
            print(f"machine {machine}, {commit_label(commit)}", file=sys.stderr)
            print(table_of(header, rows), end="")
            return
    titles = ", ".join(column.title for column in COLUMNS[columns] if column.benchmarks)
    where = commit_label(chosen) if chosen else "any commit"
    other = " or ".join(f"--columns {name}" for name in COLUMNS if name != columns)
    sys.exit(f"machine {machine} has no number at {where} of {titles}; there is {other}")


if __name__ == "__main__":
    sys.exit(main())
