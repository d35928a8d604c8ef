"""Blocks for new tokens of several sequences, all or nothing. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter

from pagedkv.errors import PagedKVError
from pagedkv.host.block_pool import Held
from pagedkv.host.block_table import BlockTable


class Reservation:
    """New tokens of several sequences, until `commit` or `undo`; see `Rows.reserve`, which checks.

    What interrupts `commit` or `undo` leaves it open: they can be called again.

    Attributes
    ----------
    copies : list of (int, int)
        Blocks to copy before anything is written: from which id, to which id.
    counts : sequence of int
        New tokens of each.
    is_open : bool
        Whether it has taken blocks and was neither committed nor undone.
    """

    def __init__(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> None:
        self.copies: list[tuple[int, int]] = []
        self.is_open = False
        self._tables, self.counts = tables, counts
        self._pool = tables[0].pool
        self._lengths = [table.num_tokens for table in tables]
        self._before: list[tuple[BlockTable, tuple[array[int], int], int]] = []
        self._blocks: list[int] = []
        self._held: Held | None = None  # the copied blocks, while it is open
        self._pool.watch_open(self)

    def take(self, needs: Sequence[int] | None = None) -> None:
        """Take the blocks, all or nothing, and let the tables grow.

        To undo it after an interrupt, hold a reference to the object.

        Parameters
        ----------
        needs : sequence of int, optional
            What `missing_blocks` says of each, if it is known.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks. Nothing has changed then.
        """
        tables, counts = self._tables, self.counts
        if needs is None:
            pairs = zip(tables, counts, strict=True)
            needs = [table.missing_blocks(count) for table, count in pairs]
        try:
            self.is_open = True
            self._pool.changes += 1
            self._blocks = self._pool.allocate(sum(needs))
            blocks = iter(self._blocks)
            for table, count, need in zip(tables, counts, needs, strict=True):
                if need == 0:  # most of them
                    table.num_tokens += count
                    continue
                self._before.append((table, table.state, count))
                if copied := table.grow(count, list(islice(blocks, need))):
                    self.copies.append(copied)
            if self.copies:
                self._held = self._pool.held_by(self)
                self._held.ids = array("i", map(itemgetter(0), self.copies))
        except BaseException:
            self._restore()
            raise

    def commit(self) -> None:
        """Keep the tokens, and let go of the blocks that were copied.

        Raises
        ------
        PagedKVError
            If it was committed or undone before.
        """
        self._check_open()
        sources = array("i", map(itemgetter(0), self.copies))
        try:
            self._hold(array("i"))
            self.is_open = False
            self._pool.release(sources)
        except BaseException:
            self.is_open = True
            self._hold(sources)
            raise
        for table, (_, length), count in self._before:
            self._pool.pass_by(table, length + count)

    def undo(self) -> None:
        """Leave tables and pool as they were before, the order of free blocks included.

        Raises
        ------
        PagedKVError
            If it was committed or undone before.
        """
        self._check_open()
        self._restore()

    def _hold(self, sources: array[int]) -> None:
        if self._held is not None:
            self._held.ids = sources

    def _restore(self) -> None:
        self._hold(array("i"))  # the tables' again
        self._pool.changes += 1
        for table, (ids, length), _ in self._before:
            # The blocks that were full may have been exchanged for others' since (`share`).
            full = length // table.block_size
            if (own := table.ids[:full]) != ids[:full]:
                ids = own + ids[full:]
            table.state = ids, length
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
