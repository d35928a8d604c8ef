"""What changed between two commits: measured by `asv continuous`, judged by asv's statistics.

A cell has changed if its samples differ significantly, its median by more than the threshold of its
series (`tracking.noise`), and each of the two medians lies outside of the other's middle half.
"""

import contextlib
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from asv._stats import is_different
from asv.util import UserError

from tracking.grid import cells, device_of, selection, series_name
from tracking.project import asv, backend_settings, derive_config, discover, environment_name
from tracking.repository import ROOT
from tracking.results import MISSING, Value, measured, over


def apart(one, other):
    """Whether each of two Values lies outside of the other's middle half, if that is known.

    The median of samples of two modes, fast and slow, jumps when their mix shifts by little. The
    other mode is within the middle half then; a real change leaves it behind.
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
    better: str = "smaller"  # or "larger", as the suite says of the benchmark

    @property
    def known(self):
        """Whether there is a number at both commits."""
        return self.before.known and self.after.known

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

        What ran or failed before and is n/a now counts as failed.
        """
        if not self.after.known:
            lacked = self.before.value is not None and not self.before.known
            return "n/a" if lacked and self.after.value is not None else "failed"
        if not self.before.known:
            return "repaired" if self.before.value is None else "n/a"
        threshold = noise.threshold(self.name)
        exact = threshold.source == "exact"
        if not exact and not (self.significant and apart(self.before, self.after)):
            return "unchanged"
        if 1 / threshold.factor <= self.ratio.value <= threshold.factor:
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
        better = benchmarks.get(name.split("(")[0], {}).get("better", "smaller")
        compared.append(Change(name, a, b, significant, better))
    return compared


def chosen(listed, benchmarks, grid, device, pattern=""):
    """Return {name of a benchmark: asv's options}: of prefixes of names in a grid, or by a pattern.

    Raises
    ------
    UserError
        If the pattern, a regular expression, finds no cell.
    """
    if not pattern:
        compared = {name: one for name, one in listed.items() if name.startswith(benchmarks)}
        found = {name: selection(one, grid, device) for name, one in compared.items()}
        return {name: options for name, options in found.items() if options}
    found = {
        name: ["--bench", pattern]
        for name, one in listed.items()
        if any(re.search(pattern, series_name(name, cell)) for cell in cells(one))
    }
    if not found:
        raise UserError(f"expected a benchmark's name or a part of it, got {pattern!r}")
    return found


@contextlib.contextmanager
def scratch(name, backend):
    """Give an empty folder for results and asv's config for it, both gone afterwards."""
    (ROOT / ".asv").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=ROOT / ".asv") as folder:
        settings = {**backend_settings(backend), "results_dir": folder}
        config = derive_config(Path(folder).name, **settings)
        try:
            yield Path(folder), config
        finally:
            (ROOT / config).unlink()


class StoppedError(UserError):
    """A comparison that was interrupted: `compared` has what both commits have by then."""

    def __init__(self, compared):
        super().__init__("interrupted")
        self.compared = compared


def measure(
    before, after, *, machine, backend, rounds, benchmarks=(), grid="short", pattern="", about=len
):
    """Run `asv continuous` on two commits and return the changes of what is `chosen`.

    Parameters
    ----------
    about : callable
        Gets the names of the benchmarks before a commit is built.

    Raises
    ------
    StoppedError
        With the changes so far; asv saves after each round of a commit.
    UserError
        If asv measured nothing at one of them, or a cell failed in some rounds only.
    """
    options = ["--machine", machine, "--attribute", f"rounds={rounds}", "--record-samples"]
    options += ["--interleave-rounds", "--show-stderr"]
    with scratch("compare", backend) as (folder, config):
        environment, listed = environment_name(config), discover(machine, config)
        found = chosen(listed, benchmarks, grid, device_of(backend), pattern)
        about(found)
        options += [option for selected in found.values() for option in selected]
        try:
            status = asv("continuous", *options, before, after, config=config)
        except KeyboardInterrupt:
            status = "interrupted"
        for commit in (before, after):
            if not _cells(folder, machine, commit, environment):
                raise UserError(f"asv measured nothing at {commit[:8]} ({status}), see above")
        compared = changes(folder, machine, before, after, environment, listed)
    if status == "interrupted":
        raise StoppedError(compared)
    if status == 2 and not any(None in (c.before.value, c.after.value) for c in compared):
        raise UserError(f"a benchmark failed in one of {rounds} rounds, see above")
    return compared


def verdict(compared, noise):
    """Return what a comparison says in one line: what, by how much, in how many cells, how sure."""
    verdicts = [(change.verdict(noise), change) for change in compared]
    worsened = [change for said, change in verdicts if said == "worsened"]
    improved = [change for said, change in verdicts if said == "improved"]
    known = [change for change in compared if change.known]
    if worsened and improved:
        line = f"mixed: worsened {_moved(worsened)}, improved {_moved(improved)} of {len(known)}"
    elif worsened or improved:
        word = "worsened" if worsened else "improved"
        line = f"{word}: {_moved(worsened or improved)} of {len(known)}"
    else:
        line = f"unchanged: {len(known)} cells"
    if failed := sum(said == "failed" for said, _ in verdicts):
        line = f"{failed} failed; {line}"
    return f"{line}; {_sure(worsened + improved, known, noise)}"


def _moved(changed):
    """Return by how much cells changed: the geometric mean of the factors, and their range."""
    sizes = [change.size for change in changed]
    mean = math.exp(sum(map(math.log, sizes)) / len(sizes))
    least, mean, most = (
        f"{100 * (size - 1):.1f}%" if math.isfinite(size) else "∞"
        for size in (min(sizes), mean, max(sizes))
    )
    if len(sizes) == 1:
        return f"1 cell by {mean}"
    return f"{len(sizes)} cells by {mean} ({least} to {most})"


def _sure(changed, known, noise):
    """Return in words how sure it is that cells changed, or that none did."""
    thresholds = [noise.threshold(change.name) for change in changed or known]
    if not known:
        return "nothing was compared"
    if guessed := sum(one.source == "guess" for one in thresholds):
        return f"the noise of {guessed} of {len(thresholds)} cells is a guess"
    if not changed:
        worst = max(one.factor for one in thresholds)
        return f"changes of up to {100 * (worst - 1):.1f}% are within the noise"
    if any(one.source == "exact" for one in thresholds):
        return "certain, what is counted has no noise"
    pairs = zip(changed, thresholds, strict=True)
    surest, threshold = max(pairs, key=lambda x: math.log(x[0].size) / math.log(x[1].factor))
    as_large = sum(change >= surest.size for change in threshold.changes)
    return f"{as_large} of {len(threshold.changes)} changes of identical code were as large"
