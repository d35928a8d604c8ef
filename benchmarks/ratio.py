"""A benchmark type of our own: `ratio_*`, two callables timed alternately in one process.

On a noisy machine the quotient of two separately measured times moves with the machine's speed;
the quotient of times taken in turns moves less. `make noise` counts the difference.
"""

import gc
import re
import time

from asv_runner.benchmarks._base import _get_first_attr

from .kinds import TimeBenchmark


class RatioBenchmark(TimeBenchmark):
    """`ratio_*(params)` returns (candidate, baseline), two callables without arguments.

    The two take turns, baseline first and last. A sample is the time of one candidate over the mean
    time of the baselines before and after it, so that linear drift cancels and neither ever follows
    itself: what one leaves in a cache is the other's. Stored like timings, so asv's statistics,
    comparisons, `--quick` and attributes (`rounds`, `repeat`, `warmup_time`) apply. `repeat` is
    (fewest samples, most samples, seconds after which none is started) or a number. A method
    `between`, if there is one, runs after each call and outside of its time: it waits for work that
    the call started and does not answer for, and prepares the next call.
    """

    name_regex = re.compile(r"^ratio_.+$")

    def __init__(self, name, func, attr_sources):
        super().__init__(name, func, attr_sources)
        self.type = "ratio"
        self.unit = _get_first_attr(attr_sources, "unit", "x")
        self.better = _get_first_attr(attr_sources, "better", "smaller")
        self._between = _get_first_attr(attr_sources, "between", _nothing)

    def run(self, *params):
        """Sample the pair and return the ratios in asv's format."""
        candidate, baseline = self.func(*params)
        samples = ratios(
            candidate,
            baseline,
            repeat=self.repeat,
            warmup_time=self.warmup_time,
            between=self._between,
        )
        # asv prints every digit that it is given
        return {"samples": [round(sample, 4) for sample in samples], "number": 1}


def _nothing():
    pass


def ratios(candidate, baseline, *, repeat, warmup_time, between=_nothing):
    """Return samples of the time of `candidate` over that of `baseline`, taken in turns.

    `repeat`, `warmup_time` (seconds) and `between` are those of `RatioBenchmark`.
    """

    def seconds_of(call):
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        between()
        return taken

    fewest, most, seconds = _repeat(repeat)
    warm_until = time.perf_counter() + max(warmup_time, 0)
    seconds_of(baseline)
    seconds_of(candidate)
    while time.perf_counter() < warm_until:
        seconds_of(baseline)
        seconds_of(candidate)

    samples = []
    deadline = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        before = seconds_of(baseline)
        while len(samples) < fewest or (len(samples) < most and time.perf_counter() < deadline):
            middle, after = seconds_of(candidate), seconds_of(baseline)
            samples.append(2 * middle / (before + after))
            before = after
    finally:
        if collecting:
            gc.enable()
    return samples


def _repeat(repeat):
    """Return (fewest, most, seconds) from asv's `repeat` attribute."""
    if isinstance(repeat, (tuple, list)):
        return repeat
    return (repeat, repeat, 0.0) if repeat else (5, 25, 4.0)
