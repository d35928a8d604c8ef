"""Files that are there whole or as they were, and their names."""

import contextlib
import os
from pathlib import Path


def write_text(file, text):
    """Write a file so that it is there whole or as it was, whatever happens meanwhile.

    Raises
    ------
    OSError
        If it cannot be written. What was there stays.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def shown(path):
    """Return a path as text that a terminal or a log takes for nothing but text."""
    return str(path) if str(path).isprintable() else ascii(str(path))
