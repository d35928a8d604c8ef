"""asv plugin: one measuring run at a time in a checkout.

asv installs the commit it measures into an environment that all its runs share: of two runs at
once, one measures the other's commit. Whoever measures holds the lock; asv's commands take it when
this module is loaded as a plugin, unless the program that started them holds it already.
"""

import fcntl
import os
import sys
from pathlib import Path

from asv.util import UserError

FILE = Path(__file__).parents[1] / ".asv/lock"
HELD = "PAGEDKV_MEASURING"  # in the environment of what the holder starts
MEASURING = ("run", "continuous", "find", "profile", "check")  # they install commits


def acquire(file=FILE):
    """Take the lock until this process ends.

    Raises
    ------
    UserError
        If another process has it.
    """
    if os.environ.get(HELD):
        return
    file.parent.mkdir(exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run measures in this checkout ({file.read_text().strip()}); two at once "
            "would measure each other's commits. Wait for it, or use another clone."
        ) from None
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()}: {' '.join(sys.argv)}\n".encode())
    os.environ[HELD] = str(os.getpid())  # the descriptor stays open, and with it the lock


def setup():
    """Take the lock when asv loads this plugin for a command that measures."""
    if Path(sys.argv[0]).stem in ("asv", "__main__") and any(c in sys.argv for c in MEASURING):
        acquire()
