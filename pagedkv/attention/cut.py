"""How the contexts of a batch are cut into work items for the fused kernels, and by how many warps.

A thread group attends over a work item in trips of `tile` tokens. A model of the device says how
long a cut takes; the best of a few is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tuning:
    """The cost model's constants for a device; `make tune` measures them.

    Attributes
    ----------
    processors : int
        Multiprocessors, cores: what holds thread groups.
    warps : tuple of int
        Sizes of a thread group that attends, to choose from.
    resident : int
        Warps that a processor holds at once.
    heavy : int
        The same where a thread needs many registers: 8 query rows, or float32.
    bandwidth : float
        Bytes a microsecond that a processor can read while all of them do.
    trip : float
        Microseconds of a trip that waits for nothing but its own reads.
    start, start_warp : float
        Microseconds that a thread group takes besides its trips, and more for each of its warps.
    join, join_part : float
        Microseconds to join partial outputs, and more for each of one sequence.
    merge_warps : int
        Warps of a thread group that joins.
    """

    processors: int
    warps: tuple[int, ...]
    resident: int
    heavy: int
    bandwidth: float
    trip: float
    start: float
    start_warp: float
    join: float
    join_part: float
    merge_warps: int


_H100 = Tuning(
    processors=132,
    warps=(4, 8, 16),
    resident=16,
    heavy=8,
    bandwidth=23200,
    trip=1.0,
    start=2.8,
    start_warp=0.2,
    join=3.2,
    join_part=0.045,
    merge_warps=8,
)

TUNING: Mapping[str, Tuning] = MappingProxyType(
    {
        # Fitted to kernels' own durations, MLX 0.32.4, float16, 32 and 8 heads of 128, blocks of
        # 32, 1 to 64 sequences of 1k to 32k tokens, each by 4, 8 and 16 warps in 4 to 128 items:
        # what the model takes is at most 0.4% slower than the fastest of these.
        "NVIDIA H100 80GB HBM3": _H100,
        # The same on an H200, in 8 to 128 items: at most 3.1% slower than the fastest of these,
        # 1.2% in the mean; with the H100's constants 8.3% and 1.7%.
        "NVIDIA H200": replace(_H100, bandwidth=30200, trip=0.9),
        "cuda": _H100,
        # Not measured.
        "metal": Tuning(
            processors=32,
            warps=(4, 8),
            resident=8,
            heavy=4,
            bandwidth=12000,
            trip=2.0,
            start=5.0,
            start_warp=0.2,
            join=5.0,
            join_part=0.1,
            merge_warps=8,
        ),
    }
)
"""By a GPU's name, and by backend for all others."""


def tuning_for(gpu: str | None, backend: str) -> Tuning:
    """Return a GPU's constants; those of its backend for an unmeasured GPU."""
    return TUNING.get(gpu or "", TUNING[backend])


MOST_ITEMS = 2**16 - 1  # of a launch, which CUDA counts in 16 bits
# Into how many parts to try and cut the longest context.
_PARTS = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256])


class Cut(NamedTuple):
    """A batch's work.

    Attributes
    ----------
    warps : int
        Warps of a thread group.
    tile : int
        Tokens that it reads in a trip: items are whole tiles, but for the last of a sequence.
    items : ndarray
        (sequence, first token, token past the last, context length), longest items first, shape
        [items, 4].
    rows : ndarray
        Each sequence's items (first, past the last), shape [B, 2].
    """

    warps: int
    tile: int
    items: NDArray[np.int64]
    rows: NDArray[np.int64]


