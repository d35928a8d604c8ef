"""Block ids and their reference counts. Host only: the tensors are in `pagedkv.cache`."""

from __future__ import annotations

import weakref
from array import array
from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import OutOfBlocksError
from pagedkv.limits import count_of, positive_int32


class Table(Protocol):
    """What a pool reads of a `BlockTable`; `passed` is its own."""

    held: Held
    passed: int

    @property
    def block_ids(self) -> NDArray[np.int32]:
        """Its blocks, in order."""


class Copies(Protocol):
    """What a pool reads of a `Reservation`."""

    is_open: bool
    copies: list[tuple[int, int]]


class Ids(Protocol):
    """Ids of blocks, as a list or an array is."""

    def __getitem__(self, part: slice, /) -> Sequence[int]:
        """Return a part of them."""


class Held(weakref.ref[Any]):
    """A weak reference to an object, with the ids of the blocks that it holds.

    The object sets `ids`; when it is gone, the pool takes them back. `counted` is the pool's: the
    blocks that `FramePool` has counted the object for, and how far it was.

    The garbage collector may run while the pool is being changed. So an object's end calls only
    `deque.append`, which an interrupt cannot divide; the pool's next operation does the rest.
    """

    __slots__ = ("counted", "ids")
    ids: Ids
    counted: tuple[NDArray[np.int32], int] | None


_NONE = array("i")


