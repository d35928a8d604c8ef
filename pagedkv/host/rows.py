"""The block tables of a batch as one array, kept up while the sequences grow. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from pagedkv.host.block_table import BlockTable, slots_of
from pagedkv.host.reservation import Reservation
from pagedkv.limits import count_of


class Seen:
    """What tables held at one time.

    Attributes
    ----------
    tables : list of BlockTable
        The sequences.
    ids : list of array
        Their `BlockTable.ids`, which are never changed; nor is this list.
    lens : ndarray
        Their tokens, shape [B], int64.
    changes : int
        `BlockPool.changes` at that time, or later if they were still like that.
    """

    __slots__ = ("changes", "ids", "lens", "tables")

    def __init__(
        self,
        tables: list[BlockTable],
        ids: list[array[int]],
        lens: NDArray[np.int64],
        changes: int,
    ) -> None:
        self.tables, self.ids, self.lens, self.changes = tables, ids, lens, changes

    @classmethod
    def of(cls, tables: list[BlockTable]) -> Seen:
        """Look at tables."""
        changes = tables[0].pool.changes
        lens = np.array([table.num_tokens for table in tables], np.int64)
        return cls(tables, [table.ids for table in tables], lens, changes)

    def holds(self) -> bool:
        """Whether the tables are still like that; in constant time while no table changes."""
        if self.tables[0].pool.changes != self.changes:
            now = Seen.of(self.tables)
            if not now.tables[0].pool.same(now.ids, self.ids) or not np.array_equal(
                now.lens, self.lens
            ):
                return False
            self.changes = now.changes
        return True

    def last_slots(self, counts: Sequence[int]) -> NDArray[np.int64]:
        """Return the slots of the last `counts` tokens, sequence by sequence."""
        block_size = self.tables[0].block_size
        if set(counts) == {1}:
            last = np.array([ids[-1] for ids in self.ids], np.int64)
            return last * block_size + (self.lens - 1) % block_size
        slots = [np.empty(0, np.int64)]
        for ids, end, count in zip(self.ids, self.lens.tolist(), counts, strict=True):
            slots.append(slots_of(ids, block_size, end - count, end))
        return np.concatenate(slots)


class Rows:
    """Block tables as rows of one array, and how their sequences grow together.

    It is a copy of the tables, and compares them before each use: code that changes them in
    between need not know of it. If an exception comes out of a method, it is not to be used again.

    Parameters
    ----------
    tables : list of BlockTable
        The sequences. The list is kept.

    Attributes
    ----------
    seen : Seen
        The contents of the tables at the last check.
    changed : list of int
        Rows with another id since this list was last emptied.

    Raises
    ------
    ValueError
        If there is no table, one comes twice, or they are not of one pool and block size.
    """

    def __init__(self, tables: list[BlockTable]) -> None:
        if not tables:
            raise ValueError("expected at least one table, got none")
        if len(set(map(id, tables))) < len(tables):
            raise ValueError("expected distinct tables, got one twice")
        self._pool, self._block_size = tables[0].pool, tables[0].block_size
        if any(t.pool is not self._pool or t.block_size != self._block_size for t in tables):
            raise ValueError("expected tables of one pool and block size")
        self._counts: array[int] | None = None  # of the last reservation, if all are positive
        self._added = np.empty(0, np.int64)  # the same
        # How many more of the same fit what the sequences hold, while `changes` is the second.
        self._ahead = 0, -1
        self._array = np.zeros((len(tables), 1), np.int32)
        self._widths = np.zeros(len(tables), np.int64)
        self._places = np.arange(len(tables))
        self._no_needs = [0] * len(tables)
        self.changed: list[int] = []
        self._refs = [ref(table) for table in tables]
        self.seen = Seen.of(tables)
        self._write(list(range(len(tables))))

    @property
    def block_tables(self) -> NDArray[np.int32]:
        """Block ids, shape [B, M]; a shorter row repeats its first. Written over as tables grow."""
        return self._array[:, : max(self._widths.max(), 1)]

    @property
    def room(self) -> NDArray[np.int32]:
        """As `block_tables`, with an M that is larger and seldom changes."""
        return self._array

    def let_go(self) -> None:
        """Hold no table until `take_up`: one that everybody else drops gives its blocks back."""
        seen = self.seen
        self.seen = Seen([], seen.ids, seen.lens, seen.changes)

    def take_up(self, tables: list[BlockTable]) -> bool:
        """Return whether these are the tables, in order; if so, they are held again."""
        if [reference() for reference in self._refs] != tables:
            return False
        seen = self.seen
        self.seen = Seen(tables, seen.ids, seen.lens, seen.changes)
        return True

    def follow(self) -> Seen:
        """Look at the tables, and return what they hold now."""
        before = self.seen
        if self._pool.changes != before.changes:
            self.seen = Seen.of(before.tables)
            if not self._pool.same(self.seen.ids, before.ids):
                pairs = zip(before.ids, self.seen.ids, strict=True)
                self._write([row for row, (old, new) in enumerate(pairs) if new is not old])
        return self.seen

    def reserve(self, counts: Sequence[int]) -> Reservation:
        """Append to the sequences, all or nothing, with copy-on-write.

        A sequence whose last block is partly filled and has other holders gets a block of its own
        in its place, also when all holders are among the sequences: until the tokens are committed
        the block must stay as it was. The tables are not to be changed before that.

        Parameters
        ----------
        counts : sequence of int
            New tokens of each, 0 or more, not all 0.

        Returns
        -------
        Reservation
            The blocks to copy first; to be committed or undone.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks for all of it. Nothing has changed then.
        ValueError
            If the counts are not one a table, not integers or negative, or all 0, or a sequence
            stays empty. Nothing has changed then.
        """
        seen = self.follow()
        new = self._checked(counts)
        again = new == self._counts
        added = self._added if again else np.frombuffer(new, np.int64)
        ends = seen.lens + added
        if not again:
            self._check_growth(added, ends)
            self._counts, self._added = (new if added.min() > 0 else None), added
        ahead, changes = self._ahead
        fits = again and ahead > 0 and self._pool.changes == changes
        needs = self._no_needs if fits else self._needs(added, ends)
        # Not in the `try`: Python 3.12 passes it over for an interrupt inside of a comprehension.
        grown = [] if fits else [row for row, need in enumerate(needs) if need]
        reservation = Reservation(seen.tables, new)
        try:
            reservation.take(needs)
            ids = seen.ids
            if grown:
                ids = ids.copy()
                for row in grown:
                    ids[row] = seen.tables[row].ids
            self.seen = Seen(seen.tables, ids, ends, self._pool.changes)
            if grown:
                self._write(grown, appended=max(needs) == 1 and not reservation.copies)
            if self._counts is not None:
                if not fits:
                    ahead = 1 + int(((self._widths * self._block_size - ends) // added).min())
                self._ahead = ahead - 1, self._pool.changes
            return reservation
        except BaseException:
            if reservation.is_open:
                reservation.undo()
            raise

    def _needs(self, added: NDArray[np.int64], ends: NDArray[np.int64]) -> list[int]:
        """Return how many blocks each sequence takes to grow."""
        needs = -(-ends // self._block_size) - self._widths
        shared = self._pool.shared(self._tails)
        if shared.any():  # full blocks may be
            needs += shared & (self.seen.lens % self._block_size > 0) & (added > 0)
        missing: list[int] = needs.tolist()
        return missing

    def _checked(self, counts: Sequence[int]) -> array[int]:
        """Return counts as an array of int64; ValueError unless there is an integer a table."""
        if len(counts) != len(self.seen.tables):
            raise ValueError(
                f"expected one count per table, "
                f"got {len(counts)} counts for {len(self.seen.tables)} tables"
            )
        try:
            return array("q", counts)
        except (TypeError, OverflowError):
            for count in counts:
                count_of(count, "count")
            raise ValueError(f"expected counts that fit 64 bits, got {counts}") from None

    @staticmethod
    def _check_growth(added: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        count_of(int(added.min()), "count")
        if not added.any():
            raise ValueError("expected at least one new token, got counts of 0 alone")
        if ends.min() < 1:
            row = int(ends.argmin())
            raise ValueError(f"expected context lengths >= 1, got {ends[row]} in row {row}")

    def _write(self, rows: list[int], *, appended: bool = False) -> None:
        """Bring rows of the array to what was seen; `appended`: to each a block at the end."""
        ids = [self.seen.ids[row] for row in rows]
        widths = [len(blocks) for blocks in ids]
        missing = max(widths) - self._array.shape[1]
        if missing > 0:
            more = np.repeat(self._array[:, :1], max(missing, self._array.shape[1] // 2), axis=1)
            self._array = np.concatenate([self._array, more], axis=1)
        if appended and min(widths) > 1:
            self._array[rows, np.array(widths) - 1] = [blocks[-1] for blocks in ids]
        elif len(rows) < 8:
            for row, blocks, width in zip(rows, ids, widths, strict=True):
                self._array[row] = blocks[0] if blocks else 0
                self._array[row, :width] = blocks
        else:  # the same at once; a zero more, where an empty sequence at the end would begin
            flat = np.frombuffer(b"".join([*ids, array("i", [0])]), np.int32)
            stops = np.array(widths)[:, None]
            columns = np.arange(self._array.shape[1])
            starts = np.cumsum(widths)[:, None] - stops
            self._array[rows] = flat[starts + np.where(columns < stops, columns, 0)]
        self._widths[rows] = widths
        self._tails = self._array[self._places, self._widths - 1]
        self.changed += rows
