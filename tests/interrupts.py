"""KeyboardInterrupt at every place where one can come."""

import sys
from pathlib import Path

import pagedkv

PACKAGE = str(Path(pagedkv.__file__).parent)
LOCKS = str(Path(PACKAGE, "host/turns.py"))


def interrupted(start, operation, *files):
    """Yield (state, whether the operation came to its end) for an interrupt before each line.

    `start()` makes a state, `operation(state)` changes it; lines are those of the package, or of
    some of its files. Not of the locks: where a ``with`` ends there is a line, and no signal comes.
    """
    traced = tuple(str(Path(PACKAGE, name)) for name in files) or PACKAGE

    for number in range(1, 10_000):
        lines = 0

        def trace(frame, event, _, number=number):
            nonlocal lines
            name = frame.f_code.co_filename
            if name == LOCKS or not name.startswith(traced):
                return None
            lines += event == "line"
            if lines == number:
                lines += 1
                raise KeyboardInterrupt
            return trace

        state = start()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            operation(state)
        except KeyboardInterrupt:
            done = False
        else:
            done = True
        finally:
            sys.settrace(before)
        yield state, done
        if done:
            assert number > 3, "nothing was interrupted"
            return
