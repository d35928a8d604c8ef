"""Reads results: values by benchmark and cell, of a machine, a commit and an environment."""

import collections
import functools
import itertools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from asv.results import Results

from benchmarks.kinds import WHY
from tracking import valid
from tracking.project import asv_settings, own_machines
from tracking.repository import ROOT, git

RESULTS = ROOT / "results"
FIRST = "prompt.FirstToken.ratio_speed"
TOKENS = "generate.Decode.ratio_tokens_per_second"
STEP = "step.Auto.ratio_step_vs_contiguous"
BOUND = "step.Bound.ratio_step_vs_bound"
ATTENTION = "overhead.Auto.ratio_vs_contiguous"
NAMES = {
    FIRST: "first token, speed over mlx-lm's",
    TOKENS: "tokens a second over mlx-lm's",
    STEP: "step over mlx-lm's cache",
    BOUND: "step over contiguous attention alone",
    ATTENTION: "attention alone",
}
"""The headline benchmarks and their titles, first the one that matters most to a user."""

NUMPY = "host.NumPy.track_version"
RETIRED = "retired.txt"
"""In a machine's folder: why it no longer measures. It is shown last."""


@dataclass(frozen=True)
class Value:
    """A result with its 99% confidence interval; seconds or a ratio.

    `value` is None where the benchmark failed and NaN where there is no number. `why` is then a
    reason in `benchmarks.kinds.WHY`, "not asked", or "n/a" where none is recorded.
    """

    value: float | None
    low: float = math.nan
    high: float = math.nan
    why: str = "n/a"
    stats: dict | None = field(default=None, compare=False, repr=False)  # as asv has them
    samples: list | None = field(default=None, compare=False, repr=False)

    def show(self, factor=1.0, digits=2, interval=False):
        """Return the value times `factor` as text, `failed`, or why there is none."""
        if self.value is None:
            return "failed"
        if math.isnan(self.value):
            return self.why
        text = f"{self.value * factor:.{digits}f}"
        if interval and math.isfinite(self.low) and math.isfinite(self.high):
            text += f" [{self.low * factor:.{digits}f}, {self.high * factor:.{digits}f}]"
        return text

    @property
    def known(self):
        """Whether there is a number."""
        return self.value is not None and not math.isnan(self.value)


MISSING = Value(math.nan, why="not asked")


def over(value, base):
    """Return the ratio of two values; below zero counts as zero, as in published regressions.

    Over zero it is infinite, and 1 for two zeros.
    """
    if base <= 0:
        return 1.0 if value <= 0 else math.inf
    return max(value, 0.0) / base


@dataclass(frozen=True)
class Measured:
    """What one file of results says: the values at one commit in one environment."""

    file: str
    commit: str
    environment: str
    mlx: str | None
    params: dict  # of the environment and the machine, as asv has them
    started_at: int  # of the last benchmark, milliseconds
    versions: dict  # {benchmark: version}
    table: dict  # {benchmark: {parameters: Value}}


