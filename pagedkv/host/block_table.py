"""The blocks of one sequence. Host only: the tensors are in `pagedkv.cache`."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import PagedKVError, SharedBlockError
from pagedkv.host.block_pool import BlockPool, Ids
from pagedkv.host.interrupts import Uninterrupted
from pagedkv.limits import count_of, positive_int32


def blocks_needed(tokens: int, block_size: int) -> int:
    """Return how many blocks hold `tokens` tokens: ceil(tokens / block_size).

    ValueError if `tokens` is not an integer >= 0, or `block_size` is not a positive one.
    """
    return -(-count_of(tokens, "tokens") // positive_int32(block_size, "block_size"))


class BlockTable:
    """The blocks of one sequence, in the order of its tokens: a row of a `BlockPool`.

    `PagedKVCache` writes and reads what is in them. `free` gives the blocks back; so does dropping
    the table, before blocks are next taken or counted.

    Parameters
    ----------
    pool : BlockPool
        Where blocks come from and go back to.
    block_size : int
        S, tokens in a block.

    Attributes
    ----------
    row : int
        Its row in `BlockPool.ids`.
    namespace : hashable
        Namespace of cached prefixes, for the code that caches the sequence. Forks have the same.

    Raises
    ------
    ValueError
        If `pool` is something else, or `block_size` is not a positive integer or not that of the
        pool's other tables.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        if not isinstance(pool, BlockPool):
            raise ValueError(f"expected a BlockPool, got {pool!r}")
        self.pool = pool
        self.block_size = pool.use_block_size(block_size)
        self.namespace: Hashable = None
        with Uninterrupted():
            self.row = pool.new_row()
            self._use = pool.uses[self.row]
            pool.on_drop(self, partial(pool.free_row, self.row))

    @property
    def is_in_use(self) -> bool:
        """Whether it was not dropped, as a finalizer may see it."""
        return bool(self.pool.uses[self.row] == self._use)

    @property
    def num_tokens(self) -> int:
        """Tokens in the sequence."""
        return int(self.pool.lens[self.held_row()])

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Ids of its blocks in each group of layers, shape [G, M]; a copy."""
        row = self.held_row()
        return self.pool.ids[:, row, : self.pool.widths[row]].copy()

    @property
    def block_ids(self) -> NDArray[np.int32]:
        """Ids of its blocks in the first group of layers, which sees all, shape [M]; a copy."""
        ids: NDArray[np.int32] = self.blocks[0]
        return ids

    def slots(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Return the slots of tokens in the first group of layers.

        Parameters
        ----------
        start, stop : int
            Positions, 0 <= start <= stop <= num_tokens; `stop` is the end by default.

        Returns
        -------
        numpy.ndarray
            slot = block_id * S + offset, shape [stop - start].

        Raises
        ------
        ValueError
            If the positions are not in the sequence.
        """
        length = self.num_tokens
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"expected 0 <= start <= stop <= {length} tokens, got {start}, {stop}")
        blocks, offsets = np.divmod(np.arange(start, stop), self.block_size)
        ids: NDArray[np.int64] = self.pool.ids[0, self.row, blocks].astype(np.int64)
        return ids * self.block_size + offsets

    def append(self, count: int = 1) -> NDArray[np.int64]:
        """Append slots for tokens at the end, with blocks from the pool as needed.

        Parameters
        ----------
        count : int
            Number of tokens, 0 or more.

        Returns
        -------
        numpy.ndarray
            The slots of the new tokens, as `slots`.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks. Nothing has changed then.
        SharedBlockError
            If the last block is partly filled and others hold it: `PagedKVCache.extend` copies it.
            Nothing has changed then.
        ValueError
            If `count` is not an integer or is negative.
        """
        count, start = count_of(count, "count"), self.num_tokens
        if count and start % self.block_size:
            [last] = self.blocks[:1, -1]
            if self.pool.refs[last] > 1:
                raise SharedBlockError(
                    f"expected block {last} to be this sequence's own before it is written, "
                    "others hold it"
                )
        row = np.array([self.row])
        self.pool.extend(row, np.array([count]))
        slots = self.slots(start)
        self.pool.leave_windows(row, self.pool.lens[row])
        return slots

    def adopt(self, blocks: Ids, num_tokens: int) -> None:
        """Start with the blocks of a cached prefix: nothing is copied.

        Parameters
        ----------
        blocks : sequence of int
            Their blocks, in order, as many as `num_tokens` need; of several groups, [G, M].
        num_tokens : int
            Tokens in them. The last block may be partly used; it is copied when it is written.

        Raises
        ------
        ValueError
            If the sequence is not empty, the blocks are too few or too many, one is unknown or
            free, or lacks what the next token sees. Nothing has changed then.
        """
        length, num_tokens = self.num_tokens, count_of(num_tokens, "num_tokens")
        if length:
            raise ValueError(f"expected an empty sequence, got one of {length} tokens")
        ids = self.pool.by_group(blocks)
        if ids.shape[1] != blocks_needed(num_tokens, self.block_size):
            raise ValueError(f"expected the blocks of {num_tokens} tokens, got {ids.shape[1]}")
        self._check_seen(ids, num_tokens)
        self.pool.adopt(self.row, ids, num_tokens)

    def fork(self) -> BlockTable:
        """Return a second sequence over the same blocks: nothing is copied."""
        row, other = self.held_row(), BlockTable(self.pool, self.block_size)
        other.namespace = self.namespace
        self.pool.fork(row, other.row)
        return other

    def truncate(self, num_tokens: int) -> None:
        """Drop tokens from the end, and free the blocks that held only them.

        Parameters
        ----------
        num_tokens : int
            Tokens to keep, in [0, self.num_tokens].

        Raises
        ------
        ValueError
            If the sequence is not that long, or what the next token would see has left a window.
            Nothing has changed then.
        """
        num_tokens, length = count_of(num_tokens, "num_tokens"), self.num_tokens
        if num_tokens > length:
            raise ValueError(f"expected 0 to {length} tokens to keep, got {num_tokens}")
        if num_tokens:
            kept = blocks_needed(num_tokens, self.block_size)
            self._check_seen(self.blocks[:, :kept], num_tokens)
        self.pool.truncate(self.row, num_tokens)

    def free(self) -> None:
        """Drop all tokens, and give all blocks back."""
        self.truncate(0)

    def sees_all(self, num_tokens: int) -> bool:
        """Whether the blocks of the first `num_tokens` have what the next token sees."""
        kept = self.blocks[:, : blocks_needed(num_tokens, self.block_size)]
        return self.pool.sees_all(kept, num_tokens)

    def _check_seen(self, blocks: NDArray[np.int32], num_tokens: int) -> None:
        if not self.pool.sees_all(blocks, num_tokens):
            raise ValueError(
                f"expected blocks with all that is seen after {num_tokens} tokens, some of it has "
                "left a window"
            )

    def held_row(self) -> int:
        """Return its row; PagedKVError if it was dropped."""
        if not self.is_in_use:
            raise PagedKVError("expected a table in use, this one was dropped and has no blocks")
        return self.row
