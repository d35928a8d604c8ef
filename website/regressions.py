"""asv publish plugin: a regression of a benchmark whose larger values are better is a fall.

asv takes every step up for a regression. This writes its list anew, by what the suite says of each
benchmark (`benchmarks/kinds.py`).
"""

from asv.plugins.regressions import Regressions

LEAST = 1e-100  # what stands for nothing, whose reciprocal would be infinite


def _turned(value):
    """Return what falls as `value` rises, relative changes staying what they are."""
    return 1 / max(value, LEAST)


class DirectedRegressions(Regressions):
    """Replaces asv's own regressions, which it writes before."""

    name = "directed-regressions"
    order = Regressions.order + 1

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Write regressions.json and its feed into `conf.html_dir`."""
        cls._larger = {name for name, b in benchmarks.items() if b.get("better") == "larger"}
        super().publish(conf, repo, benchmarks, graphs, revisions)

    @classmethod
    def _process_regression(
        cls, regressions, revision_to_hash, repo, all_params, graph_data, graph
    ):
        index, name, steps, threshold = graph_data
        if name.split("(")[0] in cls._larger:
            steps = [
                (left, right, now := _turned(value), _turned(least), min(error * now, 1) * now)
                for left, right, value, least, error in steps
            ]
        count = len(regressions)
        graph_data = index, name, steps, threshold
        super()._process_regression(
            regressions, revision_to_hash, repo, all_params, graph_data, graph
        )
        if name.split("(")[0] in cls._larger:
            for regression in regressions[count:]:
                *about, last, best, jumps = regression
                jumps = [(a, b, _back(before), _back(after)) for a, b, before, after in jumps]
                regression[:] = [*about, _back(last), _back(best), jumps]


def _back(turned):
    """Return the value that `_turned` was given."""
    return 0.0 if turned >= 1 / LEAST else 1 / turned
