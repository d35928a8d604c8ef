"""Tables of recorded results: for the terminal, as CSV, and between the markers of the documents.

A marker in a Markdown file looks like `<!-- results: NAME key=value … -->` and everything up to the
next `<!-- end results -->` is what this module writes there.
"""

import argparse
import collections
import csv
import functools
import io
import itertools
import math
import re
import statistics
import sys
from dataclasses import dataclass

from asv.results import iter_results_for_machine

from benchmarks._workload import PARAM_NAMES
from pagedkv import blocks_needed
from tracking.history import ROOT, asv_settings, git, machine_name, phase_commits

RESULTS = ROOT / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(
    r"(<!-- results: (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end results -->)", re.DOTALL
)

HEADLINE = "overhead.Auto.ratio_vs_contiguous"
LAYOUTS = {"A": "BlockMajor", "B": "HeadMajor"}


@dataclass(frozen=True)
class Value:
    """A result with its 99% confidence interval; seconds or a ratio.

    `value` is None where the benchmark failed and NaN where it is not applicable.
    """

    value: float | None
    low: float = math.nan
    high: float = math.nan

    def show(self, factor=1.0, digits=2, interval=False):
        """Return the value times `factor` as text, `n/a` or `failed`."""
        if self.value is None:
            return "failed"
        if math.isnan(self.value):
            return "n/a"
        text = f"{self.value * factor:.{digits}f}"
        if interval and math.isfinite(self.low) and math.isfinite(self.high):
            text += f" [{self.low * factor:.{digits}f}, {self.high * factor:.{digits}f}]"
        return text

    @property
    def known(self):
        """Whether there is a number."""
        return self.value is not None and not math.isnan(self.value)


MISSING = Value(math.nan)


def environments(machine, results=RESULTS):
    """Return asv's names of the environments (MLX versions) that a machine measured in."""
    return sorted({result.env_name for result in iter_results_for_machine(str(results), machine)})


def usual_environment(machine, results=RESULTS):
    """Return the environment that a machine's tables are about, None if it measured nothing.

    That is one of the MLX in asv.conf.json if there is any; then the one of most commits; then
    the last measured. A table never mixes environments.
    """
    return _usual(iter_results_for_machine(str(results), machine))


def _usual(results):
    pinned, found = asv_settings()["matrix"]["req"]["mlx"], collections.defaultdict(list)
    for result in results:
        found[result.params.get("mlx") in pinned, result.env_name].append(result)

    def rank(key):
        is_pinned, _ = key
        return is_pinned, len(found[key]), max(max(r.started_at.values()) for r in found[key])

    return max(found, key=rank)[1] if found else None


def load(machine, commit, results=RESULTS, environment=None):
    """Return {benchmark name: {parameters: Value}} of one machine at one commit.

    In the machine's usual environment unless one is named.
    """
    environment = environment or usual_environment(machine, results)
    found = [
        result
        for result in iter_results_for_machine(str(results), machine)
        if result.commit_hash.startswith(commit) and result.env_name == environment
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected results of one commit, got {len(found)} of {commit} of machine {machine} "
            f"in environment {environment} in {results}"
        )
    [result] = found
    table = {}
    for name in result.get_all_result_keys():
        params = result.get_result_params(name)
        values = result.get_result_value(name, params)
        stats = result.get_result_stats(name, params)
        table[name] = {
            cell: Value(value, stat["ci_99_a"], stat["ci_99_b"]) if stat else Value(value)
            for cell, value, stat in zip(itertools.product(*params), values, stats, strict=True)
        }
    return table


def measured_commits(machine, results=RESULTS, environment=None):
    """Return the hashes of a machine's measured commits that this clone has, oldest first.

    In the machine's usual environment unless one is named.
    """
    environment = environment or usual_environment(machine, results)
    known = git("log", "--reverse", "--format=%H").split()
    measured = {
        result.commit_hash
        for result in iter_results_for_machine(str(results), machine)
        if result.env_name == environment
    }
    return [commit for commit in known if commit in measured]


def _recorded_results(machine):
    """Return asv's results of a machine that are in git, not those of this checkout alone."""
    files = set(git("ls-files", "--", f"results/{machine}").splitlines())
    return [
        result
        for result in iter_results_for_machine(str(RESULTS), machine)
        if f"results/{machine}/{result.commit_hash[:8]}-{result.env_name}.json" in files
    ]


def recorded_environment(machine):
    """Return the environment that documents are about, as `usual_environment` chooses."""
    return _usual(_recorded_results(machine))


def recorded_commits(machine):
    """Return the hashes of the commits that documents are about, oldest first."""
    environment = recorded_environment(machine)
    found = {r.commit_hash for r in _recorded_results(machine) if r.env_name == environment}
    return [c for c in measured_commits(machine, environment=environment) if c in found]


def recorded(machine, commit):
    """Return what `load` does, in the environment that documents are about."""
    return load(machine, commit, environment=recorded_environment(machine))


