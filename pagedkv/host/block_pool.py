"""Block ids and their reference counts. Host only: the tensors are in `pagedkv.cache`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import OutOfBlocksError
from pagedkv.limits import count_of, positive_int32


class BlockPool:
    """Hands out the ids of a fixed number of blocks and counts who holds them.

    A block that was given back is handed out again, the last one first, before one that was never
    used: what is touched stays small. Every operation takes constant time per block, and an
    exception at any point of it, a KeyboardInterrupt too, leaves the pool as it was.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool, 1 or more.

    Attributes
    ----------
    changes : int
        Grows before any `BlockTable` of this pool changes or a block gets another holder: while it
        is the same, so are they.

    Raises
    ------
    ValueError
        If `num_blocks` is not a positive 32-bit integer.
    """

    def __init__(self, num_blocks: int) -> None:
        num_blocks = positive_int32(num_blocks, "num_blocks")
        self._counts = array("i", bytes(4 * num_blocks))  # holders, by block id
        self._view = np.asarray(self._counts)  # of the same memory
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the next one is the last
        self.changes = 0

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def reference_count(self, block_id: int) -> int:
        """Return how many holders a block has; 0 if it is free.

        Raises
        ------
        ValueError
            If the pool has no such block.
        """
        try:
            if block_id >= 0:
                return self._counts[block_id]
        except (IndexError, TypeError):
            pass
        raise ValueError(f"expected a block id in [0, {self.num_blocks}), got {block_id}")

    def shared(self, block_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return which blocks have more than one holder, of ids that the pool has."""
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
            If fewer are free; none is taken then.
        ValueError
            If `count` is not an integer or is negative.
        """
        count = count_of(count, "count")
        counts, free = self._counts, self._free
        kept = len(free) - count
        if kept < 0:
            raise OutOfBlocksError(count, len(free))
        ids = free[kept:]
        ids.reverse()
        try:
            for block_id in ids:
                counts[block_id] = 1
            del free[kept:]
            return ids
        except BaseException:
            for block_id in ids:
                counts[block_id] = 0
            free[kept:] = reversed(ids)
            raise

    def retain(self, block_ids: Sequence[int]) -> None:
        """Add a holder to each of the blocks.

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
        except BaseException as error:
            for block_id in block_ids[:done]:
                counts[block_id] -= 1
            self._explain(error, block_ids)
            raise

    def release(self, block_ids: Sequence[int]) -> None:
        """Take a holder from each of the blocks; one without holders is free again.

        An id that occurs twice loses two holders.

        Raises
        ------
        ValueError
            If one of them is unknown or has fewer holders than are taken; no count has changed
            then.
        """
        counts, free, done = self._counts, self._free, 0
        size = len(free)
        block_ids[:0]
        try:
            for block_id in block_ids:
                count = counts[block_id]
                if count < 1 or block_id < 0:
                    raise IndexError
                counts[block_id], done = count - 1, done + 1
                if count == 1:
                    free.append(int(block_id))
        except BaseException as error:
            for block_id in block_ids[:done]:
                counts[block_id] += 1
            del free[size:]
            self._explain(error, block_ids)
            raise

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is held or free, once; for tests, linear time."""
        free = set(self._free)
        assert len(free) == self.num_free, "a block is free twice"
        for block_id, count in enumerate(self._counts):
            assert count >= 0, f"block {block_id} has {count} holders"
            assert (count == 0) == (block_id in free), f"block {block_id} is lost or in use"

    def _explain(self, error: BaseException, block_ids: Sequence[int]) -> None:
        """Raise a ValueError that says which id was wrong, if one was."""
        if isinstance(error, (IndexError, TypeError)):
            for block_id, times in Counter(block_ids).items():
                if (count := self.reference_count(block_id)) < times:
                    raise ValueError(
                        f"expected block {block_id} to have at least {times} holders, got {count}"
                    ) from None
