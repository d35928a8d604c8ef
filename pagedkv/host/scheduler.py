"""Which sequences run in the next step, and in which blocks. Host only, plain data."""

from __future__ import annotations

import heapq
from array import array
from bisect import insort
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import PagedKVError
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable, blocks_needed, reserve
from pagedkv.host.prefix_cache import PrefixMatch, RadixTree
from pagedkv.host.radix_node import RadixNode
from pagedkv.host.stats import Stats

_SMALLEST, _LARGEST = -(2**31), 2**31 - 1  # token ids


@dataclass(frozen=True, eq=False)
class ScheduledStep:
    """What the model computes next: prompts, chunks of them, one token each of the others.

    `PagedKVCache.copy_blocks` takes `copies`, `SlotMapping` the slots, `DecodeBatch` the tables and
    context lengths: of sequences with the same count, for one call of `paged_attention`.

    Attributes
    ----------
    request_ids : list
        Whose tokens.
    block_tables : list of numpy.ndarray
        Ids of their blocks, shape [M] each.
    context_lens : list of int
        Their tokens with those that are computed now.
    counts : list of int
        How many tokens of each are computed now, the last ones of its context.
    tokens : numpy.ndarray
        The tokens to compute, sequence by sequence, shape [sum(counts)], int32.
    slots : numpy.ndarray
        Where their K and V go, shape [sum(counts)].
    copies : list of (int, int)
        Blocks to copy before anything is written: from which id, to which id.
    samples : list
        The requests whose next token follows from this step; `Scheduler.update` takes those.
    preempted : list
        The requests that gave up their blocks for this step. They are computed again later.
    """

    request_ids: list[Hashable]
    block_tables: list[NDArray[np.int32]]
    context_lens: list[int]
    counts: list[int]
    tokens: NDArray[np.int32]
    slots: NDArray[np.int64]
    copies: list[tuple[int, int]]
    samples: list[Hashable]
    preempted: list[Hashable]


class _Sequence:
    """A request and how far it has come."""

    __slots__ = (
        "arrival",
        "limit",
        "namespace",
        "next_block",
        "node",
        "order",
        "prefilling",
        "request_id",
        "table",
        "tokens",
    )

    def __init__(
        self,
        request_id: Hashable,
        tokens: array[int],
        limit: int,
        order: tuple[int, int],
        namespace: Hashable,
        table: BlockTable,
    ) -> None:
        self.request_id = request_id
        self.tokens = tokens  # the prompt and what was generated
        self.limit = limit  # tokens at which it is finished
        self.order = order
        self.namespace = namespace
        self.table = table  # what of it is in blocks
        self.node: RadixNode | None = None  # its locked prefix while it runs
        self.prefilling = False  # whether it runs and its prompt is not computed yet
        self.next_block: tuple[Hashable, bytes] | None = None  # what it announced to cache next

    def __lt__(self, other: _Sequence) -> bool:
        return self.order < other.order

    @property
    def missing(self) -> int:
        """Tokens that are not in blocks yet."""
        return len(self.tokens) - self.table.num_tokens


