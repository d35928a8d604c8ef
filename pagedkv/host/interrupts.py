"""Holds Ctrl-C back while bookkeeping changes. Host only."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` without its enums: a tenth of the time
import threading
from types import FrameType
from typing import Any

_SIGINT = int(_signal.SIGINT)
_arrived: list[FrameType | None] = []  # the newest interrupt that was held back


def _note(number: int, frame: FrameType | None) -> None:
    _arrived[:] = [frame]


class Uninterrupted:
    """A context manager: a Ctrl-C that comes in its body is raised after it.

    Python runs signal handlers in the main thread alone, so other threads have nothing to hold
    back. May be nested; the outermost raises. Costs half a microsecond.
    """

    __slots__ = ("_handler",)

    def __enter__(self) -> None:
        self._handler: Any = None
        if threading.get_ident() == threading.main_thread().ident:
            handler = _signal.getsignal(_SIGINT)
            if handler is not _note and callable(handler):
                _arrived.clear()
                self._handler = handler
                _signal.signal(_SIGINT, _note)

    def __exit__(self, *_: object) -> None:
        handler = self._handler
        if handler is not None:
            if _signal.getsignal(_SIGINT) is _note:  # else it was changed meanwhile
                _signal.signal(_SIGINT, handler)
            if _arrived:
                handler(_SIGINT, _arrived.pop())