def cut(
    lens: NDArray[np.int64],
    starts: NDArray[np.int64],
    tuning: Tuning,
    *,
    groups: int,
    warp_tokens: int,
    token_bytes: int,
    heavy: bool = False,
) -> Cut:
    """Cut the contexts of a batch into work items, so that all are done soonest.

    Parameters
    ----------
    lens : ndarray
        Context lengths in tokens, shape [B].
    starts : ndarray
        First token of each that is seen at all, shape [B].
    tuning : Tuning
        The device.
    groups : int
        Thread groups that an item takes, one for each KV head or more.
    warp_tokens : int
        Tokens that a warp reads in a trip.
    token_bytes : int
        Bytes of K and V of a token in one KV head.
    heavy : bool
        Whether a thread needs many registers.

    Returns
    -------
    Cut
        The best of those that cut the longest context into equal parts.
    """
    seen = lens - starts
    kind = tuning, groups, warp_tokens, token_bytes, heavy
    if len(seen) == 1:  # one choice serves contexts that differ by a few percent
        length = int(seen[0])
        step = 1 << max(length.bit_length() - 5, 0)
        size, warps = _choice_for_one(-(-length // step) * step, *kind)
    else:
        size, warps = _choice(seen, *kind)
    tile = warps * warp_tokens
    tiles = -(-seen // tile)
    count = -(-tiles // size)  # of a sequence's items, even among themselves
    tokens = -(-tiles // count) * tile
    count = -(-seen // tokens)
    order = np.argsort(-tokens, kind="stable")
    ends = np.empty_like(count)
    ends[order] = np.cumsum(count[order])
    rows = np.empty((len(lens), 2), np.int64)
    rows[:, 0] = ends - count
    rows[:, 1] = ends
    sequence = np.repeat(order, count[order])
    items = np.empty((len(sequence), 4), np.int64)
    each, number = tokens[sequence], np.arange(len(sequence)) - rows[sequence, 0]
    items[:, 0] = sequence
    items[:, 1] = begin = starts[sequence] + number * each
    items[:, 3] = end = lens[sequence]
    np.minimum(begin + each, end, out=items[:, 2])
    return Cut(warps, tile, items, rows)


def _choice(
    seen: NDArray[np.int64],
    tuning: Tuning,
    groups: int,
    warp_tokens: int,
    token_bytes: int,
    heavy: bool,
) -> tuple[int, int]:
    """Return the most tiles of an item and the warps of a thread group, as `cut` has them."""
    resident = tuning.heavy if heavy else tuning.resident
    fitting = [warps for warps in tuning.warps if warps <= resident] or [min(tuning.warps)]
    sizes = [
        _best_size(
            -(-seen // (warps * warp_tokens)),
            warps,
            resident,
            tuning,
            groups,
            token_bytes * warps * warp_tokens,
        )
        for warps in fitting
    ]
    (_, size), warps = min(zip(sizes, fitting, strict=True))
    return size, warps


@lru_cache(maxsize=256)
def _choice_for_one(tokens: int, *kind: Any) -> tuple[int, int]:
    return _choice(np.array([tokens]), *kind)


def _best_size(
    tiles: NDArray[np.int64],
    warps: int,
    resident: int,
    tuning: Tuning,
    groups: int,
    tile_bytes: int,
) -> tuple[float, int]:
    """Return the time of the best cut, and the most tiles that an item has in it.

    By list scheduling: the next item starts when there is room, so the last is done after the
    longest of each round. A trip takes as long as its reads, alone or beside those of the other
    groups of its processor.
    """
    per_processor = max(1, resident // warps)  # groups at once
    slots = max(1, tuning.processors * per_processor // groups)  # items at once
    counts = np.bincount(tiles)
    values = counts.nonzero()[0][::-1]  # longest first
    sizes = -(-values[0] // _PARTS[slots >= _PARTS])
    parts = -(-values // sizes[:, None])  # by size and length
    begun = np.cumsum(parts * counts[values], axis=1)
    possible = begun[:, -1] <= MOST_ITEMS
    possible[0] = True  # not cut
    beside = np.minimum(-(-begun[:, -1] * groups // tuning.processors), per_processor)
    reads = beside * (tile_bytes / tuning.bandwidth)
    trips = (tuning.trip**4 + reads**4) ** 0.25
    rounds = -(-begun // slots)  # begun up to this length
    rounds[:, 1:] -= rounds[:, :-1].copy()
    item = tuning.start + tuning.start_warp * warps + -(-values // parts) * trips[:, None]
    joins = (sizes < values[0]) * (tuning.join + tuning.join_part * parts[:, 0])
    times = (rounds * item).sum(axis=1) + joins
    best = np.where(possible, times, np.inf).argmin()
    return float(times[best]), int(sizes[best])