def measured(machine, results=RESULTS):
    """Return what each file of a machine's results says; an unchanged file is parsed once.

    A broken file is left out, and named on standard error.
    """
    files = sorted(Path(results, machine).glob("*-*.json"))
    parsed = [_parse(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return [one for one in parsed if one is not None]


@functools.cache
def _parse(path, *_):
    """Parse a file; return None if it is broken. The other arguments change when the file does."""
    try:
        valid.load(path)
    except valid.BrokenFileError as error:
        print(f"{error}; left out", file=sys.stderr)
        return None
    result = Results.load(path)
    return Measured(
        Path(path).name,
        result.commit_hash,
        result.env_name,
        result.params.get("mlx"),
        result.params,
        max((started for started in result.started_at.values() if started), default=0),
        result.benchmark_version,
        {name: _values(result, name) for name in result.get_all_result_keys()},
    )


def _values(result, name):
    """Return {parameters: Value} of one benchmark."""
    params = result.get_result_params(name)
    of_cells = (
        result.get_result_value(name, params),
        result.get_result_stats(name, params),
        result.get_result_samples(name, params),
    )
    values = {}
    for cell, value, stats, samples in zip(itertools.product(*params), *of_cells, strict=True):
        ends = (stats["ci_99_a"], stats["ci_99_b"]) if stats else (math.nan, math.nan)
        why = WHY.get(stats["number"], "n/a") if stats else "n/a"
        values[cell] = Value(value, *ends, why, stats, samples)
    return values


def machines(results=RESULTS):
    """Return the names of the machines that have files of results."""
    return sorted({file.parent.name for file in Path(results).glob("*/*-*.json")})


def environments(machine, results=RESULTS):
    """Return asv's names of the environments (MLX versions) that a machine measured in."""
    return sorted({one.environment for one in measured(machine, results)})


def usual_environment(machine, results=RESULTS):
    """Return the environment that a machine's tables are about, None if it measured nothing.

    One of the MLX in asv.conf.json is preferred, then that of most commits, then the last measured.
    A table never mixes environments.
    """
    return _usual(measured(machine, results))


def _usual(measurements):
    pinned, found = asv_settings()["matrix"]["req"]["mlx"], collections.defaultdict(list)
    for one in measurements:
        found[one.mlx in pinned, one.environment].append(one)

    def rank(key):
        is_pinned, _ = key
        return is_pinned, len(found[key]), max(one.started_at for one in found[key])

    return max(found, key=rank)[1] if found else None


def load(machine, commit, results=RESULTS, environment=None):
    """Return {benchmark name: {parameters: Value}} of one machine at one commit.

    In the machine's usual environment unless one is named; of whichever version a benchmark had.
    """
    environment = environment or usual_environment(machine, results)
    found = [
        one
        for one in measured(machine, results)
        if one.commit.startswith(commit) and one.environment == environment
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected results of one commit, got {len(found)} of {commit} of machine {machine} "
            f"in environment {environment} in {results}"
        )
    return found[0].table


def of_one_version(found):
    """Return the tables of `Measured`s, each benchmark's values of its last measured version alone.

    Another version measures something else, so a table over several commits has one of each.
    """
    last = {}
    for one in sorted(found, key=lambda one: one.started_at):
        last.update(one.versions)
    return [
        {n: cells for n, cells in one.table.items() if one.versions.get(n) == last.get(n)}
        for one in found
    ]


def tables(machine, commits, results=RESULTS, environment=None):
    """Return {commit: table} as `load` has tables, but each benchmark of one version.

    In the machine's usual environment unless one is named.
    """
    environment = environment or usual_environment(machine, results)
    files = {m.commit: m for m in measured(machine, results) if m.environment == environment}
    return dict(zip(commits, of_one_version([files[c] for c in commits]), strict=True))


def measured_commits(machine, results=RESULTS, environment=None):
    """Return the hashes of a machine's measured commits that this clone has, oldest first.

    In the machine's usual environment unless one is named.
    """
    environment = environment or usual_environment(machine, results)
    known = git("log", "--reverse", "--format=%H").split()
    found = {one.commit for one in measured(machine, results) if one.environment == environment}
    return [commit for commit in known if commit in found]


def last_run(machine, results=RESULTS):
    """Return when a machine last measured, in milliseconds; 0 if it never did."""
    return max((one.started_at for one in measured(machine, results)), default=0)


def is_own(machine, results=RESULTS):
    """Return whether a machine is this host, and measured HEAD or measured last of all machines."""
    if machine not in own_machines():
        return False
    head = git("rev-parse", "HEAD")
    last = max(last_run(one, results) for one in machines(results))
    return head in measured_commits(machine, results) or last_run(machine, results) == last


def default_machine(results=RESULTS):
    """Return (machine, newest commit) of the machine that the page and `make table` open with.

    It is this host's own if `is_own`, else the one with the most headline cells that have a number
    at its newest commit; on a tie the one that measured last. A retired machine is chosen only if
    there is no other. Return None if no machine has measured a commit of this clone.
    """

    def rank(choice):
        machine, commit = choice
        table = load(machine, commit, results)
        cells = sum(value.known for name in NAMES for value in table.get(name, {}).values())
        retired = Path(results, machine, RETIRED).exists()
        return not retired, is_own(machine, results), cells, last_run(machine, results)

    found = {machine: measured_commits(machine, results) for machine in machines(results)}
    choices = [(machine, commits[-1]) for machine, commits in found.items() if commits]
    return max(choices, key=rank, default=None)


def _in_git(machine):
    """Return what a machine's files of results say that git has, not those of this checkout."""
    files = set(git("ls-files", "-z", "--", f"results/{machine}").split("\0"))
    return [one for one in measured(machine) if f"results/{machine}/{one.file}" in files]


def recorded_environment(machine):
    """Return the environment that documents are about, as `usual_environment` chooses."""
    return _usual(_in_git(machine))


def recorded_commits(machine):
    """Return the hashes of the commits that documents are about, oldest first."""
    environment = recorded_environment(machine)
    found = {one.commit for one in _in_git(machine) if one.environment == environment}
    return [c for c in measured_commits(machine, environment=environment) if c in found]


def recorded(machine, commit):
    """Return what `load` does, in the environment that documents are about."""
    return load(machine, commit, environment=recorded_environment(machine))
