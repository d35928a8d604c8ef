"""Methods that several threads may call. Host only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

from pagedkv.host.interrupts import Uninterrupted

Method = TypeVar("Method", bound=Callable[..., Any])
_RLock: Any = type(threading.RLock())


class Locked(Protocol):
    """Something with a lock."""

    lock: AbstractContextManager[Any]


def synchronized(method: Method) -> Method:
    """Let a method wait for those of the same object that other threads have called."""

    @wraps(method)
    def alone(self: Locked, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(Method, alone)


def uninterrupted(method: Method) -> Method:
    """Like `synchronized`; an interrupt that comes during the method is raised after it."""

    @wraps(method)
    def alone(self: Locked, *args: Any, **kwargs: Any) -> Any:
        with self.lock, Uninterrupted():
            return method(self, *args, **kwargs)

    return cast(Method, alone)


class FairLock(_RLock):  # type: ignore[misc]
    """A reentrant lock. A thread that asks for it again comes after those that wait.

    A Ctrl-C leaves it free: Python handles signals after a call, and not at all where a ``with``
    leaves a lock that is written in C.
    """

    def __init__(self) -> None:
        self._next = threading.RLock()

    def __enter__(self) -> bool:
        if self._is_owned():
            return bool(self.acquire())
        try:
            self._next.acquire()
            self.acquire()
            self._next.release()
            return True
        except BaseException:
            if self._next._is_owned():  # type: ignore[attr-defined]
                self._next.release()
            if self._is_owned():
                self.release()
            raise

    def is_free(self) -> bool:
        """Whether this thread could take it without waiting."""
        if self._is_owned():
            return True
        try:
            is_free = bool(self.acquire(blocking=False))
            if is_free:
                self.release()
            return is_free
        except BaseException:
            if self._is_owned():
                self.release()
            raise

    @contextmanager
    def until(self, end: Callable[[], object]) -> Iterator[None]:
        """Have the lock, and call `end` before it is let go of."""
        with self:
            try:
                yield
            finally:
                end()

    def each(self, end: Callable[[], object], items: Iterator[Any]) -> Iterator[Any]:
        """Yield items, each made while this thread has the lock; call `end` when none follows."""
        while True:
            with self:
                try:
                    item = next(items)
                except BaseException as error:
                    end()
                    if isinstance(error, StopIteration):
                        return
                    raise
            yield item
