"""The block tables of sequences that are stepped together, on the device: only changes are sent."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv import kernels
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.paths import backend_of
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable
from pagedkv.host.interrupts import Uninterrupted
from pagedkv.limits import count_of

KINDS = 32  # of calls whose plans are reused; beyond, those of the batch before
FEW = 64  # ids: up to so many are put into what the device has, sooner than all of them anew


class Batches:
    """Makes the batch of each step of the same rows of a pool.

    Parameters
    ----------
    pool : BlockPool
        The pool.
    tables : list of BlockTable
        Whose rows these are.
    rows : ndarray
        Their rows, int64, shape [B].

    Attributes
    ----------
    rows : ndarray
        As given.
    """

    def __init__(
        self, pool: BlockPool, tables: Sequence[BlockTable], rows: NDArray[np.int64]
    ) -> None:
        self.rows = rows
        self._pool, self._block_size = pool, pool.block_size
        # A row and its number of uses stand for one table.
        self._ids_of_tables, self._uses = [*map(id, tables)], pool.uses[rows]
        self._counts: Sequence[int] = ()  # of the last `extend`
        self._new = np.empty(0, np.int64)  # the same
        # How many more of the same fit what the rows hold, while `BlockPool.changes` is the second.
        self._fitting = 0, -1
        self._versions = np.full(len(rows), -1)
        self._ids = np.empty((len(pool.windows), len(rows), 0), np.int32)  # what the device has
        self._device: mx.array
        self._groups: tuple[mx.array, ...] = ()
        self._lens = pool.lens[rows]  # of the batch before
        self._plans: dict[Hashable, tuple[Any, int]] = {}
        self._position = 0

    def are_of(self, tables: Sequence[BlockTable]) -> bool:
        """Whether these are the tables, in order."""
        self._pool.collect()  # else the id of a dropped table may be another's
        if [*map(id, tables)] != self._ids_of_tables:
            return False
        return bool((self._pool.uses[self.rows] == self._uses).all())

    def extend(self, counts: Sequence[int]) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """Append tokens as `BlockPool.extend` does; return their counts in an array, and copies.

        ValueError, before anything changed, unless there is an integer >= 0 for each row, not all
        are 0, and no sequence stays empty.
        """
        pool, rows = self._pool, self.rows
        steps, changes = self._fitting
        counts = [*counts]
        if steps and pool.changes == changes and counts == self._counts:  # most calls
            pool.lens[rows] += self._new
            pool.changes = changes + 1
            self._fitting = steps - 1, changes + 1
            return self._new, []
        new = _checked(counts, len(rows))
        ends = pool.lens[rows] + new
        if ends.min() < 1:
            row = int(ends.argmin())
            raise ValueError(f"expected context lengths >= 1, got {ends[row]} in row {row}")
        copies = pool.extend(rows, new)
        self._counts, self._new, self._fitting = counts, new, (0, -1)
        if new.min() > 0:
            room = pool.widths[rows] * self._block_size - ends
            self._fitting = int((room // new).min()), pool.changes
        return new, copies

    def next(self) -> DecodeBatch:
        """Return the batch of what the rows hold now.

        If all sequences have grown by the same number of tokens, plans of the last batch are
        reused.
        """
        with Uninterrupted():
            try:
                return self._next()
            except BaseException:  # what the device has is not known
                self._versions, self._ids = self._versions - 1, self._ids[:, :, :0]
                self._plans = {}
                raise

    def _next(self) -> DecodeBatch:
        lens, versions = self._pool.lens[self.rows], self._pool.versions[self.rows]
        changed = versions != self._versions
        if changed.any():
            self._send(np.flatnonzero(changed))
            self._versions = versions
        grown = lens - self._lens
        by = int(grown[0])
        if (grown != by).any():
            self._plans, self._position, by = {}, 0, 0
        self._lens = lens
        if len(self._plans) > KINDS:
            plans = self._plans.items()
            self._plans = {kind: made for kind, made in plans if made[1] == self._position}
        self._position += by
        return DecodeBatch(
            self._groups[0],
            self._block_size,
            self._pool.num_blocks,
            lens,
            self._groups if len(self._groups) > 1 else (),
            self._plans,
            self._position,
        )

    def _send(self, places: NDArray[np.int64]) -> None:
        """Bring the device's tables to the rows at some places.

        MLX on CUDA moves memory from the host by page faults: the less the better.
        """
        pool, backend = self._pool, backend_of(mx.default_device())
        width, room = max(int(pool.widths[self.rows].max()), 1), self._ids.shape[2]
        if width > room:
            room = min(max(width, room + room // 2), pool.ids.shape[2])
            self._ids = np.maximum(pool.ids[:, self.rows, :room], 0)
            device = kernels.array_of(self._ids, backend).reshape(self._ids.shape)
        else:
            now = np.maximum(pool.ids[:, self.rows[places], :room], 0)
            groups, which, columns = (now != self._ids[:, places]).nonzero()
            which = places[which]
            self._ids[:, places] = now
            device = self._device
            if 0 < len(groups) <= FEW:
                where = np.ravel_multi_index((groups, which, columns), self._ids.shape)
                what, flat = self._ids[groups, which, columns], device.reshape(-1)
                if backend == "cuda":
                    flat = kernels.patched(flat, where, what)
                else:
                    flat[mx.array(where.astype(np.int32))] = mx.array(what)
                device = flat.reshape(self._ids.shape)
            elif len(groups):
                device = mx.array(self._ids)
        self._device, self._groups = device, tuple(device)


def _checked(counts: Sequence[int], tables: int) -> NDArray[np.int64]:
    """Return new tokens of each table; ValueError unless they are integers >= 0, not all 0."""
    if len(counts) != tables:
        raise ValueError(
            f"expected one count per table, got {len(counts)} counts for {tables} tables"
        )
    try:
        new = np.frombuffer(array("q", counts), np.int64)
    except (TypeError, OverflowError):
        for count in counts:
            count_of(count, "count")
        raise ValueError(f"expected counts that fit 64 bits, got {counts}") from None
    count_of(int(new.min()), "count")
    if not new.any():
        raise ValueError("expected at least one new token, got counts of 0 alone")
    return new
