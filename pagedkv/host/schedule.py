"""What is computed next: plain data, and how it is put together. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedkv.host.block_table import BlockTable
from pagedkv.host.reservation import Reservation
from pagedkv.host.sequence import Sequence, token_ids


@dataclass(frozen=True, eq=False)
class Schedule:
    """What the model computes next: prompts, chunks of them, one token each of the others.

    `PagedKVCache.steps` makes device calls of it.

    Attributes
    ----------
    request_ids : list
        Whose tokens.
    tables : list of BlockTable
        Their blocks, with room for the tokens that are computed now, the last ones of each. They
        are the scheduler's own, to be read until `Scheduler.update` or `retract`.
    counts : list of int
        How many tokens of each are computed now.
    tokens : numpy.ndarray
        The tokens to compute, sequence by sequence, shape [sum(counts)], int32.
    copies : list of (int, int)
        Blocks to copy before anything is written: from which id, to which id.
    samples : list
        The requests whose next token follows from this; `Scheduler.update` takes those.
    preempted : list
        The requests that gave up their blocks for this. They are computed again later.
    """

    request_ids: list[Hashable]
    tables: list[BlockTable]
    counts: list[int]
    tokens: NDArray[np.int32]
    copies: list[tuple[int, int]]
    samples: list[Hashable]
    preempted: list[Hashable]


class InFlight:
    """The sequences of a schedule, until it was computed or retracted.

    Attributes
    ----------
    left : int
        How many more tokens may be computed.
    sequences, sampled : list of Sequence
        Who computes, and whose next token follows.
    aborted : list of Sequence
        Those that were aborted in the meantime; they still hold their blocks.
    """

    def __init__(self, most_tokens: int) -> None:
        self.left = most_tokens
        self.sequences: list[Sequence] = []
        self.sampled: list[Sequence] = []
        self.aborted: list[Sequence] = []
        self._tables: list[BlockTable] = []
        self._counts: list[int] = []
        self._tokens = array("i")
        self._reservations: list[Reservation] = []

    def take(self, sequences: Iterable[Sequence]) -> None:
        """Add sequences, with all tokens of theirs that are not in blocks, while tokens are left.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks for all of them. No block is taken then, and this
            object is not to be used any more.
        """
        first, left = len(self.sequences), self.left
        for sequence in sequences:
            tokens, done = sequence.tokens, sequence.table.num_tokens
            count = len(tokens) - done
            if count <= left:
                self.sampled.append(sequence)
            elif left:
                count = left
            else:
                break
            left -= count
            if count == 1:  # most of them
                self._tokens.append(tokens[done])
            else:
                self._tokens += tokens[done : done + count]
            self.sequences.append(sequence)
            self._tables.append(sequence.table)
            self._counts.append(count)
        self.left = left
        if len(self.sequences) > first:
            self._reservations.append(Reservation(self._tables[first:], self._counts[first:]))

    def schedule(self, preempted: list[Hashable]) -> Schedule:
        """Return it as the caller sees it."""
        return Schedule(
            [sequence.request_id for sequence in self.sequences],
            self._tables,
            self._counts,
            np.array(self._tokens, np.int32),
            [copy for reservation in self._reservations for copy in reservation.copies],
            [sequence.request_id for sequence in self.sampled],
            preempted,
        )

    def sampled_tokens(self, tokens: Mapping[Hashable, int]) -> Iterable[tuple[Sequence, int]]:
        """Return each sequence that goes on with its next token, those aborted left out.

        Raises
        ------
        ValueError
            If `tokens` are not 32-bit integers of just these requests.
        """
        sequences, aborted = self.sampled, set()
        if self.aborted:
            sequences = [sequence for sequence in sequences if not sequence.dropped]
            aborted = {sequence.request_id for sequence in self.aborted}
        try:
            new = [tokens[sequence.request_id] for sequence in sequences]
            if len(tokens) - sum(request in tokens for request in aborted) == len(new):
                return zip(sequences, token_ids(new), strict=True)
        except (KeyError, TypeError, IndexError):
            pass
        wanted = {sequence.request_id for sequence in sequences}
        raise ValueError(f"expected tokens of {wanted}, got {tokens!r}")

    @property
    def replaced(self) -> list[int]:
        """Blocks that were copied, which are held until it was computed."""
        return [source for reservation in self._reservations for source, _ in reservation.copies]

    def commit(self) -> None:
        """Keep the blocks."""
        for reservation in self._reservations:
            reservation.commit()

    def undo(self) -> None:
        """Give the blocks back."""
        while self._reservations:
            self._reservations[-1].undo()
            self._reservations.pop()
