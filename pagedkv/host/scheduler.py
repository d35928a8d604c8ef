"""The scheduler: chooses what is computed next. Host only, plain data."""

from __future__ import annotations

import heapq
import threading
from array import array
from bisect import insort
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pagedkv.errors import OutOfBlocksError, PagedKVError
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable, blocks_needed
from pagedkv.host.cache_event import CacheEvent, Listener
from pagedkv.host.prefix_cache import RadixTree
from pagedkv.host.radix_node import PrefixMatch, RadixNode
from pagedkv.host.schedule import Schedule
from pagedkv.host.sequence import Sequence, prompt_ids, token_ids
from pagedkv.host.stats import Stats
from pagedkv.host.turns import uninterrupted
from pagedkv.limits import count_of, positive_int32

_UNKNOWN = array("i", [0])  # stands for a token that is being sampled
_Block = tuple[Hashable, bytes]  # the node before a block, and its tokens


@dataclass(eq=False)
class _InFlight:
    """A schedule that is neither updated nor retracted, and its sequences.

    Attributes
    ----------
    sampled : list of Sequence
        Those whose next token it samples.
    prompts : list of (Sequence, int)
        Those whose prompt may not be all computed, and how many of their tokens are with this.
    ended : list of Sequence
        Those whose request has ended meanwhile; they still hold their blocks.
    """

    left: int  # tokens that may still be added
    sequences: list[Sequence] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    prompts: list[tuple[Sequence, int]] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("i"))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    copies: list[tuple[int, int]] = field(default_factory=list)
    schedule: Schedule | None = None


