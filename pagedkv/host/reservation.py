"""Room for new tokens of several sequences, all or nothing. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import PagedKVError
from pagedkv.host.block_table import BlockTable
from pagedkv.limits import count_of


class Reservation:
    """New tokens of several sequences, until `commit` or `undo`; see `reserve`, which checks.

    What interrupts `commit` or `undo` leaves it open: they can be called again.

    Attributes
    ----------
    copies : list of (int, int)
        Blocks to copy before anything is written: from which id, to which id.
    is_open : bool
        Whether it has taken blocks and was neither committed nor undone.
    """

    def __init__(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> None:
        self.copies: list[tuple[int, int]] = []
        self.is_open = False
        self._tables, self._counts = tables, counts
        self._pool = tables[0].pool
        self._lengths = [table.num_tokens for table in tables]
        self._before: list[tuple[BlockTable, tuple[array[int], int]]] = []
        self._blocks: list[int] = []

    def take(self) -> None:
        """Take the blocks, all or nothing, and let the tables grow.

        Whoever undoes it after an interrupt has to hold the object before.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks. Nothing has changed then.
        """
        tables, counts = self._tables, self._counts
        needs = [table.missing_blocks(count) for table, count in zip(tables, counts, strict=True)]
        try:
            self.is_open = True
            self._blocks = self._pool.allocate(sum(needs))
            blocks = iter(self._blocks)
            for table, count, need in zip(tables, counts, needs, strict=True):
                if need == 0:  # most of them
                    table.num_tokens += count
                    continue
                self._before.append((table, table.state))
                if copied := table.grow(count, list(islice(blocks, need))):
                    self.copies.append(copied)
        except BaseException:
            self._restore()
            raise

    @property
    def slots(self) -> NDArray[np.int64]:
        """The slots of the new tokens, sequence by sequence, shape [sum(counts)]."""
        slots: list[int] = []
        for table, count in zip(self._tables, self._counts, strict=True):
            end = table.num_tokens
            if count == 1:  # most of them; an array each would take longer than all the rest
                block_size = table.block_size
                slots.append(int(table.block_ids[-1]) * block_size + (end - 1) % block_size)
            else:
                slots += table.slots(end - count).tolist()
        return np.array(slots, dtype=np.int64)

    def commit(self) -> None:
        """Keep the tokens, and let go of the blocks that were copied.

        Raises
        ------
        PagedKVError
            If it was committed or undone before.
        """
        self._check_open()
        try:
            self.is_open = False
            self._pool.release([source for source, _ in self.copies])
        except BaseException:
            self.is_open = True
            raise

    def undo(self) -> None:
        """Leave tables and pool as they were before, the order of free blocks included.

        Raises
        ------
        PagedKVError
            If it was committed or undone before.
        """
        self._check_open()
        self._restore()

    def _restore(self) -> None:
        for table, (ids, length) in self._before:
            # The blocks that were full may have been exchanged for others' since (`share`).
            full = length // table.block_size
            table.state = table.state[0][:full] + ids[full:], length
        for table, length in zip(self._tables, self._lengths, strict=True):
            table.num_tokens = length
        blocks = self._blocks
        try:
            self._blocks = []
            self._pool.release(blocks[::-1])
        except BaseException:
            self._blocks = blocks
            raise
        self.is_open = False

    def _check_open(self) -> None:
        if not self.is_open:
            raise PagedKVError("expected an open reservation, got one committed or undone")


def reserve(tables: Sequence[BlockTable], counts: Sequence[int]) -> Reservation:
    """Append to several sequences, all or nothing, with copy-on-write.

    A sequence whose last block is partly filled and has other holders gets a block of its own in
    its place, also when all holders are among the sequences: until the tokens are committed the
    block must stay as it was. The tables are not to be changed before that.

    Parameters
    ----------
    tables : sequence of BlockTable
        Distinct sequences of one pool.
    counts : sequence of int
        New tokens of each, 0 or more.

    Returns
    -------
    Reservation
        The new tokens' slots, and the blocks to copy first; to be committed or undone.

    Raises
    ------
    OutOfBlocksError
        If the pool has too few free blocks for all of it. Nothing has changed then.
    ValueError
        If the tables are not distinct or not of one pool and block size, or the counts are not one
        a table, not integers or negative. Nothing has changed then.
    """
    if not tables or len(tables) != len(counts):
        raise ValueError(
            f"expected one count per table, got {len(counts)} counts for {len(tables)} tables"
        )
    if len(set(map(id, tables))) < len(tables):
        raise ValueError("expected distinct tables, got one twice")
    pool, block_size = tables[0].pool, tables[0].block_size
    if any(table.pool is not pool or table.block_size != block_size for table in tables):
        raise ValueError("expected tables of one pool and block size")
    reservation = Reservation(tables, [count_of(count, "count") for count in counts])
    try:
        reservation.take()
        return reservation
    except BaseException:
        if reservation.is_open:
            reservation.undo()
        raise
