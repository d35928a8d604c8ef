"""What changed between two commits: measured by `asv continuous`, judged by asv's statistics.

A cell has changed if its samples differ significantly, its median by more than the threshold of its
series (`tracking.noise`), and each of the two medians lies outside of the other's middle half.
"""

import math
import re
import shutil
from dataclasses import dataclass

from asv._stats import is_different
from asv.util import UserError

from tracking.grid import device_of, selection, series_name
from tracking.project import asv, backend_settings, derive_config, discover, environment_name
from tracking.repository import ROOT
from tracking.results import MISSING, Value, measured, over


def apart(one, other):
    """Whether each of two Values lies outside of the other's middle half, if that is known.

    A gate against samples of two modes, fast and slow: their median jumps from mode to mode when
    the mix of the two shifts by little, and with enough samples that is significant. The other
    mode is within the middle half then; a real change leaves it behind.
    """

    def outside(value, stats):
        return not stats or not stats["q_25"] <= value <= stats["q_75"]

    return outside(one.value, other.stats) and outside(other.value, one.stats)


@dataclass(frozen=True)
class Change:
    """One cell of one benchmark in two commits."""

    name: str
    before: Value
    after: Value
    significant: bool
    samples: int  # of the commit that has fewer
    better: str = "smaller"  # or "larger", as the suite says of the benchmark

    @property
    def ratio(self):
        """Return the Value of after over before, its interval from the ends farthest apart."""
        ends = over(self.after.low, self.before.high), over(self.after.high, self.before.low)
        return Value(over(self.after.value, self.before.value), *ends)

    @property
    def worse(self):
        """Return the factor by which it is worse, below 1 where it is better."""
        if self.better == "smaller":
            return self.ratio.value
        return over(self.before.value, self.after.value)

    @property
    def size(self):
        """Return the factor by which it is worse or better, at least 1, infinite from or to 0."""
        return max(self.worse, over(1, self.worse))

    def verdict(self, noise):
        """Return "worsened", "improved", "unchanged", "failed", "repaired" or "n/a".

        What ran or failed before and is n/a now counts as failed. `noise` is the machine's, from
        `tracking.noise.recorded_noise`.
        """
        if not self.after.known:
            lacked = self.before.value is not None and not self.before.known
            return "n/a" if lacked and self.after.value is not None else "failed"
        if not self.before.known:
            return "repaired" if self.before.value is None else "n/a"
        threshold, ratio = noise.threshold(self.name), self.ratio.value
        exact = threshold.source == "exact"
        if not exact and not (self.significant and apart(self.before, self.after)):
            return "unchanged"
        if 1 / threshold.factor <= ratio <= threshold.factor:
            return "unchanged"
        return "worsened" if self.worse > 1 else "improved"


def _cells(results, machine, commit, environment):
    """Return {name of a cell: Value} of a commit, {} if it was not measured."""
    return {
        series_name(name, cell): value
        for one in measured(machine, results)
        if (one.commit, one.environment) == (commit, environment)
        for name, values in one.table.items()
        for cell, value in values.items()
    }


def changes(results, machine, before, after, environment, benchmarks):
    """Return the Change of each cell that was asked for at either commit in an environment.

    `benchmarks` is the suite as asv lists it.
    """
    old, new = (_cells(results, machine, commit, environment) for commit in (before, after))
    compared = []
    for name in sorted({*old, *new}):
        a, b = old.get(name, MISSING), new.get(name, MISSING)
        if a.value is not None and b.value is not None and not a.known and not b.known:
            continue
        # As asv has it: one sample without statistics is compared by its value alone.
        few = not (a.stats and b.stats) or 1 in (a.stats.get("repeat"), b.stats.get("repeat"))
        significant = few or is_different(a.samples, b.samples, a.stats, b.stats)
        samples = min(len(a.samples or ()), len(b.samples or ()))
        better = benchmarks.get(name.split("(")[0], {}).get("better", "smaller")
        compared.append(Change(name, a, b, significant, samples, better))
    return compared


class NothingMeasuredError(UserError):
    """asv has no result of a commit: it cannot be built, or the series is not known there."""


