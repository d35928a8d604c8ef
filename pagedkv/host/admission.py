"""Who runs: admission, eviction, preemption under a budget of blocks. Host only."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Hashable

from pagedkv.errors import OutOfBlocksError
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import blocks_needed
from pagedkv.host.prefixes import Prefixes
from pagedkv.host.radix_node import PrefixMatch
from pagedkv.host.schedule import InFlight
from pagedkv.host.sequence import Sequence


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
        self, pool: BlockPool, prefixes: Prefixes, max_running: int, watermark: int | None
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._max_running = max_running
        self._watermark = watermark
        self._waiting: list[Sequence] = []  # a heap; one that was dropped stays until its turn
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
        if sequence.running:
            self.running.remove(sequence)
            sequence.running = False
        elif len(self._waiting) > 2 * waiting + 16:
            self._waiting = [sequence for sequence in self._waiting if not sequence.dropped]
            heapq.heapify(self._waiting)

    def choose(self, max_tokens: int) -> tuple[InFlight, list[Hashable]]:
        """Return what is computed next, its blocks taken, and the requests preempted for it."""
        preempted: list[Hashable] = []
        if self._waiting and len(self.running) < self._max_running:
            # What was generated is cached when somebody may look for it.
            for sequence in self.running:
                self._prefixes.cache(sequence)
        while True:
            in_flight = InFlight(max_tokens)
            try:
                in_flight.take(self.running)
                break
            except OutOfBlocksError as error:
                short = error.needed - self._pool.num_free
                if self._evict(short) < short:
                    last = self.running[-1]
                    self._prefixes.cache(last)
                    self._prefixes.release(last)
                    self.wait(self.running.pop())
                    self.preemptions += 1
                    preempted.append(last.request_id)
        try:
            if not preempted:
                self._admit(in_flight)
        except BaseException:
            in_flight.undo()
            raise
        return in_flight, preempted

    def _admit(self, in_flight: InFlight) -> None:
        """Add waiting sequences to what is computed next."""
        held_back: list[Sequence] = []
        try:
            while in_flight.left and self._waiting and len(self.running) < self._max_running:
                sequence = self._waiting[0]
                if sequence.dropped:
                    heapq.heappop(self._waiting)
                    continue
                match = self._prefixes.match(sequence)
                if len(held_back) < self._max_running and self._prefixes.is_coming(sequence, match):
                    held_back.append(heapq.heappop(self._waiting))
                elif self._start(sequence, match):
                    in_flight.take([sequence])
                else:
                    break
        finally:
            for sequence in held_back:
                self.wait(sequence)

    def _start(self, sequence: Sequence, match: PrefixMatch | None) -> bool:
        """Let the first waiting sequence run on its cached prefix, if all of its tokens fit."""
        tree, pool = self._prefixes.tree, self._pool
        blocks = match.blocks if match else []
        cached = len(blocks) * tree.block_size
        needed = blocks_needed(len(sequence.tokens) - cached, tree.block_size)
        spare = 0
        if self.running:
            half = -(-len(self.running) // 2)  # each will need a block within S steps
            spare = half if self._watermark is None else self._watermark
        try:
            # Before anything is evicted: it must not lose its own prefix to the rest of itself.
            if match:
                self._prefixes.hold(sequence, match)
            if needed + spare <= pool.num_free + tree.num_evictable:
                self._evict(max(0, needed - pool.num_free))
                if needed <= pool.num_free:  # else somebody holds what was evicted
                    sequence.table.adopt(blocks, cached)
                    sequence.running = sequence.prefilling = True
        finally:
            if not sequence.running:
                self._prefixes.release(sequence)
        if sequence.running:
            self.run(heapq.heappop(self._waiting))
            self._prefixes.announce(sequence)
            self.prompt_tokens += len(sequence.tokens)
            self.hit_tokens += cached
        return sequence.running

    def _evict(self, num_blocks: int) -> int:
        freed = self._prefixes.tree.evict(num_blocks)
        self.evicted_blocks += freed
        return freed

    def check_invariants(self) -> None:
        """Raise AssertionError unless sequences wait or run, and only the latter hold blocks."""
        assert self.running == sorted(self.running), "out of order"
        assert all(s.running and not s.dropped for s in self.running), "somebody else runs"
        for sequence in self._waiting:
            assert not sequence.running, "waits and runs"
            assert sequence.dropped or not sequence.table.num_tokens, "waits and has blocks"
            assert sequence.dropped or sequence.node is None, "waits and has a lock"
