"""A Ctrl-C at every place where one can come."""

import gc
import itertools
import signal
import sys
from collections import Counter
from pathlib import Path

import pagedkv

PACKAGE = str(Path(pagedkv.__file__).parent)
LOCKS = str(Path(PACKAGE, "host/turns.py"))


def interrupted(start, operation, *files):
    """Yield (state, whether nothing was raised) for a SIGINT before each line.

    `start()` makes a state, `operation(state)` changes it; lines are those of the package, or of
    some of its files. Each line is interrupted the first two times that it runs. Locks are not
    interrupted: where a ``with`` ends there is a line, and no signal comes. Nor are the finalizers
    of other tests' objects: garbage collection waits.
    """
    traced = tuple(str(Path(PACKAGE, name)) for name in files) or PACKAGE
    tried = set()

    for number in itertools.count(1):
        times, is_over = Counter(), False

        def trace(frame, event, _, times=times):
            nonlocal is_over
            name = frame.f_code.co_filename
            if name == LOCKS or not name.startswith(traced):
                return None
            if event == "line" and not is_over:
                line = name, frame.f_lineno
                times[line] += 1
                place = line, times[line]
                if times[line] <= 2 and place not in tried:
                    tried.add(place)
                    is_over = True
                    signal.raise_signal(signal.SIGINT)
            return trace

        state = start()
        before = sys.gettrace()
        gc.disable()
        sys.settrace(trace)
        try:
            operation(state)
        except KeyboardInterrupt:
            done = False
        else:
            done = True
        finally:
            sys.settrace(before)
            gc.enable()
        yield state, done
        if done:
            assert number > 3, "nothing was interrupted"
            return