def measure(before, after, *, machine, backend, rounds, benchmarks=(), grid="short", series=None):
    """Run `asv continuous` on two commits into an empty folder and return the changes.

    Of `benchmarks`, prefixes of their names, in a grid; or of one `series`, by its name.

    Raises
    ------
    NothingMeasuredError
        If asv could not measure one of them at all.
    UserError
        If a cell failed in some rounds only.
    """
    folder = ROOT / ".asv/compare"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {**backend_settings(backend), "results_dir": str(folder)}
    config = derive_config("compare", **settings)
    try:
        environment = environment_name(config)
        options = ["--machine", machine, "--attribute", f"rounds={rounds}", "--record-samples"]
        options += ["--interleave-rounds", "--show-stderr"]
        listed = discover(machine, config)
        for name, benchmark in listed.items():
            if name.startswith(benchmarks):
                options += selection(benchmark, grid, device_of(backend))
        if series:
            options += ["--bench", f"^{re.escape(series)}$"]
        status = asv("continuous", *options, before, after, config=config)
    finally:
        (ROOT / config).unlink()
    for commit in (before, after):
        if not _cells(folder, machine, commit, environment):
            raise NothingMeasuredError(
                f"asv measured nothing at {commit[:8]} (exit status {status}), see above"
            )
    compared = changes(folder, machine, before, after, environment, listed)
    if status == 2 and not any(None in (c.before.value, c.after.value) for c in compared):
        raise UserError(f"a benchmark failed in one of {rounds} rounds, see above")
    return compared


@dataclass(frozen=True)
class Moved:
    """The cells of a comparison that worsened, or that improved: by how much, and how many.

    `mean` is the geometric mean of the factors, `least` and `most` are their range; 1.1 is worse or
    better by 10%, and infinity is from or to 0.
    """

    cells: int
    mean: float
    least: float
    most: float

    def __str__(self):
        least, mean, most = (
            f"{100 * (x - 1):.1f}%" if math.isfinite(x) else "∞"
            for x in (self.least, self.mean, self.most)
        )
        if self.cells == 1:
            return f"1 cell by {mean}"
        return f"{self.cells} cells by {mean} ({least} to {most})"


@dataclass(frozen=True)
class Verdict:
    """What a comparison says; its text is one line.

    Attributes
    ----------
    word : str
        "improved", "worsened", "mixed" or "unchanged".
    worsened, improved : Moved or None
    compared : int
        Cells with a number at both commits.
    failed : int
        Cells that had a number or should have one, and have none.
    sure : str
        How sure that is: how many changes between runs of identical code were as large as that of
        the cell that is farthest beyond its threshold.
    """

    word: str
    worsened: Moved | None
    improved: Moved | None
    compared: int
    failed: int
    sure: str

    def __str__(self):
        sides = (("worsened", self.worsened), ("improved", self.improved))
        said = [
            f"{word} {side}" if self.word == "mixed" else str(side) for word, side in sides if side
        ]
        cells = f"{', '.join(said)} of {self.compared}" if said else f"{self.compared} cells"
        failed = f"{self.failed} failed; " if self.failed else ""
        return f"{failed}{self.word}: {cells}; {self.sure}"


def _moved(factors):
    if not factors:
        return None
    mean = math.exp(sum(map(math.log, factors)) / len(factors))
    return Moved(len(factors), mean, min(factors), max(factors))


def verdict(compared, noise):
    """Return the one Verdict of a comparison.

    Parameters
    ----------
    compared : list of Change
        From `changes` or `measure`.
    noise : tracking.noise.Noise
        The machine's, from `tracking.noise.recorded_noise`.
    """
    by_word = {}
    for change in compared:
        by_word.setdefault(change.verdict(noise), []).append(change)
    worsened, improved = by_word.get("worsened", []), by_word.get("improved", [])
    words = {
        (True, True): "mixed",
        (True, False): "worsened",
        (False, True): "improved",
        (False, False): "unchanged",
    }
    return Verdict(
        words[bool(worsened), bool(improved)],
        _moved([change.size for change in worsened]),
        _moved([change.size for change in improved]),
        sum(change.before.known and change.after.known for change in compared),
        len(by_word.get("failed", [])),
        _sure([*worsened, *improved], compared, noise),
    )


def _sure(changed, compared, noise):
    """Return in words how sure it is that cells changed, or that none did."""
    if not changed:
        known = [noise.threshold(c.name) for c in compared if c.before.known and c.after.known]
        guessed = sum(threshold.source == "guess" for threshold in known)
        if guessed:
            return f"thresholds of {guessed} cells are a guess"
        if not known:
            return "nothing was compared"
        worst = max(threshold.factor for threshold in known)
        return f"changes of up to {100 * (worst - 1):.1f}% are within the noise"

    def beyond(change):
        return math.log(change.size) / math.log(noise.threshold(change.name).factor)

    surest = max(changed, key=beyond)
    threshold = noise.threshold(surest.name)
    if any(noise.threshold(change.name).source == "exact" for change in changed):
        return "certain, what is counted has no noise"
    if threshold.source == "guess":
        return "how sure is not known, the noise is not recorded"
    as_large = sum(change >= surest.size for change in threshold.changes)
    return f"{as_large} of {len(threshold.changes)} changes of identical code were as large"