class Scheduler:
    """Admits, schedules and preempts requests under a budget of blocks and of tokens a step.

    First come, first served. Running sequences come first, in order; then waiting ones are admitted
    as long as the token budget lasts and their blocks fit beside a watermark. Prompts are computed
    in chunks beside other sequences' decode steps, as in vLLM. When blocks run out, the least
    recently used cached prefixes go first; then the last sequence in order gives up its blocks and
    is computed again later. The first in order is never preempted for another, so every request
    finishes.

    A request waits while a sequence is computing a prefix that both share, and then has it cached:
    requests that arrive together hold one copy.

    Parameters
    ----------
    pool : BlockPool
        The blocks to spend. Nobody else is to take from it.
    block_size : int
        S, tokens in a block.
    max_tokens : int
        Most tokens computed in a step.
    max_running : int
        Most sequences running at a time.
    watermark : int
        Blocks that an admission leaves for those that are running, so that they need not be
        preempted at once.
    block_bytes : int
        Bytes of a block in all layers, for `stats`.

    Raises
    ------
    ValueError
        If a size is not positive, or the watermark is negative.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        max_tokens: int = 2048,
        max_running: int = 256,
        watermark: int = 0,
        block_bytes: int = 0,
    ) -> None:
        for name, size in (("max_tokens", max_tokens), ("max_running", max_running)):
            if size < 1:
                raise ValueError(f"expected {name} >= 1, got {size}")
        if watermark < 0:
            raise ValueError(f"expected watermark >= 0, got {watermark}")
        self.pool = pool
        self.tree = RadixTree(pool, block_size)
        self.block_size = block_size
        self.max_tokens = max_tokens
        self.max_running = max_running
        self.watermark = watermark
        self.block_bytes = block_bytes
        self._sequences: dict[Hashable, _Sequence] = {}  # all that are waiting or running
        self._waiting: list[_Sequence] = []  # a heap; those that were aborted stay until popped
        self._running: list[_Sequence] = []  # in order
        self._coming: dict[tuple[Hashable, bytes] | None, _Sequence] = {}  # blocks being computed
        self._in_flight: list[_Sequence] | None = None  # scheduled and not computed yet
        self._arrivals = 0
        self._prompt_tokens = self._hit_tokens = self._preemptions = self._evicted = 0

    def add(
        self,
        request_id: Hashable,
        prompt: Sequence[int] | NDArray[np.integer],
        max_new_tokens: int,
        *,
        priority: int = 0,
        namespace: Hashable = None,
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
            How many earlier requests it may overtake, 0 or more. Being finite, it starves nobody.
        namespace : hashable
            With whom it shares cached prefixes.

        Raises
        ------
        ValueError
            If an argument does not fit, or the request needs more blocks than there are. Nothing
            has changed then.
        """
        self._check_new(request_id)
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError("expected a prompt of at least one integer token")
        if ids.min() < _SMALLEST or ids.max() > _LARGEST:
            raise ValueError("expected token ids to fit in 32 bits")
        if max_new_tokens < 1 or priority < 0:
            raise ValueError(
                f"expected max_new_tokens >= 1 and priority >= 0, got {max_new_tokens}, {priority}"
            )
        limit = ids.size + max_new_tokens
        # The last token is not computed.
        needed = blocks_needed(limit - 1, self.block_size)
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"expected a request of at most {self.pool.num_blocks} blocks, got {ids.size} "
                f"prompt and {max_new_tokens} new tokens, which need {needed}"
            )
        hash(namespace)  # or a TypeError now rather than in the middle of a step
        order = (self._arrivals - priority, self._arrivals)
        tokens = array("i", ids.astype(np.int32).tobytes())
        table = BlockTable(self.pool, self.block_size)
        sequence = _Sequence(request_id, tokens, limit, order, namespace, table)
        self._arrivals += 1
        self._sequences[request_id] = sequence
        heapq.heappush(self._waiting, sequence)

    def schedule(self) -> ScheduledStep:
        """Choose the next step and take its blocks.

        Returns
        -------
        ScheduledStep
            Empty if there is nothing to do. Otherwise `update` has to follow when it was computed,
            `retract` if it was not.

        Raises
        ------
        PagedKVError
            If the step before was neither updated nor retracted.
        """
        self._check_idle()
        preempted: list[Hashable] = []
        chosen, counts, planned = self._choose_running(preempted)
        if not preempted:
            self._admit(chosen, counts, planned)
        if not chosen:
            slots = np.empty(0, np.int64)
            return ScheduledStep([], [], [], [], slots.astype(np.int32), slots, [], [], preempted)
        tables = [sequence.table for sequence in chosen]
        with reserve(tables, counts) as reserved:
            tokens = array("i")
            samples = []
            for sequence, count in zip(chosen, counts, strict=True):
                end = sequence.table.num_tokens
                tokens += sequence.tokens[end - count : end]
                if end == len(sequence.tokens):
                    samples.append(sequence.request_id)
            step = ScheduledStep(
                [sequence.request_id for sequence in chosen],
                [table.block_ids for table in tables],
                [table.num_tokens for table in tables],
                counts,
                np.array(tokens, dtype=np.int32),
                reserved.slots,
                reserved.copies,
                samples,
                preempted,
            )
        self._in_flight = chosen
        return step

    def update(self, sampled: Mapping[Hashable, int]) -> list[Hashable]:
        """Note that the step was computed, and its new tokens.

        Parameters
        ----------
        sampled : mapping of request id to int
            The next token of each request in the step's `samples`, but for those aborted since.

        Returns
        -------
        list
            The requests that have now reached their number of tokens and are finished.

        Raises
        ------
        PagedKVError
            If no step is scheduled.
        ValueError
            If the tokens are not those of the requests in `samples`. Nothing has changed then.
        """
        if self._in_flight is None:
            raise PagedKVError("expected a scheduled step to update, got none")
        samples = [s for s in self._in_flight if s.node is not None and not s.missing]
        wanted = {sequence.request_id for sequence in samples}
        if sampled.keys() != wanted:
            raise ValueError(f"expected tokens of {wanted}, got {[*sampled]}")
        new = [_token(sampled[sequence.request_id]) for sequence in samples]
        for sequence in self._in_flight:
            if sequence.prefilling:
                self._share_prompt(sequence)
        self._in_flight = None
        finished = []
        for sequence, token in zip(samples, new, strict=True):
            sequence.tokens.append(token)
            if len(sequence.tokens) >= sequence.limit:
                finished.append(sequence.request_id)
        for request_id in finished:
            self.finish(request_id)
        return finished

    def retract(self) -> None:
        """Undo a step that was not computed: its sequences lose their blocks and wait again.

        Raises
        ------
        PagedKVError
            If no step is scheduled.
        """
        if self._in_flight is None:
            raise PagedKVError("expected a scheduled step to retract, got none")
        for sequence in self._in_flight:
            if sequence.node is not None:
                self._stop(sequence)
                heapq.heappush(self._waiting, sequence)
        self._in_flight = None

    def finish(self, request_id: Hashable) -> None:
        """End a request between steps; what it has computed goes into the prefix cache.

        Raises
        ------
        ValueError
            If there is no such request. Nothing has changed then.
        PagedKVError
            If a step is scheduled and neither updated nor retracted. Nothing has changed then.
        """
        self._check_idle()
        sequence = self._get(request_id)
        if sequence.node is not None:
            self._cache(sequence)
        self._drop(sequence)

    def abort(self, request_id: Hashable) -> None:
        """End a request at any time; its blocks are free but for those that others hold.

        Raises
        ------
        ValueError
            If there is no such request. Nothing has changed then.
        """
        self._drop(self._get(request_id))

    def fork(self, request_id: Hashable, new_id: Hashable, last_token: int) -> None:
        """Let a running request go on twice, between steps: parallel sampling, beam search.

        Parameters
        ----------
        request_id : hashable
            A request that has had its first token.
        new_id : hashable
            Not in use. It shares all blocks until it writes.
        last_token : int
            The new request's last token, in place of the one sampled last.

        Raises
        ------
        ValueError
            If an id or the token does not fit, the request has no token yet, or as many run as may.
            Nothing has changed then.
        PagedKVError
            If a step is scheduled and neither updated nor retracted. Nothing has changed then.
        """
        self._check_idle()
        parent = self._get(request_id)
        self._check_new(new_id)
        if parent.node is None or parent.prefilling:
            raise ValueError(f"expected a request that has a token, {request_id!r} has none")
        if len(self._running) >= self.max_running:
            raise ValueError(f"expected fewer than {self.max_running} running requests")
        tokens = parent.tokens[:-1]
        tokens.append(_token(last_token))
        order = (self._arrivals, self._arrivals)
        table = parent.table.fork()
        child = _Sequence(new_id, tokens, parent.limit, order, parent.namespace, table)
        self._arrivals += 1
        child.node = parent.node
        self.tree.lock(child.node)
        self._sequences[new_id] = child
        insort(self._running, child)

    def stats(self) -> Stats:
        """Return plain numbers for monitoring."""
        cached, free = self.tree.num_evictable, self.pool.num_free
        return Stats(
            blocks_allocated=self.pool.num_blocks,
            blocks_live=self.pool.num_blocks - free - cached,
            blocks_cached=cached,
            blocks_free=free,
            block_bytes=self.block_bytes,
            waiting=len(self._waiting),
            running=len(self._running),
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
            preemptions=self._preemptions,
            evicted_blocks=self._evicted,
        )

    def _choose_running(self, preempted: list[Hashable]) -> tuple[list[_Sequence], list[int], int]:
        """Return a step's running sequences, how many tokens of each, and the blocks it takes."""
        chosen: list[_Sequence] = []
        counts: list[int] = []
        planned, budget = 0, self.max_tokens
        for sequence in self._running.copy():
            if not budget or sequence.node is None:
                break  # out of tokens; or preempted, like all after it
            count = min(len(sequence.tokens) - sequence.table.num_tokens, budget)
            needed = sequence.table.missing_blocks(count)
            while needed and (short := planned + needed - self.pool.num_free) > 0:
                if self._evict(short) < short:
                    last = self._running[-1]
                    self._preempt(last)
                    preempted.append(last.request_id)
                    if last is sequence:
                        return chosen, counts, planned
                    needed = sequence.table.missing_blocks(count)
            planned += needed
            budget -= count
            chosen.append(sequence)
            counts.append(count)
        return chosen, counts, planned

    def _admit(self, chosen: list[_Sequence], counts: list[int], planned: int) -> None:
        """Add waiting sequences to a step that so far takes `planned` blocks."""
        budget = self.max_tokens - sum(counts)
        held_back: list[_Sequence] = []
        try:
            while self._waiting and budget and len(self._running) < self.max_running:
                sequence = self._waiting[0]
                # At least the last token is computed, for what follows it.
                known = np.array(sequence.tokens[:-1], dtype=np.int32)
                match = self.tree.match_prefix(known, sequence.namespace)
                first = self._next_block(sequence, len(match.blocks) * self.block_size)
                if first in self._coming and len(held_back) < self.max_running:
                    held_back.append(heapq.heappop(self._waiting))
                    continue
                if not self._start(sequence, match, planned):
                    break
                self._announce(sequence)
                count = min(sequence.missing, budget)
                planned += sequence.table.missing_blocks(count)
                budget -= count
                chosen.append(sequence)
                counts.append(count)
        finally:
            for sequence in held_back:
                heapq.heappush(self._waiting, sequence)

    def _start(self, sequence: _Sequence, match: PrefixMatch, planned: int) -> bool:
        """Let the first waiting sequence run on its cached prefix, if all of its tokens fit."""
        cached = len(match.blocks) * self.block_size
        needed = planned + blocks_needed(len(sequence.tokens) - cached, self.block_size)
        spare = self.watermark if self._running else 0
        # Locked before anything is evicted: it must not lose its own prefix to the rest of itself.
        self.tree.lock(match.node)
        try:
            if needed + spare > self.pool.num_free + self.tree.num_evictable:
                return False
            self._evict(needed - self.pool.num_free)
            if needed > self.pool.num_free:
                return False  # a fork holds what was evicted
            sequence.table.adopt(match.blocks, cached)
            sequence.node = match.node
        finally:
            if sequence.node is None:
                self.tree.unlock(match.node)
        sequence.prefilling = True
        insort(self._running, heapq.heappop(self._waiting))
        self._prompt_tokens += len(sequence.tokens)
        self._hit_tokens += cached
        return True

    def _next_block(self, sequence: _Sequence, computed: int) -> tuple[Hashable, bytes] | None:
        """Name the block after `computed` tokens by all tokens up to its end, if it gets full."""
        end = computed + self.block_size
        if end > len(sequence.tokens):
            return None
        return sequence.namespace, sequence.tokens[:end].tobytes()

    def _announce(self, sequence: _Sequence) -> None:
        """Say which block a running sequence computes next, if it is one that others may share."""
        if self._coming.get(sequence.next_block) is sequence:
            del self._coming[sequence.next_block]
        sequence.next_block = None
        if sequence.prefilling:
            whole = sequence.table.num_tokens // self.block_size * self.block_size
            sequence.next_block = self._next_block(sequence, whole)
            if sequence.next_block is not None:
                self._coming.setdefault(sequence.next_block, sequence)

    def _share_prompt(self, sequence: _Sequence) -> None:
        """Cache what was computed of a prompt, and hold on to it there."""
        match = self._cache(sequence)
        own = sequence.table.block_ids[: len(match.blocks)].tolist()
        if sequence.node is not None and match.blocks == own:
            self.tree.lock(match.node)
            self.tree.unlock(sequence.node)
            sequence.node = match.node
        sequence.prefilling = sequence.missing > 0
        self._announce(sequence)

    def _cache(self, sequence: _Sequence) -> PrefixMatch:
        """Put the whole blocks of a sequence into the prefix cache."""
        computed = np.array(sequence.tokens[: sequence.table.num_tokens], dtype=np.int32)
        return self.tree.insert(computed, sequence.table.block_ids, sequence.namespace)

    def _evict(self, num_blocks: int) -> int:
        freed = self.tree.evict(num_blocks)
        self._evicted += freed
        return freed

    def _preempt(self, sequence: _Sequence) -> None:
        """Take a running sequence's blocks; what it has computed stays cached while it may."""
        self._cache(sequence)
        self._stop(sequence)
        heapq.heappush(self._waiting, sequence)
        self._preemptions += 1

    def _stop(self, sequence: _Sequence) -> None:
        """Give back what a running sequence holds."""
        assert sequence.node is not None
        sequence.table.truncate(0)
        self.tree.unlock(sequence.node)
        sequence.node = None
        sequence.prefilling = False
        self._announce(sequence)
        self._running.remove(sequence)

    def _drop(self, sequence: _Sequence) -> None:
        """Forget a request."""
        if sequence.node is not None:
            self._stop(sequence)
        else:
            self._waiting.remove(sequence)
            heapq.heapify(self._waiting)
        del self._sequences[sequence.request_id]

    def _get(self, request_id: Hashable) -> _Sequence:
        if request_id not in self._sequences:
            raise ValueError(f"expected a request that has not finished, got {request_id!r}")
        return self._sequences[request_id]

    def _check_new(self, request_id: Hashable) -> None:
        if request_id in self._sequences:
            raise ValueError(f"expected a new request id, got {request_id!r} again")

    def _check_idle(self) -> None:
        if self._in_flight is not None:
            raise PagedKVError("expected update or retract of the step before")


def _token(value: int) -> int:
    """Return a token id, refusing what is not a 32-bit integer."""
    if not isinstance(value, (int, np.integer)) or not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"expected a 32-bit token id, got {value!r}")
    return int(value)
