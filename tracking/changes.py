"""What changed between two commits: measured by `asv continuous`, judged by asv's statistics.

A cell has changed if its samples differ significantly and its median by more than a factor. The
factor of a machine is what keeps identical commits apart from changed ones there. What is counted
has no noise: its samples are all the same, and one percent is a change.
"""

import shutil
from dataclasses import dataclass

from asv._stats import is_different
from asv.util import UserError

from tracking.grid import selection
from tracking.project import asv, backend_settings, derive_config, discover, environment_name
from tracking.repository import ROOT
from tracking.results import MISSING, Value, measured

COUNTED = 1.01


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
    def kind(self):
        """Return "ratio", "count", or "time" for everything else that is absolute."""
        if ".track_instructions" in self.name:
            return "count"
        return "ratio" if ".ratio_" in self.name else "time"

    @property
    def ratio(self):
        """Return the Value of after over before, its interval from the ends farthest apart."""
        ends = self.after.low / self.before.high, self.after.high / self.before.low
        return Value(self.after.value / self.before.value, *ends)

    def verdict(self, factors):
        """Return "worsened", "improved", "unchanged", "failed", "repaired" or "n/a".

        What ran or failed before and is n/a now counts as failed.
        """
        if not self.after.known:
            lacked = self.before.value is not None and not self.before.known
            return "n/a" if lacked and self.after.value is not None else "failed"
        if not self.before.known:
            return "repaired" if self.before.value is None else "n/a"
        counted, ratio = self.kind == "count", self.ratio.value
        factor = COUNTED if counted else factors[self.kind]
        if not (self.significant or counted) or 1 / factor <= ratio <= factor:
            return "unchanged"
        return "improved" if (ratio > 1) == (self.better == "larger") else "worsened"


def _cells(results, machine, commit, environment):
    """Return {name of a cell: Value} of a commit, {} if it was not measured."""
    return {
        f"{name}({', '.join(cell)})": value
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


def measure(before, after, *, machine, backend, benchmarks, grid, rounds):
    """Run `asv continuous` on two commits into an empty folder and return the changes.

    Raises
    ------
    UserError
        If asv could not measure one of them at all, or a cell failed in some rounds only.
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
                options += selection(benchmark, grid)
        status = asv("continuous", *options, before, after, config=config)
    finally:
        (ROOT / config).unlink()
    for commit in (before, after):
        if not _cells(folder, machine, commit, environment):
            raise UserError(
                f"asv measured nothing at {commit[:8]} (exit status {status}), see above"
            )
    compared = changes(folder, machine, before, after, environment, listed)
    if status == 2 and not any(None in (c.before.value, c.after.value) for c in compared):
        raise UserError(f"a benchmark failed in one of {rounds} rounds, see above")
    return compared
