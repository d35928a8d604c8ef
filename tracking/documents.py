"""Tables of recorded results: for the terminal, as CSV, and between the markers of the documents.

A marker in a Markdown file looks like `<!-- results: NAME key=value … -->`. This module writes what
follows, up to the next `<!-- end results -->`.
"""

import argparse
import functools
import itertools
import re
import sys

from asv.util import UserError

from benchmarks.common import PARAM_NAMES
from tracking.files import write_text
from tracking.project import machine_name
from tracking.repository import ROOT, commit_label, commit_labels
from tracking.results import (
    MISSING,
    NAMES,
    RESULTS,
    default_machine,
    load,
    machines,
    measured_commits,
    recorded,
    recorded_commits,
    recorded_environment,
    tables,
)
from tracking.tables import FORMATS, as_markdown, by_cell, by_number, read_csv

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DIGITS = {"track_tokens": 0, "track_instructions": 0, "track_error": 4}  # others: 2
MARKER = re.compile(
    r"(<!-- results: (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end results -->)", re.DOTALL
)


def recorded_tables(machine):
    """Return {commit: table} of a machine's results in git, each benchmark of one version."""
    environment = recorded_environment(machine)
    return tables(machine, recorded_commits(machine), environment=environment)


def mark_series(machine, benchmark, commits=None, params=None, unit="ms"):
    """Write the cells of one benchmark, times in ms or us, by commit.

    The default is every commit that has a number of the benchmark's last version. Named commits are
    shown as they were measured, whichever version that was.
    """
    if commits:
        found = {c: recorded(machine, c).get(benchmark, {}) for c in commits.split(",")}
    else:
        found = {c: t.get(benchmark, {}) for c, t in recorded_tables(machine).items()}
        found = {c: cells for c, cells in found.items() if any(x.known for x in cells.values())}
    params = params.split(",") if params else PARAM_NAMES
    factor = {"ms": 1e3, "us": 1e6}[unit] if ".time_" in benchmark else 1
    digits = DIGITS.get(benchmark.rpartition(".")[2], 2)
    rows = []
    for cell in sorted({*itertools.chain(*found.values())}, key=by_number):
        values = [cells.get(cell, MISSING) for cells in found.values()]
        if any(value.known for value in values):
            shown = [value.show(factor, digits, interval=True) for value in values]
            rows.append([*(param.strip("'") for param in cell), *shown])
    return as_markdown([*params, *commit_labels(found).values()], rows)


def mark_tracks(machine, kind):
    """Write the numbers of a class without parameters, a line each; `kind` ends in a dot."""
    found = {
        commit: {n: cells[()] for n, cells in table.items() if n.startswith(kind) and () in cells}
        for commit, table in recorded_tables(machine).items()
    }
    found = {c: values for c, values in found.items() if any(x.known for x in values.values())}
    rows = [
        [
            name.removeprefix(f"{kind}track_").replace("_", " "),
            *(values.get(name, MISSING).show() for values in found.values()),
        ]
        for name in sorted({*itertools.chain(*found.values())})
    ]
    return as_markdown(["", *commit_labels(found).values()], rows)


def mark_csv(name, machine):
    """Write a table of measurements that are no benchmarks, recorded beside the machine's."""
    return as_markdown(*read_csv(RESULTS / machine / name))


def mark_quality(machine):
    """Write what `make quality` recorded of a machine, perplexity with percent over 16 bits."""
    found, measures = {}, {}
    for of, text, name, measure, value, over in read_csv(RESULTS / "quality.csv")[1]:
        if of == machine:
            more = f" ({over})" if "perplexity" in measure and name != "16" else ""
            found.setdefault((text, name), {})[measure] = value + more
            measures[measure] = None
    rows = [[*key, *(of.get(one, "not asked") for one in measures)] for key, of in found.items()]
    return as_markdown(["text", "format", *measures], rows)


MARKS = {
    "series": mark_series,
    "tracks": mark_tracks,
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


def write_documents():
    """Write recorded results into the documents, all or none."""
    texts = {path: fill(path.read_text()) for path in DOCUMENTS}
    for path, text in texts.items():
        write_text(path, text)


def print_table(machine, commit, table_of):
    """Print what users get by cell, at a commit or the newest that has a number in the table."""
    for one in [commit] if commit else reversed(measured_commits(machine)):
        header, rows = by_cell(load(machine, one))
        if rows:
            print(f"machine {machine}, {commit_label(one)}", file=sys.stderr)
            print(table_of(header, rows), end="")
            return
    titles = ", ".join(NAMES.values())
    where = commit_label(commit) if commit else "any commit"
    sys.exit(f"machine {machine} has no number at {where} of {titles}")


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.documents", description=__doc__)
    parser.add_argument("what", choices=["table", "documents"])
    parser.add_argument(
        "--machine", help="name in results/ (default: the one that the page opens with)"
    )
    parser.add_argument("--here", action="store_true", help="by default the machine of this host")
    parser.add_argument("--backend", default="cpu", help="part of this host's name")
    parser.add_argument("--commit", help="(default: the newest that has a number in the table)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_args()
    try:
        if args.what == "documents":
            return write_documents()
        machine, recorded = args.machine, ", ".join(machines())
        if not machine and not args.here and (default := default_machine()):
            machine = default[0]
            print(f"MACHINE=name chooses another of {recorded}", file=sys.stderr)
        machine = machine or machine_name(args.backend)
        if not measured_commits(machine):
            sys.exit(f"nothing measured on machine {machine}, but on {recorded}: run `make bench`")
        return print_table(machine, args.commit, FORMATS[args.format])
    except (UserError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