class Scheduler:
    """Admits, schedules and preempts requests under a budget of blocks and of tokens per step.

    First come, first served. Running sequences come first, in order; then waiting ones are admitted
    as long as the token budget lasts and their blocks leave a watermark free. Prompts are computed
    in chunks, together with other sequences' decode tokens, as in vLLM. When blocks run out, the
    least recently used cached prefixes go first; then the last sequence in order gives up its
    blocks and is computed again later. The first in order is never preempted for another, so every
    request finishes.

    Blocks are cached as prompts and generation fill them. A request waits while another computes a
    prefix that both share, and then finds it cached: requests that arrive together hold one copy.

    A schedule is in flight until `update` or `retract` ends it; the next may be chosen meanwhile.
    Methods may be called from any thread and run one at a time; an interrupt that comes during one
    is raised after it. `pool` and `tree` belong to the scheduler: read them between calls, and
    change nothing except by evicting from `tree`.

    Parameters
    ----------
    pool : BlockPool
        The blocks to use. Nothing else may take blocks from it.
    block_size : int
        S, tokens in a block.
    max_tokens : int
        The most tokens computed in a step.
    max_running : int
        The most sequences running at a time.
    watermark : int, optional
        Blocks that an admission leaves free in each group for running sequences, so that they are
        not preempted at once; by default one for every two of them (docs/adr/0006).
    block_bytes : int
        Bytes of a block in all layers, for `stats`.
    on_event : callable
        Called with each `CacheEvent` at the end of the method that caused it; may be set at any
        time. Its exceptions reach the caller of a method that has done its work, except that a
        schedule is retracted. Generated blocks are cached when a later request could reuse them.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or the watermark is negative, or `pool` is not a
        `BlockPool`.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        max_tokens: int = 2048,
        max_running: int = 256,
        watermark: int | None = None,
        block_bytes: int = 0,
        on_event: Listener | None = None,
    ) -> None:
        if not isinstance(pool, BlockPool):
            raise ValueError(f"expected a BlockPool, got {pool!r}")
        self.pool = pool
        self.block_size = pool.use_block_size(block_size)
        self.max_tokens = positive_int32(max_tokens, "max_tokens")
        self.max_running = positive_int32(max_running, "max_running")
        self.watermark = watermark if watermark is None else count_of(watermark, "watermark")
        self.block_bytes = count_of(block_bytes, "block_bytes")
        self.lock = threading.RLock()  # held during each method
        self.on_event = on_event
        self._events: list[CacheEvent] = []
        self.tree = RadixTree(pool, self.block_size, self._events.append)
        self._at_once = blocks_needed(self.max_tokens, self.block_size) + 1
        self._sequences: dict[Hashable, Sequence] = {}  # all that are waiting or running
        self._running: list[Sequence] = []  # in order
        self._waiting: list[Sequence] = []  # a heap; one that was dropped stays until its turn
        self._in_flight: list[_InFlight] = []  # oldest first, two at most
        # Of retracted schedules, to be done with the next: from which block, by to which.
        self._copies: dict[int, int] = {}
        # The next block of each prompt that is being computed: others wait until it is cached.
        self._pending: dict[_Block, Sequence] = {}
        self._pending_of: dict[Sequence, _Block] = {}
        self._arrivals = 0
        self._prompt_tokens = self._hit_tokens = self._preemptions = 0

    @uninterrupted
    def add(
        self,
        request_id: Hashable,
        prompt: ArrayLike,
        max_new_tokens: int,
        *,
        priority: int = 0,
        namespace: Hashable = None,
        use_cache: bool = True,
    ) -> None:
        """Queue a request.

        Parameters
        ----------
        request_id : hashable
            Not in use by a request that has not finished.
        prompt : sequence of int
            Token ids, at least one.
        max_new_tokens : int
            Tokens after which the request is finished, 1 or more.
        priority : int
            How many earlier requests it may overtake, 0 or more. The number is finite, so no
            request starves.
        namespace : hashable
            Requests of one namespace share cached prefixes.
        use_cache : bool
            Whether it reads and fills the prefix cache.

        Raises
        ------
        ValueError
            If an argument does not fit, or the request needs more blocks than there are. Nothing
            has changed then.
        """
        self._check_new(request_id)
        tokens = prompt_ids(prompt)
        max_new_tokens = positive_int32(max_new_tokens, "max_new_tokens")
        priority = count_of(priority, "priority")
        limit = len(tokens) + max_new_tokens
        needed = self._blocks_held(limit - 1)  # the last token is not computed
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"expected a request of at most {self.pool.num_blocks} blocks, got "
                f"{len(tokens)} prompt and {max_new_tokens} new tokens, which need {needed}"
            )
        hash(namespace)  # or a TypeError now rather than in the middle of a step
        sequence = self._new(
            request_id, tokens, len(tokens), limit, namespace, bool(use_cache), priority
        )
        self._sequences[request_id] = sequence
        heapq.heappush(self._waiting, sequence)

    @uninterrupted
    def schedule(self) -> Schedule:
        """Choose what is computed next and take its blocks; one schedule may be in flight.

        Sequences continue from the tokens that it samples, see `Schedule.unknown`. A schedule that
        is chosen meanwhile preempts no request: if blocks run out, it is empty until the one in
        flight has ended.

        Returns
        -------
        Schedule
            Empty if there is nothing to do, or nothing before the schedule in flight has ended.
            Otherwise call `update` once it is computed, or `retract` if it is not.

        Raises
        ------
        PagedKVError
            If two schedules are in flight.
        """
        earlier = self._in_flight
        if len(earlier) > 1:
            raise PagedKVError("expected update or retract of one of two schedules in flight")
        if self._waiting and len(self._running) < self.max_running:
            # Generated tokens are cached when a later request could reuse them.
            for sequence in self._running:
                self._cache_generated(sequence)
        preempted: list[Hashable] = []
        while True:
            made = _InFlight(self.max_tokens)
            try:
                self._take(made, self._running)
                break
            except OutOfBlocksError:
                if earlier:
                    return self._schedule_of(_InFlight(self.max_tokens), [], *earlier)
                preempted.append(self._preempt_last())
        try:
            if not preempted:
                self._admit(made)
            if made.sequences:
                self._merge_copies(made)
                self._in_flight = [*earlier, made]
            made.schedule = self._schedule_of(made, preempted, *earlier)
            self._deliver()
        except BaseException:
            self._undo(made)
            self._in_flight = earlier
            raise
        for before in earlier if made.sequences else ():
            if before.schedule is not None and before.schedule.state == "new":
                before.schedule.state = "late"  # its tables have tokens of the next
        return made.schedule

    @property
    def in_flight(self) -> list[Schedule]:
        """The schedules that were neither updated nor retracted, oldest first, two at most."""
        return [made.schedule for made in self._in_flight if made.schedule]

    @uninterrupted
    def update(self, sampled: Mapping[Hashable, int]) -> list[Hashable]:
        """Note that the oldest schedule in flight has been computed, and its new tokens.

        Parameters
        ----------
        sampled : mapping of request id to int
            The next token of each request in `Schedule.samples`; requests that have ended may be
            left out.

        Returns
        -------
        list
            The requests that have now reached their number of tokens and are finished.

        Raises
        ------
        PagedKVError
            If nothing is scheduled.
        ValueError
            If the tokens are not those of the requests in `samples`. Nothing has changed then.
        """
        made = self._scheduled("update")[0]
        new = _sampled_tokens(made, sampled)
        for sequence, computed in made.prompts:
            if sequence.is_prefilling:
                self._cache(sequence, computed)
                sequence.is_prefilling = computed < len(sequence.tokens)
                self._note_pending(sequence)
        self.pool.leave_windows(made.rows, np.array(made.starts, np.int64) + made.counts)
        finished = []
        for sequence, token in new:
            sequence.tokens.append(token)
            if len(sequence.tokens) >= sequence.limit:
                finished.append(sequence)
        for sequence in finished:
            self._cache_generated(sequence)
            self._end(sequence)
        self._land(made)
        self._deliver()
        return [sequence.request_id for sequence in finished]

    @uninterrupted
    def retract(self) -> None:
        """Undo the newest schedule in flight: its blocks are freed, its sequences keep running.

        Raises
        ------
        PagedKVError
            If nothing is scheduled.
        """
        made = self._scheduled("retract")[-1]
        self._undo(made)
        self._land(made)

    @uninterrupted
    def finish(self, request_id: Hashable) -> None:
        """End a request at any time; what it has computed stays cached.

        Tokens of it that are in flight are discarded: a request may end with a token from which the
        schedule in flight already continues. `update` needs no token of it then.

        Raises
        ------
        ValueError
            If there is no such request. Nothing has changed then.
        """
        sequence = self._get(request_id)
        self._cache_generated(sequence)
        self._leave(sequence)
        self._deliver()

    @uninterrupted
    def abort(self, request_id: Hashable) -> None:
        """End a request at any time.

        Its blocks become free, except those that other sequences hold: at once, or, if it is
        scheduled, when no schedule in flight computes it any more.

        Raises
        ------
        ValueError
            If there is no such request. Nothing has changed then.
        """
        self._leave(self._get(request_id))

    @uninterrupted
    def fork(self, request_id: Hashable, new_id: Hashable, last_token: int) -> None:
        """Fork a request, between steps: parallel sampling, beam search.

        The new one shares all blocks until one is written. If the request is preempted, both wait.

        Parameters
        ----------
        request_id : hashable
            A request that has had its first token.
        new_id : hashable
            Not in use.
        last_token : int
            The new request's last token, in place of the last sampled one.

        Raises
        ------
        ValueError
            If an id or the token does not fit, the request has no token yet, or `max_running`
            requests run. Nothing has changed then.
        PagedKVError
            If a schedule is in flight. Nothing has changed then.
        """
        if self._in_flight:
            raise PagedKVError("expected update or retract of what is in flight")
        parent = self._get(request_id)
        self._check_new(new_id)
        if len(parent.tokens) == parent.prompt:
            raise ValueError(f"expected a request that has a token, {request_id!r} has none")
        tokens = parent.tokens[:-1] + token_ids([last_token])
        runs = parent.is_running and len(parent.tokens) == parent.table.num_tokens + 1
        if runs and len(self._running) >= self.max_running:
            raise ValueError(f"expected fewer than {self.max_running} running requests")
        child = self._new(
            new_id, tokens, parent.prompt, parent.limit, parent.namespace, parent.shares
        )
        self._sequences[new_id] = child
        if runs:
            self._cache_generated(parent)
            child.table = parent.table.fork()
            child.node, child.num_shared = parent.node, parent.num_shared
            child.is_running = True
            insort(self._running, child)
        else:
            heapq.heappush(self._waiting, child)
        self._deliver()

    @uninterrupted
    def reset_cache(self) -> int:
        """Forget all cached prefixes, between steps or not; return how many blocks became free.

        Running sequences keep the blocks that they use; later requests no longer find them.
        """
        freed = self.tree.reset()
        self._deliver()
        return freed

    @uninterrupted
    def stats(self) -> Stats:
        """Return plain numbers for monitoring."""
        free, cached = self.pool.num_free, self.tree.num_evictable
        return Stats(
            blocks_allocated=self.pool.num_blocks,
            blocks_live=self.pool.num_blocks - free - cached,
            blocks_cached=cached,
            blocks_free=free,
            block_bytes=self.block_bytes,
            waiting=len(self._sequences) - len(self._running),
            running=len(self._running),
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
            preemptions=self._preemptions,
            evicted_blocks=self.tree.evicted_blocks,
            group_blocks=self.pool.blocks_by_group,
        )

    @uninterrupted
    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is counted right; for tests, linear time."""
        self.pool.check_invariants()
        self.tree.check_invariants()
        assert self._running == sorted(self._running), "out of order"
        assert all(s.is_running and not s.is_dropped for s in self._running), "runs and does not"
        ended = {sequence for made in self._in_flight for sequence in made.ended}
        for sequence in {*self._waiting} - {*self._running}:
            if not sequence.is_dropped and not sequence.is_running:
                assert not sequence.table.num_tokens, "waits and has blocks"
        held = np.zeros_like(self.pool.refs)
        for node in self.tree.nodes():
            np.add.at(held, node.blocks[node.blocks >= 0], 1)
        for sequence in [*self._running, *ended]:
            ids = sequence.table.blocks
            np.add.at(held, ids[ids >= 0], 1)
            assert self._in_flight or len(sequence.tokens) > sequence.table.num_tokens, "is done"
        copies = [source for made in self._in_flight for source, _ in made.copies]
        np.add.at(held, [*copies, *self._copies.values()], 1)
        assert (held == self.pool.refs).all(), "a block has another number of references"
        assert {*self._pending_of} == {*self._pending.values()}, "pending, and not to be found"
        for sequence, block in self._pending_of.items():
            assert sequence.is_prefilling, "a prompt that is computed is pending"
            assert block == self._next_block(sequence), "the pending block is outdated"

    # What is computed next.

    def _take(self, made: _InFlight, sequences: list[Sequence]) -> None:
        """Add sequences, with all tokens of theirs that are not in blocks, while tokens are left.

        One that has none continues from the token that a schedule in flight samples, unless that is
        the last of its request. OutOfBlocksError if there are too few blocks for all of them.
        """
        first, left, new = len(made.sequences), made.left, made.tokens
        rows = [sequence.table.row for sequence in sequences]
        for sequence, start in zip(sequences, self.pool.lens[rows].tolist(), strict=True):
            tokens, done = sequence.tokens, start
            count = len(tokens) - done
            if not count:
                if done + 1 == sequence.limit:  # that token is not computed
                    continue
                tokens, done, count = _UNKNOWN, 0, 1
            if count <= left:
                made.sampled.append(sequence)
            elif left:
                count = left
            else:
                break
            left -= count
            if count == 1:  # most of them
                new.append(tokens[done])
            else:
                new.extend(tokens[done : done + count])
            if sequence.is_prefilling:
                made.prompts.append((sequence, start + count))
            made.sequences.append(sequence)
            made.counts.append(count)
            made.starts.append(start)
        made.left = left
        if len(made.sequences) > first:
            rows = [sequence.table.row for sequence in made.sequences[first:]]
            made.rows = np.concatenate([made.rows, np.array(rows, np.int64)])
            counts = np.array(made.counts[first:], np.int64)
            made.copies += self.pool.extend(made.rows[first:], counts)

    def _schedule_of(
        self, made: _InFlight, preempted: list[Hashable], before: _InFlight | None = None
    ) -> Schedule:
        """Return a schedule as the caller sees it; `before` is in flight."""
        unknown: dict[int, int] = {}
        samples_before: list[Hashable] = []
        if before is not None and before.schedule is not None:
            samples_before = before.schedule.samples
            index = {sequence: place for place, sequence in enumerate(before.sampled)}
            ends = accumulate(made.counts)
            for sequence, end, start in zip(made.sequences, ends, made.starts, strict=True):
                if start == len(sequence.tokens):
                    unknown[end - 1] = index[sequence]
        return Schedule(
            request_ids=[sequence.request_id for sequence in made.sequences],
            tables=[sequence.table for sequence in made.sequences],
            counts=made.counts,
            tokens=np.array(made.tokens, np.int32),
            copies=made.copies,
            samples=[sequence.request_id for sequence in made.sampled],
            preempted=preempted,
            unknown=unknown,
            samples_before=samples_before,
        )

    def _merge_copies(self, made: _InFlight) -> None:
        """Add the copies of retracted schedules that were not done."""
        for source, target in made.copies:
            if target in self._copies:  # given back meanwhile, and taken again
                self.pool.unref(np.array([self._copies[target]]))
            if source in self._copies:  # its content is still in its own source
                own, source = source, self._copies[source]
                self.pool.retain([source])
                self.pool.unref(np.array([own]))
            self._copies[target] = source
        made.copies = [(source, target) for target, source in self._copies.items()]
        self._copies = {}

    def _undo(self, made: _InFlight) -> None:
        """Let the sequences of a schedule go back to where they were."""
        for row, start in zip(made.rows.tolist(), made.starts, strict=True):
            self.pool.truncate(row, start)
        if made.schedule is None or made.schedule.state != "stepped":
            self._copies |= {target: source for source, target in made.copies}
            made.copies = []

    def _land(self, made: _InFlight) -> None:
        """End a schedule, whose copies are done."""
        if made.copies:
            self.pool.unref(np.array([source for source, _ in made.copies], np.int32))
        self._in_flight = [other for other in self._in_flight if other is not made]
        for sequence in made.ended:
            if not any(sequence in other.sequences for other in self._in_flight):
                self._release(sequence)
        if made.schedule is not None:
            made.schedule.state = "over"

    # Admission and preemption.

    def _admit(self, made: _InFlight) -> None:
        """Add waiting sequences to what is computed next."""
        held_back: list[Sequence] = []
        try:
            while made.left and self._waiting and len(self._running) < self.max_running:
                sequence = self._waiting[0]
                if sequence.is_dropped:
                    heapq.heappop(self._waiting)
                    continue
                match = self._match(sequence)
                if len(held_back) < self.max_running and self._is_pending(sequence, match):
                    held_back.append(heapq.heappop(self._waiting))
                elif self._start(sequence, match):
                    self._take(made, [sequence])
                else:
                    break
        finally:
            for sequence in held_back:
                heapq.heappush(self._waiting, sequence)

    def _start(self, sequence: Sequence, match: PrefixMatch | None) -> bool:
        """Let the first waiting sequence run on its cached prefix, if all of its tokens fit."""
        cached = match.num_blocks * self.block_size if match is not None else 0
        try:
            if match is not None and cached:
                # Before room is made: it must not lose its own prefix to the rest of itself.
                sequence.table.adopt(match.ids, cached)
            if not self._fits(sequence):
                sequence.table.free()
                return False
        except BaseException:
            sequence.table.free()
            raise
        heapq.heappop(self._waiting)
        sequence.is_running = sequence.is_prefilling = True
        insort(self._running, sequence)
        if match is not None:
            sequence.node, sequence.num_shared = match.node, match.num_blocks
        self._note_pending(sequence)
        self._prompt_tokens += len(sequence.tokens)
        self._hit_tokens += cached
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all of a sequence, besides a watermark."""
        held = int((sequence.table.blocks >= 0).sum())
        needed = self._blocks_held(len(sequence.tokens)) - held
        spare = 0
        if self._running:
            half = -(-len(self._running) // 2)  # each will need a block within S steps
            spare = half if self.watermark is None else self.watermark
        needed += spare * len(self.pool.windows)
        if needed <= self.pool.num_free:
            return True
        self.pool.drop_windows()
        return needed <= self.pool.num_free + self.tree.num_evictable

    def _blocks_held(self, tokens: int) -> int:
        """Return the most blocks that a sequence holds while it grows to `tokens` tokens."""
        blocks = blocks_needed(tokens, self.block_size)
        return self.pool.blocks_held(blocks, self._at_once)

    def _preempt_last(self) -> Hashable:
        """Let the last running sequence give up its blocks and wait; return its request."""
        last = self._running.pop()
        self._cache_generated(last)
        self._release(last)
        heapq.heappush(self._waiting, last)
        self._preemptions += 1
        return last.request_id

    # Cached prefixes.

    def _match(self, sequence: Sequence) -> PrefixMatch | None:
        """Return a sequence's cached prefix; None if it does not share."""
        if not sequence.shares:
            return None
        # At least the last token is computed, for what follows it.
        known = np.frombuffer(sequence.tokens, np.int32)[:-1]
        return self.tree.match_prefix(known, sequence.namespace)

    def _cache_generated(self, sequence: Sequence) -> None:
        """Cache the blocks that a sequence has filled; not what is in flight."""
        if not sequence.is_prefilling:  # then `update` has cached what there is
            self._cache(sequence, len(sequence.tokens) - 1)

    def _cache(self, sequence: Sequence, computed: int) -> None:
        """Cache a sequence's blocks up to `computed` tokens, and hold those of the tree instead."""
        first, node, whole = sequence.num_shared, sequence.node, computed // self.block_size
        if node is None or whole == first:
            return
        table, size = sequence.table, self.block_size
        new = np.array(sequence.tokens[first * size : whole * size], np.int32)
        added = self.tree.extend(node, new, table.blocks[:, first:whole])
        if added.num_blocks:
            self.pool.share(table.row, first, added.ids)
            sequence.node, sequence.num_shared = added.node, whole
        else:  # the tree was reset
            sequence.node, sequence.num_shared = None, 0

    def _is_pending(self, sequence: Sequence, match: PrefixMatch | None) -> bool:
        """Whether a running sequence computes the block that follows a sequence's match."""
        if match is None:
            return False
        return self._block_after(sequence, match.node, match.num_blocks) in self._pending

    def _note_pending(self, sequence: Sequence) -> None:
        """Note which block of its prompt a running sequence computes next, if others may share it.

        Others wait only for the first one.
        """
        self._forget_pending(sequence)
        if sequence.is_prefilling and sequence.node is not None:
            block = self._next_block(sequence)
            if block is not None and block not in self._pending:
                self._pending[block], self._pending_of[sequence] = sequence, block

    def _forget_pending(self, sequence: Sequence) -> None:
        block = self._pending_of.pop(sequence, None)
        if block is not None:
            del self._pending[block]

    def _next_block(self, sequence: Sequence) -> _Block | None:
        assert sequence.node is not None
        return self._block_after(sequence, sequence.node, sequence.num_shared)

    def _block_after(self, sequence: Sequence, node: RadixNode, blocks: int) -> _Block | None:
        """Name a sequence's block after `blocks` cached ones; None if its tokens do not fill it."""
        tokens = sequence.tokens[blocks * self.block_size : (blocks + 1) * self.block_size]
        if len(tokens) < self.block_size:
            return None
        return (node if blocks else (sequence.namespace,)), tokens.tobytes()

    # Requests.

    def _new(
        self,
        request_id: Hashable,
        tokens: array[int],
        prompt: int,
        limit: int,
        namespace: Hashable,
        shares: bool,
        priority: int = 0,
    ) -> Sequence:
        order = self._arrivals - priority, self._arrivals
        self._arrivals += 1
        table = BlockTable(self.pool, self.block_size)
        return Sequence(request_id, tokens, prompt, limit, order, namespace, shares, table)

    def _leave(self, sequence: Sequence) -> None:
        """Forget a request, and free its blocks when they are not being computed."""
        computing = [made for made in self._in_flight if sequence in made.sequences]
        for made in computing:
            made.ended.append(sequence)
        sequence.is_prefilling = False
        self._forget_pending(sequence)
        if computing:
            self._forget(sequence)
        else:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Forget a request and free its blocks."""
        self._release(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        sequence.is_dropped = True
        del self._sequences[sequence.request_id]
        if sequence in self._running:
            self._running.remove(sequence)
        elif len(self._waiting) > 2 * len(self._sequences) + 16:
            self._waiting = [waiting for waiting in self._waiting if not waiting.is_dropped]
            heapq.heapify(self._waiting)

    def _release(self, sequence: Sequence) -> None:
        """Let a sequence give back what it holds."""
        sequence.table.free()
        sequence.is_running = sequence.is_prefilling = False
        sequence.node, sequence.num_shared = None, 0
        self._forget_pending(sequence)

    def _get(self, request_id: Hashable) -> Sequence:
        if request_id not in self._sequences:
            raise ValueError(f"expected a request that has not finished, got {request_id!r}")
        return self._sequences[request_id]

    def _check_new(self, request_id: Hashable) -> None:
        if request_id in self._sequences:
            raise ValueError(f"expected a new request id, got {request_id!r} again")

    def _scheduled(self, call: str) -> list[_InFlight]:
        if self._in_flight:
            return self._in_flight
        raise PagedKVError(f"expected a schedule to {call}, got none")

    def _deliver(self) -> None:
        """Hand the events of a change that is complete to the listener."""
        while self._events:  # if one raises, those after it come with the next method
            event = self._events.pop(0)
            if self.on_event:
                self.on_event(event)


def _sampled_tokens(made: _InFlight, tokens: Mapping[Hashable, int]) -> list[tuple[Sequence, int]]:
    """Return each sequence that continues with its next token, without those that have ended.

    ValueError if `tokens` are not 32-bit integers of just these requests.
    """
    sequences, ended = made.sampled, {sequence.request_id for sequence in made.ended}
    if ended:
        sequences = [sequence for sequence in sequences if sequence not in made.ended]
    try:
        if not isinstance(tokens, Mapping):
            raise TypeError
        new = [tokens[sequence.request_id] for sequence in sequences]
        if len(tokens) - sum(request in tokens for request in ended) == len(new):
            return list(zip(sequences, token_ids(new), strict=True))
    except (KeyError, TypeError):
        pass
    wanted = {sequence.request_id for sequence in sequences}
    raise ValueError(f"expected tokens of {wanted}, got {tokens!r}")
