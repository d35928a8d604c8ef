"""asv publish plugins: what a machine's recorded noise lets one call a regression.

asv takes every step up of any series for one, above a threshold of asv.conf.json. Here the steps of
a series come from its own threshold (`tracking.levels`), a series without recorded noise has none,
and a benchmark whose larger values are better regresses when it falls (`benchmarks/kinds.py`).
"""

import math
import sys
from pathlib import Path

from asv.console import log
from asv.plugins.regressions import Regressions
from asv.publishing import OutputPublisher
from asv.util import UserError

LEAST = 1e-100  # what stands for nothing, whose reciprocal would be infinite


def _turned(value):
    """Return what falls as `value` rises, relative changes staying what they are."""
    return 1 / max(value, LEAST)


def _back(turned):
    """Return the value that `_turned` was given."""
    return 0.0 if turned >= 1 / LEAST else 1 / turned


def _import(name):
    # asv has this on its path only while it loads plugins, and measuring needs none of it.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    return __import__(name, fromlist=["_"])


def steps(points, threshold):
    """Return the steps of a series as asv has them: (left, right, value, least, error).

    `points` are (revision, value), None or NaN where there is no number.
    """
    points = [(at, value) for at, value in points if value is not None and not math.isnan(value)]
    values = [max(value, LEAST) for _, value in points]
    if not threshold.recorded:  # whatever it did, nobody can tell
        found = [(0, len(values), values[-1])] if values else []
    else:
        found = _import("tracking.levels").levels(values, threshold)
    return [
        (points[first][0], points[end - 1][0] + 1, level, min(values[first:end]), 0.0)
        for first, end, level in found
    ]


class Levels(OutputPublisher):
    """Gives asv's list and regressions the steps of each series."""

    name = "levels"
    order = 0  # before both

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Replace what `graphs` say of steps."""
        noise, grid = _import("tracking.noise"), _import("tracking.grid")
        machines = {}
        for _, graph in graphs:
            benchmark = benchmarks.get(graph.benchmark_name)
            machine = graph.params.get("machine")
            if not benchmark or not machine:
                continue  # a summary of several
            if machine not in machines:
                try:
                    machines[machine] = noise.recorded_noise(machine, conf.results_dir)
                except UserError as error:
                    log.warning(f"no regressions of {machine}: {error}")
                    machines[machine] = noise.Noise()
            names = [grid.series_name(benchmark["name"], cell) for cell in grid.cells(benchmark)]
            graph.thresholds = {name: machines[machine].threshold(name) for name in names}
            data = graph.get_data()
            made = [
                steps([(at, v if graph.scalar_series else v[i]) for at, v, _ in data], threshold)
                for i, threshold in enumerate(graph.thresholds.values())
                if i < graph.n_series
            ]
            found = made[0] if graph.scalar_series else made
            graph.get_steps = lambda found=found: found


class SeriesRegressions(Regressions):
    """Replaces asv's own regressions, which it writes before."""

    name = "series-regressions"
    order = Regressions.order + 1

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Write regressions.json and its feed into `conf.html_dir`.

        The file has what was accepted beside the regressions, with its reason and link.
        """
        triage = _import("tracking.triage")
        cls._larger = {name for name, b in benchmarks.items() if b.get("better") == "larger"}
        cls._entries, cls._accepted, cls._used = triage.read(), [], set()
        super().publish(conf, repo, benchmarks, graphs, revisions)
        for sentence in triage.stale(cls._entries, cls._used):
            log.warning(sentence)

    @classmethod
    def _save(cls, conf, data):
        super()._save(conf, data | {"accepted": cls._accepted})

    @classmethod
    def _process_regression(
        cls, regressions, revision_to_hash, repo, all_params, graph_data, graph
    ):
        index, name, steps, _ = graph_data
        # Neighbours differ by half a threshold at least; so must the last level and the best.
        threshold = math.sqrt(graph.thresholds[name].factor) - 1
        larger = name.split("(")[0] in cls._larger
        if larger:
            steps = [
                (left, right, _turned(value), _turned(value), 0.0)
                for left, right, value, *_ in steps
            ]
        count = len(regressions)
        graph_data = index, name, steps, threshold
        super()._process_regression(
            regressions, revision_to_hash, repo, all_params, graph_data, graph
        )
        if larger:
            for regression in regressions[count:]:
                *about, last, best, jumps = regression
                jumps = [(a, b, _back(before), _back(after)) for a, b, before, after in jumps]
                regression[:] = [*about, _back(last), _back(best), jumps]
        for regression in regressions[count:]:
            cls._triage(regression, revision_to_hash, graph.params["machine"])
            if not regression[-1]:
                regressions.remove(regression)

    @classmethod
    def _triage(cls, regression, revision_to_hash, machine):
        """Take the accepted jumps out of a regression."""
        triage = _import("tracking.triage")
        name, *about, jumps = regression
        left = []
        for jump in jumps:
            before, after = (revision_to_hash.get(revision) for revision in jump[:2])
            commits = triage.between(before, after) if before and cls._entries else [after]
            entry = triage.acceptance(cls._entries, name, machine, commits)
            if entry:
                cls._used.add(entry)
                why = {"commit": entry.commit, "reason": entry.reason, "link": entry.link}
                cls._accepted.append(why | {"regression": [name, *about, [jump]]})
            else:
                left.append(jump)
        regression[-1] = left
