"""Methods that several threads may call. Host only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


class Locked(Protocol):
    """Something with a lock."""

    lock: AbstractContextManager[Any]


def one_at_a_time(method: Method) -> Method:
    """Let a method wait for those of the same object that other threads have called."""

    @wraps(method)
    def alone(self: Locked, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(Method, alone)
