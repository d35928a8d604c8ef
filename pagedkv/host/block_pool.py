"""Blocks, their reference counts, and the block tables of all sequences. Host only.

The tensors are in `pagedkv.cache`. Groups of layers with windows of their own draw from one pool,
as in vLLM's hybrid KV cache manager.
Shapes: N blocks, G groups of layers, R rows (sequences), W blocks that a row has room for.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import OutOfBlocksError
from pagedkv.host.interrupts import Uninterrupted
from pagedkv.limits import count_of, id_below, integers, positive_int32

FEW = 8  # blocks: so many are counted one by one sooner than by NumPy
GONE = -1
"""Id of a block that left its group's window."""

Ids = Sequence[int] | NDArray[np.integer]
Tokens = TypeVar("Tokens", int, NDArray[np.int64])


class _Owner(weakref.ref[Any]):
    """A weak reference to an object, with what gives back the blocks that it holds.

    The garbage collector may run while the pool changes. So the end of an object only calls
    `deque.append`, which no interrupt divides; the pool's next operation does the rest.
    """

    __slots__ = ("give_back",)
    give_back: Callable[[], None]


class BlockPool:
    """A fixed number of blocks with reference counts, and the sequences that hold them.

    A block has room for K and V of S tokens in the layers of one group. A sequence is a row of
    block ids for each group; see `BlockTable`. Freed blocks are reused, the last one first, before
    blocks that were never used, so that few blocks are touched.

    Methods check their arguments before anything changes, and hold interrupts back while they
    change. One thread at a time may use a pool.

    Parameters
    ----------
    num_blocks : int
        N, blocks in the pool.
    windows : sequence of int or None
        For each group of layers, how many tokens a token sees, itself the last; None for all. The
        first group sees all.
    margin : int
        Tokens that a sequence can drop from its end at any time, whatever the windows.

    Attributes
    ----------
    sees_all_tokens : ndarray
        Whether each group of layers does, bool, shape [G].
    refs : ndarray
        References to each block, int32, shape [N], read-only for others. 0: it is free.
    ids : ndarray
        Block ids, int32, shape [G, R, W], read-only for others. `GONE` where a block left its
        group's window.
    lens, widths, versions, uses : ndarray
        Tokens of each row, blocks of it, and numbers that grow when its ids change and when it is
        given back, int64, shape [R] each.
    group_of : ndarray
        Which group of layers each block in use is for, int8, shape [N], read-only for others.
    changes : int
        Grows when any row changes, and when `retain` refers to blocks.
    block_size : int
        S, tokens in a block; 0 until `use_block_size`.
    keeps_windows : bool
        Whether blocks that left a window stay until blocks run out.
    reclaimers : list of callable
        Called in turn with a number of blocks when too few are free, each until it returns what
        is not true: it could free none.

    Raises
    ------
    ValueError
        If a number is not a positive 32-bit integer, or the first group has a window.
    """

    def __init__(
        self, num_blocks: int, windows: Sequence[int | None] = (None,), margin: int = 0
    ) -> None:
        num_blocks = positive_int32(num_blocks, "num_blocks")
        self.windows = tuple(
            None if window is None else positive_int32(window, "a window") for window in windows
        )
        if self.windows[:1] != (None,):
            raise ValueError(f"expected a first group of layers that sees all, got {windows}")
        self.sees_all_tokens = np.array([window is None for window in self.windows])
        self.margin = count_of(margin, "margin")
        self.refs = np.zeros(num_blocks, np.int32)
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the next one is the last
        groups = len(self.windows)
        self.ids = np.zeros((groups, 0, 1), np.int32)
        self.lens, self.widths, self.versions, self.uses, self._final = np.zeros((5, 0), np.int64)
        self._lost = np.zeros((groups, 0), np.int64)  # blocks of a row that left the window
        self.group_of = np.zeros(num_blocks, np.int8)
        self._free_rows: list[int] = []
        self.changes = self.block_size = 0
        self.keeps_windows = False
        self.reclaimers: list[Callable[[int], object]] = []
        self._owners: set[_Owner] = set()
        self._dropped: deque[_Owner] = deque()

    def use_block_size(self, block_size: int) -> int:
        """Note how many tokens a block has; return it.

        ValueError if it is not a positive 32-bit integer, or not what it was before.
        """
        block_size = positive_int32(block_size, "block_size")
        if self.block_size not in (0, block_size):
            raise ValueError(f"expected blocks of {self.block_size} tokens, got {block_size}")
        self.block_size = block_size
        return block_size

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self.refs)

    @property
    def num_free(self) -> int:
        """Blocks without a reference."""
        self.collect()
        return len(self._free)

    @property
    def blocks_by_group(self) -> tuple[int, ...]:
        """Blocks in use in each group of layers; in linear time."""
        self.collect()
        counts = np.bincount(self.group_of[self.refs > 0], minlength=len(self.windows))
        return tuple(counts.tolist())

    def reference_count(self, block_id: int) -> int:
        """Return the number of references to a block; ValueError if there is no such block."""
        self.collect()
        return int(self.refs[id_below(self.num_blocks, block_id, "a block id")])

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference; return their ids.

        Raises
        ------
        OutOfBlocksError
            If fewer are free, after the `reclaimers`; none is allocated then.
        ValueError
            If `count` is not an integer or is negative.
        """
        count = count_of(count, "count")
        self.collect()
        if count > len(self._free):
            self.drop_windows()
        for reclaim in [*self.reclaimers] if count > len(self._free) else ():
            while count > self.num_free and reclaim(count - len(self._free)):
                pass
        kept = len(self._free) - count
        if kept < 0:
            raise OutOfBlocksError(count, len(self._free))
        ids: list[int] = []
        try:
            with Uninterrupted():
                ids = self._free[kept:][::-1]
                del self._free[kept:]
                self.refs[ids] = 1
            return ids
        except BaseException:  # an interrupt: the caller does not get them
            self.unref(np.array(ids[::-1], np.int64))
            raise

    def retain(self, block_ids: Ids) -> None:
        """Add a reference to each of the blocks.

        ValueError, before anything changed, if one of them is unknown or free.
        """
        if len(block_ids):
            ids = self._checked(block_ids)
            self._require(ids, 1)
            self.changes += 1
            np.add.at(self.refs, ids, 1)

    def release(self, block_ids: Ids) -> None:
        """Drop a reference from each of the blocks; a block without references is free.

        An id that occurs twice loses two. ValueError, before anything changed, if one of them is
        unknown or has fewer references.
        """
        if len(block_ids):
            ids = self._checked(block_ids)
            unique, times = np.unique(ids, return_counts=True)
            self._require(unique, times)
            with Uninterrupted():
                self.unref(ids)

    def by_group(self, blocks: Ids) -> NDArray[np.int32]:
        """Return block ids of a sequence by group of layers, int32, shape [G, n].

        Parameters
        ----------
        blocks : sequence of int
            Shape [G, n], or [n] where there is one group. `GONE` where a block left its window.

        Raises
        ------
        ValueError
            If they have another shape, or one is unknown or free.
        """
        groups = len(self.windows)
        ids = np.asarray(blocks if len(blocks) else np.empty((groups, 0), np.int32))
        if ids.ndim == 1 and groups == 1:
            ids = ids[None]
        if ids.ndim != 2 or len(ids) != groups or ids.dtype.kind not in "iu":
            raise ValueError(
                f"expected block ids of {groups} groups of layers, got {ids.dtype} of shape "
                f"{ids.shape}"
            )
        held = ids[self.sees_all_tokens[:, None] | (ids != GONE)]
        if len(held):
            self._require(self._checked(held), 1)
        return ids.astype(np.int32, copy=False)

    def unref(self, ids: NDArray[np.integer]) -> None:
        """Drop references that the caller holds, of blocks that are not `GONE`; unchecked."""
        if len(ids) <= FEW:  # most calls
            for block in ids.tolist():
                if block >= 0:
                    left = self.refs[block] = self.refs[block] - 1
                    if not left:
                        self._free.append(block)
            return
        ids = ids[ids >= 0]
        np.subtract.at(self.refs, ids, 1)
        self._free += dict.fromkeys(ids[self.refs[ids] == 0].tolist())

    def _checked(self, block_ids: Ids) -> NDArray[np.int64]:
        ids = integers(block_ids, "block ids")
        if ids.min() < 0 or ids.max() >= self.num_blocks:
            bad = ids[(ids < 0) | (ids >= self.num_blocks)][0]
            raise ValueError(f"expected block ids in [0, {self.num_blocks}), got {bad}")
        return ids

    def _require(self, ids: NDArray[np.int64], times: int | NDArray[np.int64]) -> None:
        lacking = self.refs[ids] < times
        if lacking.any():
            block = int(ids[lacking.argmax()])
            raise ValueError(
                f"expected a block with more references, block {block} has {self.refs[block]}"
            )

    def collect(self) -> None:
        """Take back the blocks of dropped sequences and trees."""
        while self._dropped:
            with Uninterrupted():
                owner = self._dropped.popleft()
                self._owners.discard(owner)
                owner.give_back()

    def on_drop(self, owner: object, give_back: Callable[[], None]) -> None:
        """Have `give_back` called, by `collect`, once nothing refers to an object any more."""
        reference = _Owner(owner, self._dropped.append)
        reference.give_back = give_back
        self._owners.add(reference)

    # Rows. All of them take rows that are in use, each once.

    def new_row(self) -> int:
        """Return the row of a new, empty sequence."""
        self.collect()
        with Uninterrupted():
            if not self._free_rows:
                rows = len(self.lens)
                more = max(rows, 8)
                self._free_rows = list(range(rows + more - 1, rows - 1, -1))
                self.ids = np.pad(self.ids, ((0, 0), (0, more), (0, 0)))
                self._lost = np.pad(self._lost, ((0, 0), (0, more)))
                for name in ("lens", "widths", "versions", "uses", "_final"):
                    setattr(self, name, np.pad(getattr(self, name), (0, more)))
            return self._free_rows.pop()

    def free_row(self, row: int) -> None:
        """Give a row and its blocks back."""
        with Uninterrupted():
            self._cut(row, 0)
            self.uses[row] += 1
            self._free_rows.append(row)

    def extend(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Append tokens to sequences, all or nothing, with copy-on-write.

        A step that fails is undone by `truncate`: a block that was copied stays the sequence's own,
        with the same content.

        Parameters
        ----------
        rows, counts : ndarray
            The sequences and the new tokens of each, 0 or more, shape [B] each.

        Returns
        -------
        list of (int, int)
            Blocks to copy before anything is written: from which id, to which id. The caller has
            references to the former, to be given to `unref` when they are copied.

        Raises
        ------
        OutOfBlocksError
            If there are too few blocks for all of it. Nothing has changed then.
        """
        lens, widths, block_size = self.lens[rows], self.widths[rows], self.block_size
        ends = lens + counts
        needed = -(-ends // block_size) - widths
        tails = self.ids[:, rows, np.maximum(widths - 1, 0)]
        shared = (self.refs[tails] > 1) & (lens % block_size > 0) & (counts > 0)
        grows = needed.any()
        if not (grows or shared.any()):  # most calls
            self.lens[rows] = ends
            self.changes += 1
            return []
        groups, copies = len(self.windows), []
        if needed.max() > self.num_blocks:  # sums could overflow
            raise OutOfBlocksError(groups * int(needed.max()), self.num_free)
        with Uninterrupted():
            new = self.allocate(groups * int(needed.sum()) + int(shared.sum()))
            for target, (group, place) in zip(new, np.argwhere(shared).tolist(), strict=False):
                row, last = rows[place], widths[place] - 1
                copies.append((int(self.ids[group, row, last]), target))
                self.group_of[target] = group
                self.ids[group, row, last] = target
            if grows:
                self._make_room(int((widths + needed).max()))
                places = needed.nonzero()[0]
                if needed.max() == 1:  # most steps
                    taken = np.array(new[len(copies) :], np.int32).reshape(-1, groups).T
                    self.ids[:, rows[places], widths[places]] = taken
                    self._note_group(taken)
                else:
                    start = len(copies)
                    for place in places.tolist():
                        first, stop = widths[place], start + groups * needed[place]
                        taken = np.array(new[start:stop], np.int32).reshape(groups, -1)
                        self.ids[:, rows[place], first : first + needed[place]] = taken
                        self._note_group(taken)
                        start = stop
            changed = rows[(needed > 0) | shared.any(axis=0)]
            self.versions[changed] += 1
            self.widths[rows] += needed
            self.lens[rows] = ends
            self.changes += 1
        return copies

    def _note_group(self, blocks: NDArray[np.int32]) -> None:
        """Note which groups new blocks, [G, n], are for."""
        if len(blocks) > 1:
            self.group_of[blocks] = np.arange(len(blocks))[:, None]

    def uncopy(self, rows: NDArray[np.int64], copies: list[tuple[int, int]]) -> None:
        """Let rows hold again what `extend` would have copied, when the copies were not made."""
        with Uninterrupted():
            for source, target in copies:
                [[group, place]] = np.argwhere((self.ids[:, rows] == target).any(axis=2))
                own = self.ids[group, rows[place]]
                own[own == target] = source
                self.unref(np.array([target]))
                self.versions[rows[place]] += 1
            self.changes += 1

    def _make_room(self, width: int) -> None:
        missing = width - self.ids.shape[2]
        if missing > 0:
            more = max(missing, self.ids.shape[2] // 2)
            self.ids = np.pad(self.ids, ((0, 0), (0, 0), (0, more)))

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep the first tokens of a row, and give back the blocks that held only others."""
        kept = -(-num_tokens // self.block_size)
        with Uninterrupted():
            if kept < self.widths[row]:
                self._cut(row, kept)
            self.lens[row], self._final[row] = num_tokens, min(self._final[row], num_tokens)
            self.changes += 1

    def _cut(self, row: int, kept: int) -> None:
        width = int(self.widths[row])
        # From the end, so that the same come back in the same order.
        self.unref(self.ids[:, row, kept:width].T.ravel()[::-1])
        self.ids[:, row, kept:width] = 0
        self.widths[row] = kept
        self._lost[:, row] = np.minimum(self._lost[:, row], kept)
        self.versions[row] += 1
        self.changes += 1
        if not kept:
            self.lens[row] = self._final[row] = 0

    def adopt(self, row: int, blocks: NDArray[np.int32], num_tokens: int) -> None:
        """Let an empty row hold others' blocks, [G, n], as far as its next token sees them."""
        count = blocks.shape[1]
        blocks = blocks.copy()
        lost = [self.first_seen(num_tokens, group) for group in range(len(blocks))]
        for own, first in zip(blocks, lost, strict=True):
            own[:first] = GONE
        with Uninterrupted():
            np.add.at(self.refs, blocks[blocks >= 0], 1)
            self._make_room(count)
            self.ids[:, row, :count] = blocks
            self.widths[row], self._lost[:, row] = count, lost
            self.lens[row] = self._final[row] = num_tokens
            self.versions[row] += 1
            self.changes += 1

    def fork(self, row: int, fork: int) -> None:
        """Let an empty row hold what another one does."""
        with Uninterrupted():
            ids = self.ids[:, row]
            held = ids[:, : self.widths[row]]
            np.add.at(self.refs, held[held >= 0], 1)
            self.ids[:, fork], self._lost[:, fork] = ids, self._lost[:, row]
            for each in (self.widths, self.lens, self._final):
                each[fork] = each[row]
            self.versions[fork] += 1
            self.changes += 1

    def share(self, row: int, first: int, blocks: NDArray[np.int32]) -> None:
        """Replace a row's blocks from `first` on by others, [G, n], that hold the same tokens.

        The row keeps its own where the other block is gone.
        """
        stop = first + blocks.shape[1]
        own = self.ids[:, row, first:stop]
        replaced = (own >= 0) & (blocks >= 0) & (own != blocks)
        if replaced.any():
            with Uninterrupted():
                np.add.at(self.refs, blocks[replaced], 1)
                self.unref(own[replaced])
                own[replaced] = blocks[replaced]
                self.versions[row] += 1
                self.changes += 1

    def leave_windows(self, rows: NDArray[np.int64], lens: NDArray[np.int64]) -> None:
        """Note that the first `lens` tokens of rows are final: no token before them comes again.

        Blocks that no later token sees are given back, less the margin: at once, or where prefixes
        are cached when blocks run out, since a later prompt may end there.
        """
        if len(self.windows) > 1:
            self._final[rows] = np.maximum(self._final[rows], lens)
            if not self.keeps_windows:
                self._drop_windows(rows)

    def drop_windows(self) -> None:
        """Give back what has left the windows of all rows."""
        if len(self.windows) > 1:
            self._drop_windows(np.flatnonzero(self.widths))

    def _drop_windows(self, rows: NDArray[np.int64]) -> None:
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            first = self.first_seen(self._final[rows] - self.margin, group)
            gone = first > self._lost[group, rows]
            for row, stop in zip(rows[gone].tolist(), first[gone].tolist(), strict=True):
                with Uninterrupted():
                    begin = int(self._lost[group, row])
                    self.unref(self.ids[group, row, begin:stop])
                    self.ids[group, row, begin:stop] = GONE
                    self._lost[group, row] = stop

    def first_seen(self, num_tokens: Tokens, group: int) -> Tokens:
        """Return the first block that the token after `num_tokens` sees in a group of layers.

        Of one number of tokens, or of each in an array.
        """
        window = self.windows[group]
        if window is None:
            return num_tokens * 0
        first: Tokens = np.maximum(num_tokens + 1 - window, 0) // self.block_size
        return first

    def sees_all(self, blocks: NDArray[np.int32], num_tokens: int) -> bool:
        """Whether blocks, [G, n], have what the token after `num_tokens` sees."""
        firsts = (self.first_seen(num_tokens, group) for group in range(len(blocks)))
        return not any((own[first:] < 0).any() for own, first in zip(blocks, firsts, strict=True))

    def blocks_held(self, blocks: int, blocks_at_once: int) -> int:
        """Return the most blocks that a sequence holds while it grows to `blocks` a group.

        Parameters
        ----------
        blocks : int
            Blocks of the sequence in a group that sees all tokens.
        blocks_at_once : int
            Blocks that it takes in a group at most in one step, or in steps in flight together.
        """
        held = 0
        for window in self.windows:
            most = blocks
            if window is not None:
                seen = -(-(window - 1 + self.margin) // self.block_size) + 1
                most = min(blocks, seen + blocks_at_once)
            held += most
        return held

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is free or referenced; for tests."""
        self.collect()
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert (self.refs >= 0).all(), "a block has lost more references than it had"
        assert sorted(self._free) == np.flatnonzero(self.refs == 0).tolist(), "a block is lost"
        held = np.zeros_like(self.refs)
        columns = np.arange(self.ids.shape[2])
        ids = self.ids[:, columns < self.widths[:, None]]
        np.add.at(held, ids[ids >= 0], 1)
        assert (held <= self.refs).all(), "a row holds a block without a reference"
        assert not self.lens[self._free_rows].any(), "a free row has tokens"
