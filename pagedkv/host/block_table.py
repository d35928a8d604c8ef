"""Which blocks of the pool hold a sequence. Host only: the tensors are in `pagedkv.cache`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import OutOfBlocksError, SharedBlockError
from pagedkv.host.block_pool import BlockPool
from pagedkv.limits import positive_int32


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

    Attributes
    ----------
    num_tokens : int
        Tokens in the sequence, to be read only.

    Raises
    ------
    ValueError
        If `block_size` is not a positive integer.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = positive_int32(block_size, "block_size")
        self._ids = array("i")
        self.num_tokens = 0

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
        stop = self.num_tokens if stop is None else stop
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"expected 0 <= start <= stop <= {self.num_tokens} tokens, got {start}, {stop}"
            )
        blocks, offsets = np.divmod(np.arange(start, stop), self.block_size)
        return np.asarray(self._ids, dtype=np.int64)[blocks] * self.block_size + offsets

    def missing_blocks(self, count: int) -> int:
        """Return how many blocks `count` more tokens take from the pool.

        One of them is for the copy of a partly filled last block, if others hold it.
        """
        if count and self._has_shared_tail():
            return self._new_blocks(count) + 1
        return self._new_blocks(count)

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
            If `count` is not an integer or is negative.
        """
        if not isinstance(count, (int, np.integer)) or count < 0:
            raise ValueError(f"expected a count to be an integer >= 0, got {count}")
        if count and self._has_shared_tail():
            raise SharedBlockError(
                f"expected block {self._ids[-1]} to be this sequence's own before it is written, "
                f"got {self.pool.reference_count(self._ids[-1])} holders"
            )
        start = self.num_tokens
        self._grow(count)
        return self.slots(start)

    def adopt(self, block_ids: Sequence[int], num_tokens: int) -> None:
        """Begin with tokens that others hold, a cached prefix: nothing is copied.

        Parameters
        ----------
        block_ids : sequence of int
            Their blocks, in order, as many as `num_tokens` need.
        num_tokens : int
            Tokens in them. The last block may be partly used; it is copied when it is written.

        Raises
        ------
        ValueError
            If the sequence is not empty, the blocks are too few or too many, or one is unknown or
            free. Nothing has changed then.
        """
        if self.num_tokens:
            raise ValueError(f"expected an empty sequence, got one of {self.num_tokens} tokens")
        if len(block_ids) != blocks_needed(num_tokens, self.block_size):
            raise ValueError(f"expected the blocks of {num_tokens} tokens, got {len(block_ids)}")
        self.pool.retain(block_ids)
        self._ids.extend(block_ids)
        self.num_tokens = num_tokens

    def fork(self) -> BlockTable:
        """Return a second sequence with the same tokens in the same blocks: nothing is copied."""
        other = BlockTable(self.pool, self.block_size)
        other.adopt(self._ids, self.num_tokens)
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
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"expected 0 to {self.num_tokens} tokens to keep, got {num_tokens}")
        kept = blocks_needed(num_tokens, self.block_size)
        self.pool.release(self._ids[kept:][::-1])  # so that the same come back in the same order
        del self._ids[kept:]
        self.num_tokens = num_tokens

    def _has_shared_tail(self) -> bool:
        """Whether the next token goes into a block that others hold."""
        if self.num_tokens % self.block_size == 0:
            return False
        return self.pool.reference_count(self._ids[-1]) > 1

    def _new_blocks(self, count: int) -> int:
        """How many blocks `count` more tokens need beside those that are there."""
        space = len(self._ids) * self.block_size - self.num_tokens
        return 0 if count <= space else -((space - count) // self.block_size)

    def _grow(self, count: int) -> None:
        """Append without looking at who holds the last block."""
        if new := self._new_blocks(count):
            self._ids.extend(self.pool.allocate(new))
        self.num_tokens += count


class Reservation(NamedTuple):
    """Where new tokens of several sequences go.

    Attributes
    ----------
    slots : numpy.ndarray
        The slots of the new tokens, sequence by sequence, shape [sum(counts)].
    copies : list of (int, int)
        Blocks to copy before anything is written: from which id, to which id.
    """

    slots: NDArray[np.int64]
    copies: list[tuple[int, int]]


@contextmanager
def reserve(tables: Sequence[BlockTable], counts: Sequence[int]) -> Iterator[Reservation]:
    """Append to several sequences, all or nothing, with copy-on-write.

    A sequence whose last block is partly filled and has other holders gets a block of its own in
    its place, also when all holders are among the sequences: an exception in the body of the `with`
    statement undoes everything, and then the block must be as it was. The tables are not to be
    changed in there.

    Parameters
    ----------
    tables : sequence of BlockTable
        Distinct sequences of one pool.
    counts : sequence of int
        New tokens of each, 0 or more.

    Yields
    ------
    Reservation
        The new tokens' slots, and the blocks to copy first.

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
    if len({id(table) for table in tables}) < len(tables):
        raise ValueError("expected distinct tables, got one twice")
    pool, block_size = tables[0].pool, tables[0].block_size
    needed = 0
    forked: list[BlockTable] = []
    for table, count in zip(tables, counts, strict=True):
        if table.pool is not pool or table.block_size != block_size:
            raise ValueError("expected tables of one pool and block size")
        if not isinstance(count, (int, np.integer)) or count < 0:
            raise ValueError(f"expected counts to be integers >= 0, got {count}")
        needed += table._new_blocks(count)
        if count and table._has_shared_tail():
            forked.append(table)
    needed += len(forked)
    if needed > pool.num_free:
        raise OutOfBlocksError(f"expected {needed} free blocks, {pool.num_free} are left")

    lengths = [table.num_tokens for table in tables]
    tails = [table._ids[-1] for table in forked]
    own: list[int] = []
    try:
        own += pool.allocate(len(forked))
        for table, block in zip(forked, own, strict=True):
            table._ids[-1] = block
        slots: list[int] = []
        for table, count in zip(tables, counts, strict=True):
            start = table.num_tokens
            table._grow(count)
            if count == 1:  # most of them; an array each would take longer than all the rest
                slots.append(table._ids[-1] * block_size + start % block_size)
            else:
                slots += table.slots(start).tolist()
        copies = list(zip(tails, own, strict=True))
        yield Reservation(np.array(slots, dtype=np.int64), copies)
        pool.release(tails)
    except BaseException:
        for table, length in reversed(list(zip(tables, lengths, strict=True))):
            table.truncate(length)
        for table, tail in zip(forked, tails, strict=True):
            table._ids[-1] = tail
        pool.release(own[::-1])
        raise
