"""Which blocks of the pool hold a sequence. Host only: the tensors are in `kv_cache`."""

from __future__ import annotations

import operator
from array import array

import numpy as np
from numpy.typing import NDArray

from pagedkv.block_pool import BlockPool
from pagedkv.errors import SharedBlockError

INT32_MAX = 2**31 - 1


def positive_int32(value: int, name: str) -> int:
    """Return a size as an int that fits the device's 32-bit ids; ValueError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"expected {name} to be an integer, got {value!r}") from None
    if not 1 <= number <= INT32_MAX:
        raise ValueError(f"expected {name} in [1, {INT32_MAX}], got {number}")
    return number


def blocks_needed(tokens: int, block_size: int) -> int:
    """Return how many blocks hold `tokens` tokens: ceil(tokens / block_size).

    Parameters
    ----------
    tokens : int
        Number of tokens, 0 or more.
    block_size : int
        Tokens in a block, 1 or more.

    Returns
    -------
    int
        Number of blocks.

    Raises
    ------
    ValueError
        If `tokens` is negative or `block_size` is not positive.
    """
    if tokens < 0:
        raise ValueError(f"expected tokens >= 0, got {tokens}")
    if block_size < 1:
        raise ValueError(f"expected block_size >= 1, got {block_size}")
    return -(-tokens // block_size)


class BlockTable:
    """The blocks of one sequence, in the order of its tokens, held in a `BlockPool`.

    Host only: it says where tokens lie; `PagedKVCache` moves them.

    Parameters
    ----------
    pool : BlockPool
        Where blocks come from and go back to.
    block_size : int
        Tokens in a block.

    Raises
    ------
    ValueError
        If `block_size` is not a positive integer.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = positive_int32(block_size, "block_size")
        self._ids = array("i")
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in the sequence."""
        return self._num_tokens

    @property
    def block_ids(self) -> NDArray[np.int32]:
        """Ids of its blocks, shape [M], a copy."""
        return np.array(self._ids, dtype=np.int32)

    def slots(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Return the slot of each token from `start` up to but not including `stop`.

        Parameters
        ----------
        start, stop : int
            Positions in tokens, 0 <= start <= stop <= num_tokens; `stop` is the end by default.

        Returns
        -------
        numpy.ndarray
            slot = block_id * S + offset, shape [stop - start].

        Raises
        ------
        ValueError
            If the positions are not in the sequence.
        """
        stop = self._num_tokens if stop is None else stop
        if not 0 <= start <= stop <= self._num_tokens:
            raise ValueError(
                f"expected 0 <= start <= stop <= {self._num_tokens} tokens, got {start}, {stop}"
            )
        blocks, offsets = np.divmod(np.arange(start, stop), self.block_size)
        return np.asarray(self._ids, dtype=np.int64)[blocks] * self.block_size + offsets

    def append(self, count: int = 1) -> NDArray[np.int64]:
        """Make room for tokens at the end, with blocks from the pool as needed.

        Parameters
        ----------
        count : int
            Number of tokens, 0 or more.

        Returns
        -------
        numpy.ndarray
            The slots of the new tokens, shape [count].

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks. Nothing has changed then.
        SharedBlockError
            If the last block is partly filled and has other holders. Nothing has changed then.
        ValueError
            If `count` is negative.
        """
        if count < 0:
            raise ValueError(f"expected a count >= 0, got {count}")
        end = self._num_tokens + count
        if count and self._num_tokens % self.block_size:
            holders = self.pool.reference_count(self._ids[-1])
            if holders > 1:
                raise SharedBlockError(
                    f"expected block {self._ids[-1]} to be this sequence's own before it is "
                    f"written, got {holders} holders"
                )
        self._ids.extend(self.pool.allocate(blocks_needed(end, self.block_size) - len(self._ids)))
        start, self._num_tokens = self._num_tokens, end
        return self.slots(start)

    def fork(self) -> BlockTable:
        """Return a second sequence with the same tokens in the same blocks: nothing is copied."""
        self.pool.retain(self._ids)
        other = BlockTable(self.pool, self.block_size)
        other._ids.extend(self._ids)
        other._num_tokens = self._num_tokens
        return other

    def truncate(self, num_tokens: int) -> None:
        """Drop tokens from the end and give back the blocks that held only them.

        Parameters
        ----------
        num_tokens : int
            Tokens to keep, in [0, self.num_tokens]; 0 gives everything back.

        Raises
        ------
        ValueError
            If the sequence is not that long. Nothing has changed then.
        """
        if not 0 <= num_tokens <= self._num_tokens:
            raise ValueError(f"expected 0 to {self._num_tokens} tokens to keep, got {num_tokens}")
        kept = blocks_needed(num_tokens, self.block_size)
        self.pool.release(self._ids[kept:])
        del self._ids[kept:]
        self._num_tokens = num_tokens
