"""Writes files atomically, and shows their names."""

import contextlib
import os
from pathlib import Path


def write_text(file, text):
    """Write a file atomically: it has its new content or, whatever happens, its old one.

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
    """Return a path as text without characters that a terminal or a log would obey."""
    return str(path) if str(path).isprintable() else ascii(str(path))
