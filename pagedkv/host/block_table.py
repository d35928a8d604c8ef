"""Which blocks of the pool hold a sequence. Host only: the tensors are in `pagedkv.cache`."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import PagedKVError, SharedBlockError
from pagedkv.host.block_pool import BlockPool
from pagedkv.limits import count_of, positive_int32


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
        If `tokens` is not an integer or negative, or `block_size` is not a positive one.
    """
    return -(-count_of(tokens, "tokens") // positive_int32(block_size, "block_size"))


def slots_of(ids: array[int], block_size: int, start: int, stop: int) -> NDArray[np.int64]:
    """Return the slot of each token from `start` up to `stop` in blocks of these ids, unchecked."""
    blocks, offsets = np.divmod(np.arange(start, stop), block_size)
    return np.asarray(ids, dtype=np.int64)[blocks] * block_size + offsets


class BlockTable:
    """The blocks of one sequence, in the order of its tokens, held in a `BlockPool`.

    Host only: it says where tokens lie; `PagedKVCache` moves them. `truncate` gives blocks back;
    so does dropping the table, before the pool next takes or counts blocks.

    Parameters
    ----------
    pool : BlockPool
        Where blocks come from and go back to.
    block_size : int
        Tokens in a block.

    Attributes
    ----------
    ids : array of int32
        Ids of its blocks, read-only. The array is replaced, never changed, so that a reference to
        it stays valid.
    num_tokens : int
        Tokens in the sequence, read-only.
    passed : int
        Tokens that had already left every window when frames were last freed, see `FramePool`; for
        the pool.
    held : Held
        Its blocks, for the pool.
    namespace : hashable
        Namespace of cached prefixes, for the code that caches the sequence. Forks have the same.

    Raises
    ------
    ValueError
        If `pool` is something else, or `block_size` is not a positive integer.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        if not isinstance(pool, BlockPool):
            raise ValueError(f"expected a BlockPool, got {pool!r}")
        self.pool = pool
        self.block_size = positive_int32(block_size, "block_size")
        self.ids = array("i")
        self.num_tokens = self.passed = 0
        self.namespace: Hashable = None
        pool.collect()  # else dropped tables pile up
        self.held = pool.held_by(self)
        pool.watch(self)

    @property
    def block_ids(self) -> NDArray[np.int32]:
        """Ids of its blocks now, shape [M], read-only; no copy."""
        ids = np.asarray(self.ids)
        ids.flags.writeable = False
        return ids

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
        return slots_of(self.ids, self.block_size, start, stop)

    def missing_blocks(self, count: int) -> int:
        """Return how many blocks `count` more tokens need from the pool.

        One of them is for the copy of a partly filled last block, if others hold it.

        Raises
        ------
        ValueError
            If `count` is not an integer or is negative.
        """
        self._check_held()
        used = self.num_tokens % self.block_size  # of the last block, 0 if it is full
        own = used and self.pool.reference_count(self.ids[-1]) == 1
        if count == 1 and own:  # most calls
            return 0
        count = count_of(count, "count")
        new = -(-(used + count) // self.block_size)
        return new - bool(own or (used and not count))

    def append(self, count: int = 1) -> NDArray[np.int64]:
        """Append slots for tokens at the end, with blocks from the pool as needed.

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
            If the last block is partly filled and has other holders: `Rows.reserve` has it
            copied. Nothing has changed then.
        ValueError
            If `count` is not an integer or is negative.
        """
        count = count_of(count, "count")
        start = self.num_tokens
        if start % self.block_size and count and self.pool.reference_count(self.ids[-1]) > 1:
            raise SharedBlockError(
                f"expected block {self.ids[-1]} to be this sequence's own before it is written, "
                "others hold it"
            )
        blocks = self.pool.allocate(self.missing_blocks(count))
        try:
            self.grow(count, blocks)
            slots = self.slots(start)
            self.pool.pass_by(self, self.num_tokens)
            return slots
        except BaseException:
            self.state = self.ids[: blocks_needed(start, self.block_size)], start
            self.pool.release(blocks[::-1])
            raise

    def adopt(self, block_ids: Sequence[int] | NDArray[np.integer], num_tokens: int) -> None:
        """Start with the blocks of a cached prefix: nothing is copied.

        Parameters
        ----------
        block_ids : sequence of int
            Their blocks, in order, as many as `num_tokens` need.
        num_tokens : int
            Tokens in them. The last block may be partly used; it is copied when it is written.

        Raises
        ------
        ValueError
            If the sequence is not empty, the blocks are too few or too many, one is unknown or
            free, or lacks what the next token sees. Nothing has changed then.
        """
        self._check_held()
        if self.num_tokens:
            raise ValueError(f"expected an empty sequence, got one of {self.num_tokens} tokens")
        num_tokens = count_of(num_tokens, "num_tokens")
        if len(block_ids) != blocks_needed(num_tokens, self.block_size):
            raise ValueError(f"expected the blocks of {num_tokens} tokens, got {len(block_ids)}")
        ids = _array(block_ids)
        self._check_seen(ids, num_tokens)
        self.pool.begun_with(np.asarray(ids), num_tokens)
        try:
            self.state, self.passed = (ids, num_tokens), num_tokens
            self.pool.retain(ids)
        except BaseException:
            self.state, self.passed = (array("i"), 0), 0
            raise

    def fork(self) -> BlockTable:
        """Return a second sequence over the same blocks: nothing is copied.

        Raises
        ------
        PagedKVError
            If this one was dropped, and its blocks may be another's.
        """
        self._check_held()
        other = BlockTable(self.pool, self.block_size)
        other.adopt(self.ids, self.num_tokens)
        other.passed, other.namespace = self.passed, self.namespace
        return other

    def truncate(self, num_tokens: int) -> None:
        """Drop tokens from the end, and free the blocks that held only them.

        Parameters
        ----------
        num_tokens : int
            Tokens to keep, in [0, self.num_tokens]; 0 frees everything.

        Raises
        ------
        ValueError
            If the sequence is not that long, or what the next token would see has left a window.
            Nothing has changed then.
        """
        self._check_held()
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"expected 0 to {self.num_tokens} tokens to keep, got {num_tokens}")
        num_tokens = count_of(num_tokens, "num_tokens")
        kept, before, passed = blocks_needed(num_tokens, self.block_size), self.state, self.passed
        self._check_seen(before[0][:kept], num_tokens)
        try:
            self.state, self.passed = (before[0][:kept], num_tokens), min(passed, num_tokens)
            # From the end, so that the same come back in the same order.
            self.pool.release(before[0][kept:][::-1])
        except BaseException:
            self.state, self.passed = before, passed
            raise

    def share(self, start: int, block_ids: Sequence[int]) -> None:
        """Hold others' blocks with the same tokens in place of one's own, which are given back.

        Parameters
        ----------
        start : int
            Position of the first in the table, in blocks.
        block_ids : sequence of int
            Blocks with a holder, which contain the same tokens as these positions.

        Raises
        ------
        ValueError
            If the table is not that long, one is unknown or free, or another sequence holds a block
            of the table's own that has what the other's has lost. Nothing has changed then.
        """
        self._check_held()
        stop, ids, before = start + len(block_ids), _array(block_ids), self.state
        if not 0 <= start <= stop <= len(self.ids):
            raise ValueError(f"expected {len(self.ids)} blocks at most, got {start} to {stop}")
        own = before[0][start:stop]
        frames: list[Any] = []
        held = array("i")
        try:
            held = ids[: self.pool.retain(ids)]
            self.state = before[0][:start] + ids + before[0][stop:], before[1]
            self.pool.hand_over(own, ids, frames)
            self.pool.release(own)
        except BaseException:
            self.state = before
            self.pool.restore(frames)
            self.pool.release(held)
            raise

    def _check_held(self) -> None:
        """Raise PagedKVError if the table was dropped: a finalizer in a circle may still see it."""
        if not self.pool.is_held(self.held):
            raise PagedKVError("expected a table in use, this one was dropped and has no blocks")

    def _check_seen(self, ids: array[int], num_tokens: int) -> None:
        """Raise ValueError if the blocks of these tokens lack what the next token sees."""
        if not self.pool.holds_seen(np.asarray(ids), num_tokens):
            raise ValueError(
                f"expected blocks with all that is seen after {num_tokens} tokens, some of it has "
                "left a window"
            )

    @property
    def state(self) -> tuple[array[int], int]:
        """`ids` and `num_tokens`, which change together; to be put back by who called `grow`."""
        return self.ids, self.num_tokens

    @state.setter
    def state(self, state: tuple[array[int], int]) -> None:
        self.pool.changed(self.held)
        self.ids, self.num_tokens, self.held.ids = *state, state[0]

    def grow(self, count: int, block_ids: list[int]) -> tuple[int, int] | None:
        """Go on by tokens in blocks that the caller took from the pool, as a `Reservation` does.

        Parameters
        ----------
        count : int
            Number of tokens.
        block_ids : list of int
            As many blocks as `missing_blocks` said. If one of them is for a copy, it is the first.
            They are the table's now.

        Returns
        -------
        (int, int) or None
            Which block is to be copied into which, if one is. The former is the caller's now.
        """
        ids, copied = self.ids, None
        stop = blocks_needed(self.num_tokens + count, self.block_size)
        if len(ids) + len(block_ids) > stop:
            copied = ids[-1], block_ids[0]
            ids = ids[:-1]
        self.state = ids + array("i", block_ids), self.num_tokens + count
        return copied


def _array(block_ids: Sequence[int] | NDArray[np.integer]) -> array[int]:
    """Return block ids as a table holds them; ValueError for what is no id."""
    try:
        return array("i", block_ids)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"expected block ids, got {block_ids!r}: {error}") from None
