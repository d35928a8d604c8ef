"""Reads results: values by benchmark and cell, of a machine, a commit and an environment."""

import collections
import itertools
import math
from dataclasses import dataclass

from asv.results import iter_results_for_machine

from tracking.project import asv_settings
from tracking.repository import ROOT, git

RESULTS = ROOT / "results"
HEADLINE = "overhead.Auto.ratio_vs_contiguous"


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