class BlockPool:
    """Allocates a fixed number of blocks and counts the holders of each.

    Freed blocks are reused, the last one first, before blocks that were never used, so that few
    blocks are touched. Every operation takes constant time per block, and an exception at any
    point, including KeyboardInterrupt, leaves the pool as it was. The blocks of a dropped
    `BlockTable` become free before blocks are next allocated or counted.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool, 1 or more.

    Attributes
    ----------
    guarded : list of int
        A cached prefix that a sequence is about to start from: the frames that it sees are not
        reclaimed.
    changes : int
        Grows before any `BlockTable` of this pool changes or a block gets another holder.

    Raises
    ------
    ValueError
        If `num_blocks` is not a positive 32-bit integer.
    """

    unit = "blocks"  # what a budget is counted in

    def __init__(self, num_blocks: int) -> None:
        num_blocks = positive_int32(num_blocks, "num_blocks")
        self._counts = array("i", bytes(4 * num_blocks))  # holders, by block id
        self._view = np.asarray(self._counts)  # of the same memory
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the next one is the last
        self.changes = 0
        self.guarded: list[int] = []
        self._held: set[Held] = set()
        self._dropped: deque[Held] = deque()

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        self.collect()
        return len(self._free)

    @property
    def num_frames(self) -> int:
        """Frames in the pool, see `FramePool`; here a block is one."""
        return self.num_blocks

    @property
    def num_free_frames(self) -> int:
        """Frames that no block has."""
        return self.num_free

    def frames_needed(self, blocks: int, blocks_at_once: int) -> int:
        """Return the most frames that a sequence holds while it grows to `blocks` blocks.

        Parameters
        ----------
        blocks : int
            Blocks of the sequence.
        blocks_at_once : int
            Blocks that it takes at most in one step, or in steps under way together.
        """
        return blocks

    def frames_seen(self, blocks: int) -> int:
        """Return how many frames a sequence holds that starts with `blocks` cached blocks."""
        return blocks

    def frames_seeing_all(self, blocks: int) -> int:
        """Return how many frames `blocks` blocks have in groups of layers that see all tokens."""
        return blocks

    def frames_of_cached(self, num_blocks: int) -> int:
        """Return how many frames only cached prefixes use, of `num_blocks` blocks."""
        return num_blocks

    def group_frames(self) -> tuple[int, ...]:
        """Return how many frames each group of layers has."""
        return (self.num_blocks - self.num_free,)

    def places(self, block_ids: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return where blocks lie in the pools of each group of layers, shape [groups, ...]."""
        return block_ids[None].astype(np.int32, copy=False)

    def num_places(self, block_ids: Collection[int], group: int) -> int:
        """Return how many of some blocks have a place in a group of layers."""
        return len(block_ids)

    def is_all_there(self, block_ids: NDArray[np.int32]) -> bool:
        """Whether blocks have a place in every group of layers."""
        return True

    def same(self, now: list[array[int]], before: list[array[int]]) -> bool:
        """Whether tables' `ids` stand for the same places in the pools as before."""
        return now == before  # by identity first: few arrays are looked into

    def watch(self, table: Table) -> None:
        """Note that a table may see blocks of this pool."""

    def watch_open(self, reservation: Copies) -> None:
        """Note that a reservation may give tables the blocks back that it has copied."""

    def held_by(self, owner: object) -> Held:
        """Return where an object notes which blocks it holds, to be taken back when it is gone."""
        held = Held(owner, self._dropped.append)
        held.ids, held.counted = _NONE, None
        self._held.add(held)
        return held

    def is_held(self, held: Held) -> bool:
        """Whether what an object holds was not taken back yet.

        A finalizer may come to an object that it belonged to after that: the garbage collector
        runs callbacks of weak references first.
        """
        return held in self._held

    def collect(self) -> None:
        """Take back the blocks of objects that were dropped; what interrupts it can call it again.

        Whatever counts or takes blocks begins with this.
        """
        while self._dropped:
            held = self._dropped[0]
            ids = held.ids
            try:
                held.ids = _NONE
                # From the end, as `BlockTable.truncate` does.
                self.release(ids[::-1])
            except BaseException:
                held.ids = ids
                raise
            self._gone(held)
            self._held.discard(held)
            self._dropped.popleft()

    def changed(self, held: Held) -> None:
        """Note that a table is about to change."""
        self.changes += 1

    def remember(self) -> None:
        """Note that blocks are cached: they may be reused when no sequence sees them any more."""

    def pass_by(self, table: Table, num_tokens: int) -> None:
        """Note how many tokens of a table are final: blocks that no later token sees may go."""

    def holds_seen(self, block_ids: NDArray[np.int32], num_tokens: int) -> bool:
        """Whether these blocks still hold everything that tokens after `num_tokens` see."""
        return True

    def reusable(self, block_ids: Sequence[int]) -> int:
        """Return how many blocks from the first on a sequence can begin with."""
        return len(block_ids)

    def hand_over(self, own: Sequence[int], others: Sequence[int], before: list[Any]) -> None:
        """Prepare for others' blocks to take the place of a table's own; `restore` undoes it."""

    def restore(self, before: list[Any]) -> None:
        """Undo what was noted in `before`."""

    def begun_with(self, block_ids: NDArray[np.int32], num_tokens: int) -> None:
        """Note that a sequence has started with cached blocks of `num_tokens` tokens."""

    def reclaim(self, num_blocks: int, *, asked_for: bool) -> int:
        """Take back frames that no sequence sees; return how many blocks became free."""
        return 0

    def reference_count(self, block_id: int) -> int:
        """Return the number of holders of a block; 0 if it is free.

        Raises
        ------
        ValueError
            If the pool has no such block.
        """
        if self._dropped:
            self.collect()
        return self._holders(block_id)

    def shared(self, block_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return which blocks have more than one holder, of ids that the pool has."""
        self.collect()
        held: NDArray[np.bool_] = self._view[block_ids] > 1
        return held

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one holder.

        Parameters
        ----------
        count : int
            Number of blocks, 0 or more.

        Returns
        -------
        list of int
            Their ids.

        Raises
        ------
        OutOfBlocksError
            If fewer are free; none is allocated then.
        ValueError
            If `count` is not an integer or is negative.
        """
        count = count_of(count, "count")
        self.collect()
        counts, free = self._counts, self._free
        kept = len(free) - count
        if kept < 0:
            raise OutOfBlocksError(count, len(free))
        ids = free[kept:]
        ids.reverse()
        before: list[Any] = []
        try:
            for block_id in ids:
                counts[block_id] = 1
            del free[kept:]
            if ids:
                self._taken(ids, before)
            return ids
        except BaseException:
            for block_id in ids:
                counts[block_id] = 0
            free[kept:] = reversed(ids)
            self.restore(before)
            raise

    def retain(self, block_ids: Sequence[int]) -> int:
        """Add a holder to each of the blocks; return their number.

        Raises
        ------
        ValueError
            If one of them is unknown or free; no count has changed then.
        """
        counts, done = self._counts, 0
        block_ids[:0]
        self.changes += 1
        try:
            for block_id in block_ids:
                count = counts[block_id]
                if count < 1 or block_id < 0:
                    raise IndexError
                # One statement: an interrupt comes between two, and what was done must be known.
                counts[block_id], done = count + 1, done + 1
            return done
        except BaseException as error:
            for block_id in block_ids[:done]:
                counts[block_id] -= 1
            self._explain(error, block_ids)
            raise

    def release(self, block_ids: Sequence[int]) -> None:
        """Remove a holder from each of the blocks; a block without holders becomes free.

        An id that occurs twice loses two holders.

        Raises
        ------
        ValueError
            If one of them is unknown or has fewer holders than are taken; no count has changed
            then.
        """
        counts, free, done = self._counts, self._free, 0
        size = len(free)
        before: list[Any] = []
        block_ids[:0]
        try:
            for block_id in block_ids:
                count = counts[block_id]
                if count < 1 or block_id < 0:
                    raise IndexError
                counts[block_id], done = count - 1, done + 1
                if count == 1:
                    free.append(int(block_id))
            if len(free) > size:
                self._emptied(free[size:], before)
        except BaseException as error:
            for block_id in block_ids[:done]:
                counts[block_id] += 1
            del free[size:]
            self.restore(before)
            self._explain(error, block_ids)
            raise

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is held or free, once; for tests, linear time."""
        self.collect()
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id, count in enumerate(self._counts):
            assert count >= 0, f"block {block_id} has {count} holders"
            assert (count == 0) == (block_id in free), f"block {block_id} is lost or in use"

    def _gone(self, held: Held) -> None:
        """Note that an object which was dropped holds nothing any more."""

    def _holders(self, block_id: int) -> int:
        try:
            if block_id >= 0:
                return self._counts[block_id]
        except (IndexError, TypeError):
            pass
        raise ValueError(f"expected a block id in [0, {self.num_blocks}), got {block_id}")

    def _taken(self, block_ids: list[int], before: list[Any]) -> None:
        """Give blocks what they need; note in `before` what `restore` needs."""

    def _emptied(self, block_ids: list[int], before: list[Any]) -> None:
        """Let go of what blocks had that are free now; note in `before` what `restore` needs."""

    def _explain(self, error: BaseException, block_ids: Sequence[int]) -> None:
        """Raise a ValueError that says which id was wrong, if one was."""
        if isinstance(error, (IndexError, TypeError)):
            for block_id, times in Counter(block_ids).items():
                if (count := self._holders(block_id)) < times:
                    raise ValueError(
                        f"expected block {block_id} to have at least {times} holders, got {count}"
                    ) from None
