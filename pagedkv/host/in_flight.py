"""What is being computed: the sequences and blocks of a schedule until it is over. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Mapping
from itertools import accumulate

import numpy as np

from pagedkv.errors import PagedKVError
from pagedkv.host.block_table import BlockTable
from pagedkv.host.reservation import Reservation
from pagedkv.host.schedule import Schedule
from pagedkv.host.sequence import Sequence, token_ids

_UNKNOWN = array("i", [0])  # stands for a token that is being sampled


class InFlight:
    """The sequences of a schedule, until it was computed or retracted.

    Attributes
    ----------
    left : int
        How many more tokens may be computed.
    sequences, sampled : list of Sequence
        The sequences that are computed, and those whose next token is sampled.
    prompts : list of (Sequence, int)
        Those whose prompt may not be all computed, and how many of their tokens are with this.
    ended : list of Sequence
        Those whose request has ended in the meantime; they still hold their blocks.
    committed : bool
        Whether blocks are kept already.
    made : Schedule or None
        It as the caller sees it.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self.ended: list[Sequence] = []
        self.committed = False
        self.made: Schedule | None = None
        self._reservations: list[Reservation] = []
        self.clear()

    def clear(self) -> None:
        """Give back all blocks, and forget all sequences."""
        while self._reservations:
            if self._reservations[-1].is_open:
                self._reservations[-1].undo()
            self._reservations.pop()
        self.left = self._most_tokens
        self.sequences: list[Sequence] = []
        self.sampled: list[Sequence] = []
        self.prompts: list[tuple[Sequence, int]] = []
        self._tables: list[BlockTable] = []
        self._counts: list[int] = []
        self._tokens = array("i")

    def take(self, sequences: Iterable[Sequence]) -> None:
        """Add sequences, with all tokens of theirs that are not in blocks, while tokens are left.

        One that has none goes on by the token that a schedule in flight samples, unless that is
        the last of its request.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks for all of them. No block is taken then; `clear`
            has to follow.
        """
        first, left = len(self.sequences), self.left
        chosen, sampled, new = self.sequences, self.sampled, self._tokens
        tables, counts = self._tables, self._counts
        for sequence in sequences:
            table, tokens = sequence.table, sequence.tokens
            done = table.num_tokens
            count = len(tokens) - done
            if not count:
                if done + 1 == sequence.limit:  # that token is not computed
                    continue
                tokens, done, count = _UNKNOWN, 0, 1
            if count <= left:
                sampled.append(sequence)
            elif left:
                count = left
            else:
                break
            left -= count
            if count == 1:  # most of them
                new.append(tokens[done])
            else:
                new.extend(tokens[done : done + count])
            if sequence.prefilling:
                self.prompts.append((sequence, table.num_tokens + count))
            chosen.append(sequence)
            tables.append(table)
            counts.append(count)
        self.left = left
        if len(chosen) > first:
            reservation = Reservation(tables[first:], counts[first:])
            self._reservations.append(reservation)
            reservation.take()

    def schedule(self, preempted: list[Hashable], before: InFlight | None = None) -> Schedule:
        """Return it as the caller sees it; `before` is what was in flight when it was made."""
        request_ids = [sequence.request_id for sequence in self.sequences]
        samples = request_ids[:]  # most often
        if len(self.sampled) < len(samples):
            samples = [sequence.request_id for sequence in self.sampled]
        unknown: dict[int, int] = {}
        samples_before: list[Hashable] = []
        if before and before.made:
            samples_before = before.made.samples
            index = dict(zip(before.sampled, range(len(samples_before)), strict=True))
            for sequence, end in zip(self.sequences, accumulate(self._counts), strict=True):
                if sequence.table.num_tokens > len(sequence.tokens):
                    unknown[end - 1] = index[sequence]
            if self.sequences and before.made.state == "new":
                before.made.state = "late"  # its tables have room for more than its own tokens now
        self.made = Schedule(
            request_ids,
            self._tables,
            self._counts,
            np.array(self._tokens, np.int32),
            [copy for reservation in self._reservations for copy in reservation.copies],
            samples,
            preempted,
            unknown,
            samples_before,
        )
        return self.made

    def check_whole(self) -> None:
        """Raise PagedKVError if an `update` of it was interrupted."""
        if self.committed:
            raise PagedKVError("expected update to be called again, it was interrupted")

    def end(self) -> None:
        """End it: its sequences are computed no more."""
        if self.made:
            self.made.state = "over"

    def sampled_tokens(self, tokens: Mapping[Hashable, int]) -> Iterable[tuple[Sequence, int]]:
        """Return each sequence that continues with its next token, without those that have ended.

        Raises
        ------
        ValueError
            If `tokens` are not 32-bit integers of just these requests.
        """
        sequences, ended = self.sampled, {s.request_id for s in self.ended}
        if ended:
            sequences = [sequence for sequence in sequences if sequence not in self.ended]
        try:
            if not isinstance(tokens, Mapping):
                raise TypeError
            new = [tokens[sequence.request_id] for sequence in sequences]
            if len(tokens) - sum(request in tokens for request in ended) == len(new):
                return zip(sequences, token_ids(new), strict=True)
        except (KeyError, TypeError):
            pass
        wanted = {sequence.request_id for sequence in sequences}
        raise ValueError(f"expected tokens of {wanted}, got {tokens!r}")

    @property
    def replaced(self) -> list[int]:
        """Blocks that were copied, which are held until it was computed."""
        still = [reservation for reservation in self._reservations if reservation.is_open]
        return [source for reservation in still for source, _ in reservation.copies]

    def commit(self) -> None:
        """Keep the blocks."""
        self.committed = True
        for reservation in self._reservations:
            if reservation.is_open:
                reservation.commit()


def check_updated(in_flight: Iterable[InFlight]) -> None:
    """Raise PagedKVError if an `update` of one was interrupted."""
    for one in in_flight:
        one.check_whole()
