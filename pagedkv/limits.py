"""Checks of integers: sizes and ids that fit the device's 32 bits. Host only."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

INT32_MAX = 2**31 - 1


def count_of(value: int, name: str) -> int:
    """Return a count as an int; ValueError if it is not an integer or is negative."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"expected {name} to be an integer >= 0, got {value!r}")
    return number


def positive_int32(value: int, name: str) -> int:
    """Return a size as an int that fits the device's 32-bit ids; ValueError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"expected {name} to be an integer, got {value!r}") from None
    if not 1 <= number <= INT32_MAX:
        raise ValueError(f"expected {name} in [1, {INT32_MAX}], got {number}")
    return number


def id_below(limit: int, value: int, name: str) -> int:
    """Return an id in [0, limit) as an int; ValueError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < limit:
        raise ValueError(f"expected {name} in [0, {limit}), got {value}")
    return number


def integers(values: Sequence[int] | NDArray[np.integer], name: str) -> NDArray[np.int64]:
    """Return `values` as a one-dimensional int64 array, refusing anything but integers."""
    if isinstance(values, list) and values and type(values[0]) is int:
        with suppress(TypeError, OverflowError):
            return np.frombuffer(array("q", values), np.int64)  # in a third of the time
    found = np.asarray(values)
    if found.ndim != 1:
        raise ValueError(f"expected {name} to be one-dimensional, got {found.ndim} dimensions")
    if found.size == 0:
        raise ValueError(f"expected {name} to have at least one entry, got none")
    if found.dtype.kind not in "iu":
        raise ValueError(f"expected {name} to hold integers, got {found.dtype}")
    return found.astype(np.int64)
