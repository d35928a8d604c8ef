"""One measuring run at a time in a checkout.

asv installs the commit it measures into an environment that all its runs share: of two runs at
once, one measures the other's commit. Whoever measures holds the lock, and so does all that it
starts, also when it is killed itself: the locked file is their standard input, which every program
hands on to what it starts. asv's commands take it in `tracking.safeguards`.
"""

import contextlib
import fcntl
import os
import re
import sys
from pathlib import Path

from asv.util import UserError

FILE = Path(__file__).parents[1] / ".asv/lock"


def acquire(file=FILE):
    """Take the lock until this process and all that it starts have ended.

    `sys.stdin` goes on reading what it did; what is started finds nothing to read.

    Raises
    ------
    UserError
        If somebody else has it.
    OSError
        If the file cannot be made.
    """
    file.parent.mkdir(exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    held = _is_input(descriptor)  # by who started this process; then to lock again is nothing
    try:
        fcntl.flock(0 if held else descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run measures in this checkout ({_holder(file)}); two at once would measure "
            "each other's commits. Wait for it, or use another clone."
        ) from None
    if not held:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}: {' '.join(sys.argv)}\n".encode())
        with contextlib.suppress(OSError):  # there may be no input
            sys.stdin = os.fdopen(os.dup(0))
        os.dup2(descriptor, 0)
    if descriptor:
        os.close(descriptor)
    os.set_inheritable(0, True)


def _is_input(descriptor):
    try:
        return os.path.sameopenfile(0, descriptor)
    except OSError:  # closed
        return False


def _holder(file):
    """Return in words who has the lock."""
    said = file.read_text(errors="replace").strip()
    if match := re.match(r"process (\d+)", said):
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            return f"{said}: that has ended, but not what it started, see `lsof {file}`"
        except (PermissionError, OverflowError):
            pass
    return said
