"""Files of the user's cache folders. Host only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, and its folder, so that it is there whole or as it was.

    Other processes may do so at the same time.

    Raises
    ------
    OSError
        If it cannot be written. What was there stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
        os.replace(beside, file)
    except BaseException:
        os.unlink(beside)
        raise
