"""Block ids and their reference counts. Host only: the tensors are in `pagedkv.cache`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pagedkv.errors import OutOfBlocksError


class BlockPool:
    """Hands out the ids of a fixed number of blocks and counts who holds them.

    A block that was given back is handed out again, the last one first, before one that was never
    used: what is touched stays small. Every operation takes constant time per block.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool, 1 or more.

    Raises
    ------
    ValueError
        If `num_blocks` is not positive.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"expected num_blocks >= 1, got {num_blocks}")
        self._counts = [0] * num_blocks  # by block id
        self._returned: list[int] = []  # a stack of free ids that were in use before
        self._unused = 0  # this id and all above were never handed out

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._returned) + len(self._counts) - self._unused

    def reference_count(self, block_id: int) -> int:
        """Return how many holders a block has; 0 if it is free.

        Raises
        ------
        ValueError
            If the pool has no such block.
        """
        if not 0 <= block_id < len(self._counts):
            self._check_id(block_id)
        return self._counts[block_id]

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
            If `count` is negative.
        """
        if count < 0:
            raise ValueError(f"expected a count >= 0, got {count}")
        if count > self.num_free:
            raise OutOfBlocksError(f"expected {count} free blocks, {self.num_free} are left")
        reused = min(count, len(self._returned))
        ids = [self._returned.pop() for _ in range(reused)]
        ids += range(self._unused, self._unused + count - reused)
        self._unused += count - reused
        for block_id in ids:
            self._counts[block_id] = 1
        return ids

    def retain(self, block_ids: Sequence[int]) -> None:
        """Add a holder to each of the blocks.

        Raises
        ------
        ValueError
            If one of them is unknown or free; no count has changed then.
        """
        for block_id in block_ids:
            self._check_held(block_id, 1)
        for block_id in block_ids:
            self._counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Take a holder from each of the blocks; one without holders is free again.

        An id that occurs twice loses two holders.

        Raises
        ------
        ValueError
            If one of them is unknown or has fewer holders than are taken; no count has changed
            then.
        """
        for block_id, times in Counter(block_ids).items():
            self._check_held(block_id, times)
        for block_id in block_ids:
            self._counts[block_id] -= 1
            if self._counts[block_id] == 0:
                self._returned.append(block_id)

    def check_invariants(self) -> None:
        """Check that every block is held or free, and free once; for tests, linear time.

        Raises
        ------
        AssertionError
            If the bookkeeping is broken.
        """
        free = {*self._returned, *range(self._unused, self.num_blocks)}
        assert len(free) == self.num_free, "a block is free twice"
        for block_id, count in enumerate(self._counts):
            assert count >= 0, f"block {block_id} has {count} holders"
            assert (count == 0) == (block_id in free), f"block {block_id} is lost or in use"

    def _check_held(self, block_id: int, holders: int) -> None:
        self._check_id(block_id)
        if self._counts[block_id] < holders:
            raise ValueError(
                f"expected block {block_id} to have at least {holders} holders, "
                f"got {self._counts[block_id]}"
            )

    def _check_id(self, block_id: int) -> None:
        if not 0 <= block_id < len(self._counts):
            raise ValueError(f"expected a block id in [0, {self.num_blocks}), got {block_id}")
