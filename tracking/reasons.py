"""asv plugin: a cell that a run does not ask for keeps the reason why it has no number.

asv keeps the numbers of such cells, and drops what is stored beside a NaN: the reasons of
`benchmarks/kinds.py`.
"""

from functools import wraps

from asv.results import Results


def keep_reasons(add_result):
    """Return `Results.add_result` as it is, but for the reasons of cells that were left out."""

    @wraps(add_result)
    def added(self, benchmark, *args, selected_idx=None, **options):
        name, before = benchmark["name"], []
        same = self.benchmark_version.get(name) == benchmark["version"]
        if selected_idx is not None and same and name in self.get_all_result_keys():
            before = self.get_result_stats(name, benchmark["params"])
        add_result(self, benchmark, *args, selected_idx=selected_idx, **options)
        stats = list(self.get_result_stats(name, benchmark["params"]))
        for cell, old in enumerate(before):
            if cell not in selected_idx and stats[cell] is None:
                stats[cell] = old
        if any(stats):
            self._stats[name] = stats

    return added


def setup():
    """Take the place of asv's own when asv loads this plugin."""
    if not hasattr(Results.add_result, "__wrapped__"):
        Results.add_result = keep_reasons(Results.add_result)
