"""asv's kinds of benchmarks, with what asv lacks: why a cell has no number, which way is better."""

import math

from asv_runner.benchmarks import time, track
from asv_runner.benchmarks._base import _get_first_attr

# asv stores a NaN for a cell that has no number, and beside it how many calls a sample took; these
# tell why: the commit or the device lacks what is measured, this machine is not enough for it, or
# its system does not count it.
WHY = {-1: "lacks", -2: "too slow", -3: "too large", -4: "not counted"}


class NotApplicableError(NotImplementedError):
    """Raised in a benchmark's setup: n/a, and why, a text of `WHY`."""

    def __init__(self, message, why="lacks"):
        super().__init__(message)
        self.why = why


class Explained:
    """Stores why a cell is n/a, which asv forgets."""

    _why = None

    def do_setup(self):
        """Set up, and go on to `do_run` also if the cell is n/a."""
        try:
            for setup in self._setups:
                setup(*self._build_params())
        except NotImplementedError as error:
            print(f"n/a: {error}")
            self._why = getattr(error, "why", "lacks")
        return False

    def do_run(self):
        """Return what the benchmark returns, or a NaN and why it is one."""
        if self._why is None:
            return super().do_run()
        [code] = [code for code, why in WHY.items() if why == self._why]
        return {"samples": [math.nan], "number": code}


class TimeBenchmark(Explained, time.TimeBenchmark):
    """asv's `time_*`."""

    def __init__(self, name, func, attr_sources):
        super().__init__(name, func, attr_sources)
        self._own_number = self.number

    def do_run(self):
        """Run with the class's own number of calls if an earlier round of asv gave a reason."""
        if self.number in WHY:
            self.number = self._own_number
        return super().do_run()


class TrackBenchmark(Explained, track.TrackBenchmark):
    """asv's `track_*` with an attribute `better`, "smaller" (as asv takes all to be) or "larger".

    asv lists it with the suite, and whoever judges a change reads it there.
    """

    def __init__(self, name, func, attr_sources):
        super().__init__(name, func, attr_sources)
        self.better = _get_first_attr(attr_sources, "better", "smaller")
