"""Admission, eviction and preemption under a budget of blocks. Host only."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Hashable

from pagedkv.errors import OutOfBlocksError
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import blocks_needed
from pagedkv.host.in_flight import InFlight
from pagedkv.host.prefixes import Prefixes
from pagedkv.host.radix_node import PrefixMatch
from pagedkv.host.sequence import Sequence
from pagedkv.host.stats import Stats


class Admission:
    """Lets waiting sequences run while blocks last, and stops the last ones when they run out.

    Attributes
    ----------
    running : list of Sequence
        In order.
    prompt_tokens, hit_tokens, preemptions, evicted_blocks : int
        As in `Stats`.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefixes: Prefixes,
        max_running: int,
        max_tokens: int,
        watermark: int | None,
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._max_running = max_running
        self._watermark = watermark
        self._at_once = blocks_needed(max_tokens, prefixes.tree.block_size) + 1
        # A heap. One that was dropped stays until its turn, and so may one that runs.
        self._waiting: list[Sequence] = []
        self._held_back: list[Sequence] = []  # while others are looked at
        self.running: list[Sequence] = []
        self.prompt_tokens = self.hit_tokens = self.preemptions = self.evicted_blocks = 0

    def wait(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        heapq.heappush(self._waiting, sequence)

    def run(self, sequence: Sequence) -> None:
        """Let a sequence run that holds what it needs."""
        sequence.running = True
        insort(self.running, sequence)

    def drop(self, sequence: Sequence, waiting: int) -> None:
        """Forget a sequence; `waiting` is how many still wait."""
        sequence.dropped = True
        sequence.running = False
        if sequence in self.running:
            self.running.remove(sequence)
        elif len(self._waiting) > 2 * waiting + 16:
            self._waiting = [sequence for sequence in self._waiting if not sequence.dropped]
            heapq.heapify(self._waiting)

    def choose(self, in_flight: InFlight, *, preempts: bool) -> list[Hashable]:
        """Choose what is computed next, allocate its blocks, and return the preempted sequences.

        Nothing is chosen if a sequence would have to be preempted and `preempts` is false.
        """
        preempted: list[Hashable] = []
        while self.running and not self.running[-1].running:  # what was interrupted
            self._stop_last()
        if self._waiting and len(self.running) < self._max_running:
            # Generated tokens are cached when a later request could reuse them.
            for sequence in self.running:
                self._prefixes.cache(sequence)
        while True:
            try:
                in_flight.take(self.running)
                break
            except OutOfBlocksError as error:
                in_flight.clear()
                short = error.needed - self._pool.num_free
                if self._evict(short) < short:
                    if not preempts:
                        return []
                    last = self.running[-1]
                    self._prefixes.cache(last)
                    self._prefixes.release(last)
                    self._stop_last()
                    self.preemptions += 1
                    preempted.append(last.request_id)
        if not preempted:
            self._admit(in_flight)
        return preempted

    def _admit(self, in_flight: InFlight) -> None:
        """Add waiting sequences to what is computed next."""
        try:
            while in_flight.left and self._waiting and len(self.running) < self._max_running:
                sequence = self._waiting[0]
                if sequence.dropped or sequence.running:
                    heapq.heappop(self._waiting)
                    continue
                match = self._prefixes.match(sequence)
                room = len(self._held_back) < self._max_running
                if room and self._prefixes.is_coming(sequence, match):
                    self._held_back.append(sequence)
                    heapq.heappop(self._waiting)
                elif self._start(sequence, match):
                    in_flight.take([sequence])
                else:
                    break
        finally:
            while self._held_back:
                heapq.heappush(self._waiting, self._held_back[-1])
                self._held_back.pop()

    def _start(self, sequence: Sequence, match: PrefixMatch | None) -> bool:
        """Let the first waiting sequence run on its cached prefix, if all of its tokens fit."""
        tree, pool = self._prefixes.tree, self._pool
        blocks = match.blocks if match else []
        cached = len(blocks) * tree.block_size
        needed = self.frames_needed(len(sequence.tokens)) - pool.frames_seen(len(blocks))
        whole = pool.frames_needed(1, 1)
        spare = 0
        if self.running:
            half = -(-len(self.running) // 2)  # each will need a block within S steps
            spare = half if self._watermark is None else self._watermark
        try:
            # Before anything is evicted: it must not lose its own prefix to the rest of itself.
            if match:
                self._prefixes.hold(sequence, match)
                pool.guarded = blocks
            if self._fits(needed + spare * whole):
                self._evict(-(-needed // whole) - pool.num_free)
                if needed <= pool.num_free_frames:  # else evicted blocks have other holders
                    sequence.table.adopt(blocks, cached)
                    sequence.running = sequence.prefilling = True
        finally:
            pool.guarded = []
            if not sequence.running:
                self._prefixes.release(sequence)
        if sequence.running:
            insort(self.running, sequence)
            heapq.heappop(self._waiting)
            self._prefixes.announce(sequence)
            self.prompt_tokens += len(sequence.tokens)
            self.hit_tokens += cached
        return sequence.running

    def frames_needed(self, tokens: int) -> int:
        """Return the most frames that a sequence holds while it grows to `tokens` tokens."""
        blocks = blocks_needed(tokens, self._prefixes.tree.block_size)
        return self._pool.frames_needed(blocks, self._at_once)

    def _fits(self, frames: int) -> bool:
        """Whether `frames` frames are free, or would be without unused cached prefixes."""
        pool = self._pool
        missing = frames - pool.num_free_frames
        return missing <= 0 or missing <= pool.frames_of_cached(self._prefixes.tree.num_evictable)

    def _stop_last(self) -> None:
        """Let the last one wait that has given back what it held."""
        heapq.heappush(self._waiting, self.running[-1])
        self.running.pop()

    def _evict(self, num_blocks: int) -> int:
        freed = self._prefixes.tree.evict(num_blocks)
        self.evicted_blocks += freed
        return freed

    def stats(self, requests: int, block_bytes: int) -> Stats:
        """Return plain numbers; `requests` is how many wait or run."""
        pool = self._pool
        cached = pool.frames_of_cached(self._prefixes.tree.num_evictable)
        free = pool.num_free_frames
        return Stats(
            blocks_allocated=pool.num_frames,
            blocks_live=pool.num_frames - free - cached,
            blocks_cached=cached,
            blocks_free=free,
            block_bytes=block_bytes,
            waiting=requests - len(self.running),
            running=len(self.running),
            prompt_tokens=self.prompt_tokens,
            hit_tokens=self.hit_tokens,
            preemptions=self.preemptions,
            evicted_blocks=self.evicted_blocks,
            group_frames=pool.group_frames(),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError unless sequences wait or run, and only the latter hold blocks."""
        assert self.running == sorted(self.running), "out of order"
        assert all(s.running and not s.dropped for s in self.running), "somebody else runs"
        for sequence in self._waiting:
            if not (sequence.dropped or sequence.running):
                assert not sequence.table.num_tokens, "waits and has blocks"
                assert sequence.node is None, "waits and has a lock"