def fragmentation(context, block_size):
    """Percent of the slots in a sequence's blocks that hold no token."""
    slots = blocks_needed(context, block_size) * block_size
    return 100 * (slots - context) / slots


def percent_over(ratio):
    """Return a Value of a ratio as percent above 1."""
    if not ratio.known:
        return ratio
    return Value(*(100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high)))


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


def commit_label(commit):
    """Return what a table calls a commit: its phase, if it has one, and its hash."""
    phases = {hash[: len(commit)]: phase for hash, phase in phase_commits().items()}
    return f"phase {phases[commit]} ({commit[:8]})" if commit in phases else commit[:8]


def headline(machine, commits, environment=None):
    """Return (header, rows): `auto` over contiguous at phase commits and the last of `commits`.

    Columns are the cells of block size 32 with a number; rows carry 99% confidence intervals.
    """
    phases = phase_commits()
    tables = {
        commit: load(machine, commit, environment=environment).get(HEADLINE, {})
        for commit in commits
        if commit in phases or commit == commits[-1]
    }
    cells = {cell for table in tables.values() for cell, value in table.items() if value.known}
    cells = sorted((c for c in cells if c[2] == "32"), key=lambda c: [int(x) for x in c])
    header = ["commit", *(f"batch {b}, {int(context) // 1024}k" for b, context, _ in cells)]
    rows = [
        [commit_label(commit)] + [table.get(cell, MISSING).show(interval=True) for cell in cells]
        for commit, table in tables.items()
    ]
    return header, rows


def mark_adr_table(machine, commit):
    """Write the ADR's table of one machine at one commit."""
    return as_markdown(ADR_COLUMNS, adr_rows(recorded(machine, commit)))


def mark_headline(machine):
    """Write the headline table."""
    commits, environment = recorded_commits(machine), recorded_environment(machine)
    return as_markdown(*headline(machine, commits, environment))


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
    rows = [
        [*cell, *(t.get(cell, MISSING).show(factor, interval=True) for t in tables.values())]
        for cell in sorted({*itertools.chain(*tables.values())}, key=lambda c: [int(x) for x in c])
        if any(table.get(cell, MISSING).known for table in tables.values())
    ]
    return as_markdown([*params, *map(commit_label, tables)], rows)


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
    both = [a[cell].value / b[cell].value for cell in a if a[cell].known and b[cell].known]
    lines.append(
        f"- time of A over time of B: median {statistics.median(both):.2f}, "
        f"{min(both):.2f} to {max(both):.2f} over {len(both)} cells"
    )
    return "\n".join(lines) + "\n"


def percent(ratio):
    """Return a ratio as a signed percentage of its excess over 1."""
    return f"{100 * (ratio - 1):+.0f}%"


def mark_pattern(machine, commit):
    """Write the ratio of a random block order over the reversed one."""
    [(cell, ratio)] = recorded(machine, commit)[
        "decode.BlockOrder.ratio_random_vs_reversed"
    ].items()
    batch, context, block_size = cell
    where = f"batch {batch}, {context} tokens, block {block_size}"
    return f"{where}: {ratio.show(interval=True)}\n"


def mark_csv(name, machine):
    """Write what `make noise` or `make detect` recorded."""
    with (RESULTS / machine / name).open() as file:
        header, *rows = csv.reader(file)
    return as_markdown(header, rows)


MARKS = {
    "adr-table": mark_adr_table,
    "headline": mark_headline,
    "series": mark_series,
    "layouts": mark_layouts,
    "pattern": mark_pattern,
    "noise": functools.partial(mark_csv, "noise.csv"),
    "detection": functools.partial(mark_csv, "detection.csv"),
}


def fill(text):
    """Return a document's text with every marker's content written anew."""

    def write(match):
        begin, name, arguments, end = match.groups()
        return begin + MARKS[name](**dict(a.split("=", 1) for a in arguments.split())) + end

    return MARKER.sub(write, text)


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tracking.report", description=__doc__)
    parser.add_argument("what", choices=["table", "headline", "documents"])
    parser.add_argument("--machine", help="name in results/ (default: this host's)")
    parser.add_argument("--backend", default="cpu", help="part of this host's name")
    parser.add_argument("--commit", help="(default: the newest measured)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_args()
    if args.what == "documents":
        for path in DOCUMENTS:
            path.write_text(fill(path.read_text()))
        return 0
    machine = args.machine or machine_name(args.backend)
    commits = measured_commits(machine)
    if not commits:
        sys.exit(f"nothing measured on machine {machine} in {RESULTS}: run `make bench`")
    show = FORMATS[args.format]
    if args.what == "headline":
        print(f"decode step, path auto over contiguous SDPA, block size 32, machine {machine}")
        print(show(*headline(machine, commits)), end="")
    else:
        try:
            table = load(machine, args.commit or commits[-1])
        except ValueError as error:
            sys.exit(str(error))
        print(show(ADR_COLUMNS, adr_rows(table)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
