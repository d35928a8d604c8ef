"""The scheduler: chooses what is computed next. Host only, plain data."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Hashable, Mapping

from numpy.typing import ArrayLike

from pagedkv.errors import PagedKVError
from pagedkv.host.admission import Admission
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable
from pagedkv.host.cache_event import Listener
from pagedkv.host.in_flight import InFlight, check_updated
from pagedkv.host.invariants import check_blocks
from pagedkv.host.prefixes import Prefixes
from pagedkv.host.schedule import Schedule
from pagedkv.host.sequence import Sequence, prompt_ids, token_ids
from pagedkv.host.stats import Stats
from pagedkv.host.turns import one_at_a_time
from pagedkv.limits import count_of, positive_int32


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
    Methods may be called from any thread and run one at a time. `pool` and `tree` belong to the
    scheduler: read them between calls, and change nothing except by evicting from `tree`.

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
        Blocks that an admission leaves free for running sequences, so that they are not preempted
        at once; by default one for every two of them (docs/adr/0006).
    block_bytes : int
        Bytes of a block in all layers, for `stats`.
    on_event : callable
        As for `RadixTree`. Generated blocks are cached when a later request could reuse them.

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
        self.block_size = positive_int32(block_size, "block_size")
        self.max_tokens = positive_int32(max_tokens, "max_tokens")
        self.max_running = positive_int32(max_running, "max_running")
        self.watermark = watermark if watermark is None else count_of(watermark, "watermark")
        self.block_bytes = count_of(block_bytes, "block_bytes")
        self.lock = threading.RLock()  # held during each method
        self._sequences: dict[Hashable, Sequence] = {}  # all that are waiting or running
        self._prefixes = Prefixes(pool, self.block_size, on_event)
        self.tree = self._prefixes.tree
        limits = self.max_running, self.max_tokens, self.watermark
        self._admission = Admission(pool, self._prefixes, *limits)
        self._in_flight: list[InFlight] = []  # oldest first, two at most
        self._arrivals = 0

    @one_at_a_time
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
        ValueError, PagedKVError
            If an argument does not fit, the request needs more blocks than there are, or an
            `update` was interrupted. Nothing has changed then.
        """
        self._check_new(request_id)
        tokens = prompt_ids(prompt)
        max_new_tokens = positive_int32(max_new_tokens, "max_new_tokens")
        priority = count_of(priority, "priority")
        limit = len(tokens) + max_new_tokens
        needed = self._admission.frames_needed(limit - 1)  # the last token is not computed
        if needed > self.pool.num_frames:
            raise ValueError(
                f"expected a request of at most {self.pool.num_frames} {self.pool.unit}, got "
                f"{len(tokens)} prompt and {max_new_tokens} new tokens, which need {needed}"
            )
        hash(namespace)  # or a TypeError now rather than in the middle of a step
        sequence = self._new(
            request_id, tokens, len(tokens), limit, namespace, bool(use_cache), priority
        )
        try:
            self._sequences[request_id] = sequence
            self._admission.wait(sequence)
        except BaseException:
            self._end(sequence)
            raise

    @one_at_a_time
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
            If two schedules are in flight, or an `update` was interrupted.
        """
        earlier = self._in_flight
        if len(earlier) > 1:
            raise PagedKVError("expected update or retract of one of two schedules in flight")
        check_updated(earlier)
        in_flight = InFlight(self.max_tokens)
        try:
            preempted = self._admission.choose(in_flight, preempts=not earlier)
            schedule = in_flight.schedule(preempted, *earlier)
            if in_flight.sequences:
                self._in_flight = [*earlier, in_flight]
            return schedule
        except BaseException:
            in_flight.clear()
            self._in_flight = earlier
            raise

    @property
    def in_flight(self) -> list[Schedule]:
        """The schedules that were neither updated nor retracted, oldest first, two at most."""
        return [flight.made for flight in self._in_flight if flight.made]

    @one_at_a_time
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

        If anything else interrupts it, such as a listener of cache events, call it again with the
        same tokens: it continues where it stopped, if the schedule is still `in_flight`.
        """
        in_flight, *later = self._scheduled("update")
        new = in_flight.sampled_tokens(sampled)
        again = in_flight.committed
        in_flight.commit()
        for sequence, computed in in_flight.prompts:
            if sequence.prefilling:
                self._prefixes.progress(sequence, computed)
        finished = []
        for sequence, token in new:
            tokens = sequence.tokens
            ahead = again and any(sequence in flight.sequences for flight in later)
            if not again or len(tokens) == sequence.table.num_tokens - ahead:
                tokens.append(token)
            if len(tokens) >= sequence.limit:
                finished.append(sequence)
        for sequence in finished:
            self._prefixes.cache(sequence)
            self._end(sequence)
        self._land(in_flight)
        return [sequence.request_id for sequence in finished]

    @one_at_a_time
    def retract(self) -> None:
        """Undo the newest schedule in flight: its blocks are freed, its sequences keep running.

        Raises
        ------
        PagedKVError
            If nothing is scheduled, or an `update` of it was interrupted.
        """
        in_flight = self._scheduled("retract")[-1]
        in_flight.check_whole()
        in_flight.clear()
        self._land(in_flight)

    @one_at_a_time
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
        self._prefixes.cache(sequence)
        self._leave(sequence)

    @one_at_a_time
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

    @one_at_a_time
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
        runs = parent.running and parent.missing == 1
        if runs and len(self._admission.running) >= self.max_running:
            raise ValueError(f"expected fewer than {self.max_running} running requests")
        child = self._new(
            new_id, tokens, parent.prompt, parent.limit, parent.namespace, parent.shares
        )
        try:
            self._sequences[new_id] = child
            if runs:
                self._prefixes.fork(parent, child)
                self._admission.run(child)
            else:
                self._admission.wait(child)
        except BaseException:
            self._end(child)
            raise

    @one_at_a_time
    def reset_cache(self) -> int:
        """Forget all cached prefixes, between steps or not; return how many blocks became free.

        Running sequences keep the blocks that they use; later requests no longer find them.
        """
        return self.tree.reset()

    @one_at_a_time
    def stats(self) -> Stats:
        """Return plain numbers for monitoring."""
        return self._admission.stats(len(self._sequences), self.block_bytes)

    @one_at_a_time
    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is counted right; for tests, linear time."""
        check_blocks(self.pool, self._prefixes, self._admission, self._in_flight)

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

    def _land(self, in_flight: InFlight) -> None:
        """End a schedule."""
        others = [other for other in self._in_flight if other is not in_flight]
        for sequence in in_flight.ended:
            if not any(sequence in other.sequences for other in others):
                self._prefixes.release(sequence)
        in_flight.end()
        self._in_flight = others

    def _leave(self, sequence: Sequence) -> None:
        """Forget a request, and free its blocks when they are not being computed."""
        if computing := [flight for flight in self._in_flight if sequence in flight.sequences]:
            for flight in computing:
                flight.ended.append(sequence)
            self._prefixes.leave(sequence)
        else:
            self._prefixes.release(sequence)
        self._forget(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Forget a request and free its blocks."""
        self._prefixes.release(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._admission.drop(sequence, len(self._sequences) - len(self._admission.running))
        self._sequences.pop(sequence.request_id, None)

    def _get(self, request_id: Hashable) -> Sequence:
        if request_id not in self._sequences:
            raise ValueError(f"expected a request that has not finished, got {request_id!r}")
        return self._sequences[request_id]

    def _check_new(self, request_id: Hashable) -> None:
        check_updated(self._in_flight)  # it finishes requests that are not known before
        if request_id in self._sequences:
            raise ValueError(f"expected a new request id, got {request_id!r} again")

    def _scheduled(self, call: str) -> list[InFlight]:
        if self._in_flight:
            return self._in_flight
        raise PagedKVError(f"expected a schedule to {call}, got none")
