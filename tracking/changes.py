"""What changed between two commits: measured by `asv continuous`, judged by asv's statistics.

A cell has changed if its samples differ significantly and its median by more than a factor. The
factor of a machine is what keeps identical commits apart from changed ones there.
"""

import itertools
import math
import shutil
from dataclasses import dataclass

from asv._stats import is_different
from asv.results import iter_results_for_machine
from asv.util import UserError

from tracking.grid import selection
from tracking.project import asv, backend_settings, derive_config, discover, environment_name
from tracking.repository import ROOT
from tracking.results import Value


@dataclass(frozen=True)
class Change:
    """One cell of one benchmark in two commits."""

    name: str
    before: Value
    after: Value
    significant: bool
    samples: int  # of the commit that has fewer

    @property
    def kind(self):
        """Return "ratio", or "time" for everything that is absolute."""
        return "ratio" if ".ratio_" in self.name else "time"

    @property
    def ratio(self):
        """Return the Value of after over before, its interval from the ends farthest apart."""
        ends = self.after.low / self.before.high, self.after.high / self.before.low
        return Value(self.after.value / self.before.value, *ends)

    def verdict(self, factors):
        """Return "worsened", "improved", "unchanged", "failed" or "n/a".

        What ran before and is n/a now counts as failed.
        """
        if None in (self.before.value, self.after.value):
            return "failed"
        if not self.after.known:
            return "failed" if self.before.known else "n/a"
        if not self.before.known:
            return "n/a"
        factor = factors[self.kind]
        if self.significant and self.ratio.value > factor:
            return "worsened"
        if self.significant and self.ratio.value < 1 / factor:
            return "improved"
        return "unchanged"


def _cells(results, machine, commit, environment):
    """Return {name of a cell: (Value, stats, samples)} of a commit."""
    found = {}
    for result in iter_results_for_machine(str(results), machine):
        if result.commit_hash != commit or result.env_name != environment:
            continue
        for name in result.get_all_result_keys():
            params = result.get_result_params(name)
            values = result.get_result_value(name, params)
            stats = result.get_result_stats(name, params)
            samples = result.get_result_samples(name, params)
            for cell, value, stat, some in zip(
                itertools.product(*params), values, stats, samples, strict=True
            ):
                ends = (stat["ci_99_a"], stat["ci_99_b"]) if stat else (math.nan, math.nan)
                found[f"{name}({', '.join(cell)})"] = Value(value, *ends), stat, some
    return found


def changes(results, machine, before, after, environment):
    """Return the Change of each cell that was asked for at either commit in an environment."""
    old, new = (_cells(results, machine, commit, environment) for commit in (before, after))
    nothing = Value(math.nan), None, None
    compared = []
    for name in sorted({*old, *new}):
        (a, stats_a, samples_a), (b, stats_b, samples_b) = (
            x.get(name, nothing) for x in (old, new)
        )
        if a.value is not None and b.value is not None and not a.known and not b.known:
            continue
        # As asv has it: one sample without statistics is compared by its value alone.
        few = not (stats_a and stats_b) or 1 in (stats_a.get("repeat"), stats_b.get("repeat"))
        significant = few or is_different(samples_a, samples_b, stats_a, stats_b)
        samples = min(len(samples_a or ()), len(samples_b or ()))
        compared.append(Change(name, a, b, significant, samples))
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
        for name, benchmark in discover(machine, config).items():
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
    compared = changes(folder, machine, before, after, environment)
    if status == 2 and not any(None in (c.before.value, c.after.value) for c in compared):
        raise UserError(f"a benchmark failed in one of {rounds} rounds, see above")
    return compared
