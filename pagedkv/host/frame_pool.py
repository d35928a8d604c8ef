"""Blocks of a model whose layers are in groups, some with a window. Host only."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import OutOfBlocksError
from pagedkv.host.block_pool import BlockPool, Copies, Held, Table
from pagedkv.limits import count_of, positive_int32


class FramePool(BlockPool):
    """Blocks with a frame in each group of layers until they leave the window of the group.

    A block is S tokens of a sequence in all layers; its frame in a group holds their K and V in the
    group's layers. Frames have one size and one budget: any group may use any frame. A group whose
    layers see a window frees the frame of a block when no later token can see it. The frames of
    cached prefixes keep their contents until frames run out, because a later prompt may end there;
    see `reclaim`.

    The equal groups with one budget follow vLLM's hybrid KV cache manager.

    Parameters
    ----------
    num_frames : int
        Total number of frames, enough for one block.
    windows : sequence of int or None
        For each group, how many tokens a token sees, itself the last; None for all. At least one
        group sees all.
    block_size : int
        S, tokens in a block.
    margin : int
        Tokens that a sequence can drop from its end at any time: everything that the tokens before
        them see is kept, too.

    Attributes
    ----------
    frames : ndarray
        The frame of each block in each group, shape [num_blocks, groups], int32, -1 for none; to be
        read only.

    Raises
    ------
    ValueError
        If a number is not a positive 32-bit integer, no group sees all tokens, or there are too few
        frames for a block.
    """

    unit = "frames"

    def __init__(
        self, num_frames: int, windows: Sequence[int | None], block_size: int, margin: int = 0
    ) -> None:
        self._num_frames = positive_int32(num_frames, "num_frames")
        self._size = positive_int32(block_size, "block_size")
        self._margin = count_of(margin, "margin")
        self._groups, self._full = len(windows), sum(window is None for window in windows)
        if not self._full:
            raise ValueError("expected a group of layers that see all tokens, got windows alone")
        if self._num_frames < self._groups:
            raise ValueError(f"expected {self._groups} frames for a block, got {self._num_frames}")
        super().__init__(self._num_frames // self._full)
        self.frames = np.full((self.num_blocks, self._groups), -1, np.int32)
        self._spare = list(range(self._num_frames - 1, -1, -1))  # a stack, as `_free`
        sizes = sorted({positive_int32(w, "a window") for w in windows if w is not None})
        # Windows in tokens, and which groups have them.
        self._windows = [(size, np.array([own == size for own in windows])) for size in sizes]
        self._tables: weakref.WeakSet[Table] = weakref.WeakSet()
        self._open: weakref.WeakSet[Copies] = weakref.WeakSet()
        # When a block was computed, or a sequence began with what it holds; 0 if none ever did and
        # the one that computed it has passed. Most callers never read such a page.
        self._used = np.zeros(self.num_blocks, np.int64)
        self._asked_for = np.zeros(self.num_blocks, bool)
        self._clock, self._remembers = 0, False
        # How many tables see a block, and how many idle frames it has, by window; see `_count`.
        self._seers = np.zeros((len(self._windows), self.num_blocks), np.int32)
        self._idle = np.zeros_like(self._seers)
        self._num_idle, self._is_counted = 0, False
        self._stale = np.zeros(self.num_blocks, bool)  # blocks with other frames or seers since
        self._changed: set[Held] = set()  # tables

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, with a frame in every group."""
        self.collect()
        return min(len(self._free), len(self._spare) // self._groups)

    @property
    def num_frames(self) -> int:
        """Frames in the pool."""
        return self._num_frames

    @property
    def num_free_frames(self) -> int:
        """Frames that no block has."""
        self.collect()
        return len(self._spare)

    def frames_needed(self, blocks: int, blocks_at_once: int) -> int:
        """Return how many frames a sequence holds at most, as `BlockPool.frames_needed`."""
        frames = self.frames_seeing_all(blocks)
        for window, groups in self._windows:
            seen = -(-(window - 1 + self._margin) // self._size) + 1
            frames += int(groups.sum()) * min(blocks, seen + blocks_at_once)
        return frames

    def frames_seen(self, blocks: int) -> int:
        """Return how many frames a sequence holds that starts with `blocks` cached blocks."""
        seen = (
            int(groups.sum()) * (blocks - self._first_seen(blocks * self._size, window))
            for window, groups in self._windows
        )
        return self.frames_seeing_all(blocks) + sum(seen)

    def frames_seeing_all(self, blocks: int) -> int:
        """Return how many frames `blocks` blocks have in groups that see all tokens."""
        return self._full * blocks

    def frames_of_cached(self, num_blocks: int) -> int:
        """Return how many frames only cached prefixes use; see `num_idle`."""
        return self.frames_seeing_all(num_blocks) + self.num_idle()

    def group_frames(self) -> tuple[int, ...]:
        """Return how many frames each group of layers has; in linear time."""
        self.collect()
        return tuple((self.frames >= 0).sum(axis=0).tolist())

    def places(self, block_ids: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the frames of blocks, shape [groups, ...]; 0 where one is gone."""
        places: NDArray[np.int32] = np.maximum(np.moveaxis(self.frames[block_ids], -1, 0), 0)
        return places

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, as `BlockPool.allocate`, each with a frame in every group.

        If too few are free, frames are reclaimed first.
        """
        count = count_of(count, "count")
        short = count - self.num_free
        if short > 0 and (
            count > len(self._free) or self.reclaim(short, asked_for=True, at_least=short) < short
        ):
            raise OutOfBlocksError(count, self.num_free)
        return super().allocate(count)

    def num_places(self, block_ids: Collection[int], group: int) -> int:
        """Return how many of some blocks have a frame in a group."""
        return int((self.frames[list(block_ids), group] >= 0).sum())

    def is_all_there(self, block_ids: NDArray[np.int32]) -> bool:
        """Whether blocks have a frame in every group."""
        return bool((self.frames[block_ids] >= 0).all())

    def same(self, now: list[array[int]], before: list[array[int]]) -> bool:
        """Whether tables' `ids` stand for the same frames as before.

        A block that was given back and taken again may have others: so not unless nothing was.
        """
        return all(map(is_, now, before))

    def watch(self, table: Table) -> None:
        """Note that a table holds blocks of this pool: what it may still see is not reclaimed."""
        self._tables.add(table)

    def watch_open(self, reservation: Copies) -> None:
        """Note that a reservation may give tables the blocks back that it has copied."""
        self._open.add(reservation)

    def remember(self) -> None:
        """Let unused frames keep their contents until frames run out."""
        self._remembers = True

    def pass_by(self, table: Table, num_tokens: int) -> None:
        """Note how many tokens of a table are final, and free frames that no later token sees.

        Blocks that are cached, or held elsewhere, keep their frames: `reclaim` finds which are
        seen.
        """
        self._changed.add(table.held)
        before, table.passed = table.passed, max(table.passed, num_tokens - self._margin)
        for window, groups in self._windows:
            old, new = (self._first_seen(n, window) for n in (before, table.passed))
            if new > old:
                ids = table.block_ids[old:new]
                if self._remembers:
                    self._used[ids[~self._asked_for[ids]]] = 0
                else:
                    self._give_back(ids[self._view[ids] == 1], groups)

    def holds_seen(self, block_ids: NDArray[np.int32], num_tokens: int) -> bool:
        """Whether what tokens after the first `num_tokens` see still has its frames."""
        for window, groups in self._windows:
            seen = block_ids[self._first_seen(num_tokens, window) :]
            # `retain` refuses ids of free blocks.
            if (self.frames.take(seen, axis=0, mode="clip")[:, groups] < 0).any():
                return False
        return True

    def reusable(self, block_ids: Sequence[int]) -> int:
        """Return how many blocks a sequence can begin with: the last of a window are all there."""
        ids = np.asarray(block_ids, np.int32)
        counts = np.arange(len(ids) + 1)
        possible = np.ones(len(counts), bool)
        for window, groups in self._windows:
            missing = (self.frames[ids][:, groups] < 0).any(axis=1)
            # Up to each block, how many from the first on lack something.
            lacking = np.concatenate([[0], np.cumsum(missing)])
            first = np.maximum(counts * self._size + 1 - window, 0) // self._size
            possible &= lacking == lacking[first]
        return int(np.flatnonzero(possible)[-1])

    def hand_over(self, own: Sequence[int], others: Sequence[int], before: list[Any]) -> None:
        """Let others' blocks have the frames of a table's own where theirs are gone.

        Parameters
        ----------
        own, others : sequence of int
            Blocks that hold the same tokens, in the same order.
        before : list
            For `restore`.

        Raises
        ------
        ValueError
            If another table holds such a block. Nothing has changed then.
        """
        mine, theirs = (np.asarray(ids, np.int32) for ids in (own, others))
        moves = (self.frames[theirs] < 0) & (self.frames[mine] >= 0)
        if not moves.any():
            return
        if (moves.any(axis=1) & (self._view[mine] > 1)).any():
            raise ValueError("expected blocks of this table alone, one has another holder")
        for ids in (theirs, mine):
            before.append((ids, self.frames[ids], len(self._spare), []))
            self._stale[ids] = True
        (_, lacking, *_), (_, having, *_) = before
        self.frames[theirs] = np.where(moves, having, lacking)
        self.frames[mine] = np.where(moves, -1, having)

    def reclaim(self, num_blocks: int, *, asked_for: bool, at_least: int = 0) -> int:
        """Take back frames that no table sees, least recently used first.

        Blocks stay in the cache without those frames, and later prompts reuse fewer of them. It
        takes time linear in the pool, so a 64th of the pool is reclaimed at once.

        Parameters
        ----------
        num_blocks : int
            Number of blocks to free.
        asked_for : bool
            Whether to reclaim frames that a prompt has reused, or is likely to, as well.
        at_least : int
            If fewer blocks would become free, nothing is reclaimed.

        Returns
        -------
        int
            Blocks that became free, or more.
        """
        free, spare = self.num_free, len(self._spare)
        wanted = (free + num_blocks) * self._groups - spare
        if wanted <= 0:
            return 0
        idle = self.idle()
        ids = np.flatnonzero(idle.any(axis=1) & (asked_for | (self._used == 0)))
        ids = ids[np.argsort(self._used[ids], kind="stable")]
        frames = np.cumsum(idle[ids].sum(axis=1))
        if spare + (frames[-1] if len(ids) else 0) < (free + at_least) * self._groups:
            return 0
        wanted = max(wanted, self._num_frames // 64)
        enough = int(np.searchsorted(frames, wanted)) + 1
        self._give_back(ids[:enough], idle[ids[:enough]])
        return self.num_free - free

    def num_idle(self) -> int:
        """Return how many frames no table can see any more.

        In time linear in what changed since the last call, but for a look at a flag of each block.
        """
        self._count()
        others = (self._idle[place, ids].sum() for place, ids in enumerate(self._seen_by_others()))
        return self._num_idle - int(sum(others))

    def idle(self) -> NDArray[np.bool_]:
        """Return which frames no table can see any more, shape as `frames`."""
        self._count()
        idle = np.zeros(self.frames.shape, bool)
        for place, ids in enumerate(self._seen_by_others()):
            unseen = self._seers[place] == 0
            unseen[ids] = False
            idle |= unseen[:, None] & self._windows[place][1]
        return idle & (self.frames >= 0)

    def changed(self, held: Held) -> None:
        """Note that a table is about to change."""
        self.changes += 1
        self._changed.add(held)

    def _seen_by_others(self) -> list[list[int]]:
        """Return the blocks that something else than a table sees, by window."""
        copied = [source for one in self._open if one.is_open for source, _ in one.copies]
        count = len(self.guarded) * self._size
        return [
            [*{*copied, *self.guarded[self._first_seen(count, window) :]}]
            for window, _ in self._windows
        ]

    def _count(self) -> None:
        """Bring `_seers` and `_idle` up to date; anew if something interrupted that."""
        self.collect()
        if not self._is_counted:
            self._seers[:] = self._idle[:] = self._num_idle = 0
            self._stale[:] = True
            self._changed = {table.held for table in self._tables}
            for held in self._changed:
                held.counted = None
        self._is_counted = False
        for held in self._changed:
            self._count_one(held)
        ids = np.flatnonzero(self._stale)
        if len(ids):
            has = self.frames[ids] >= 0
            for place, (_, groups) in enumerate(self._windows):
                idle = has[:, groups].sum(axis=1) * (self._seers[place, ids] == 0)
                self._num_idle += int(idle.sum() - self._idle[place, ids].sum())
                self._idle[place, ids] = idle
            self._stale[ids] = False
        self._changed.clear()
        self._is_counted = True

    def _count_one(self, held: Held) -> None:
        """Count what a table sees in place of what it was counted for."""
        table = held()
        ids = np.empty(0, np.int32) if table is None else table.block_ids
        passed = 0 if table is None else table.passed
        before, held.counted = held.counted, (ids, passed)
        for counted, by in ((before, -1), (held.counted, 1)):
            if counted is not None:
                for place, (window, _) in enumerate(self._windows):
                    seen = counted[0][self._first_seen(counted[1], window) :]
                    self._seers[place, seen] += by
                    self._stale[seen] = True

    def _gone(self, held: Held) -> None:
        """Note that a table which was dropped sees nothing any more."""
        whole, self._is_counted = self._is_counted, False
        if held.counted is not None and whole:
            self._count_one(held)
        self._changed.discard(held)
        self._is_counted = whole

    def restore(self, before: list[Any]) -> None:
        """Put frames back where they were."""
        for block_ids, frames, size, spare in before:
            self._stale[block_ids] = True
            self._spare[size:] = spare
            self.frames[block_ids] = frames

    def check_invariants(self) -> None:
        """Raise AssertionError as `BlockPool`, and unless every frame is of one block, or spare."""
        super().check_invariants()
        held = self.frames[self.frames >= 0].tolist()
        frames = sorted([*held, *self._spare])
        assert frames == list(range(self._num_frames)), "a frame is lost or twice in use"
        free = self._view == 0
        assert (self.frames[free] < 0).all(), "a free block has frames"
        full = ~np.any([groups for _, groups in self._windows], axis=0)
        assert (self.frames[~free][:, full] >= 0).all(), "a block lacks frames"
        for table in self._tables:
            assert self.holds_seen(table.block_ids, table.passed), "a table lacks what it sees"
        idle = self._scanned()
        assert (self.idle() == idle).all(), "an idle frame is miscounted"
        assert self.num_idle() == idle.sum(), "idle frames are miscounted"

    def _scanned(self) -> NDArray[np.bool_]:
        """Return what `idle` does, by a look at every table."""
        idle = np.zeros(self.frames.shape, bool)
        for (window, groups), others in zip(self._windows, self._seen_by_others(), strict=True):
            unseen = self._view > 0
            unseen[others] = False
            for table in self._tables:
                unseen[table.block_ids[self._first_seen(table.passed, window) :]] = False
            idle |= unseen[:, None] & groups
        return idle & (self.frames >= 0)

    def _first_seen(self, num_tokens: int, window: int) -> int:
        """Return the first block that the token after these sees."""
        return max(num_tokens + 1 - window, 0) // self._size

    def begun_with(self, block_ids: NDArray[np.int32], num_tokens: int) -> None:
        """Note that a sequence has started with cached blocks of `num_tokens` tokens."""
        for window, _ in self._windows:
            seen = block_ids[self._first_seen(num_tokens, window) :]
            self._clock += 1
            # `retain` refuses ids of free blocks.
            np.put(self._used, seen, self._clock, mode="clip")
            np.put(self._asked_for, seen, True, mode="clip")

    def _give_back(self, block_ids: NDArray[np.integer], groups: NDArray[np.bool_]) -> None:
        """Let go of the frames of blocks in some groups, the same for all blocks or by block."""
        self._stale[block_ids] = True
        frames, spare = self.frames[block_ids], self._spare
        size = len(spare)
        try:
            spare.extend(frames[groups & (frames >= 0)].tolist())
            self.frames[block_ids] = np.where(groups, -1, frames)
        except BaseException:
            del spare[size:]
            self.frames[block_ids] = frames
            raise

    def _taken(self, block_ids: list[int], before: list[Any]) -> None:
        self._stale[block_ids] = True
        kept = len(self._spare) - len(block_ids) * self._groups
        spare = self._spare[kept:]
        before.append((block_ids, -1, kept, spare))
        self.frames[block_ids] = np.array(spare[::-1], np.int32).reshape(-1, self._groups)
        del self._spare[kept:]
        self._clock += 1
        self._used[block_ids], self._asked_for[block_ids] = self._clock, False

    def _emptied(self, block_ids: list[int], before: list[Any]) -> None:
        self._stale[block_ids] = True
        frames = self.frames[block_ids]
        before.append((block_ids, frames, len(self._spare), []))
        self._spare.extend(frames[frames >= 0].tolist())
        self.frames[block_ids] = -1
