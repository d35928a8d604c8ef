"""What is computed next: plain data, and how it is put together. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pagedkv.host.block_table import BlockTable
from pagedkv.host.reservation import Reservation
from pagedkv.host.sequence import Sequence, token_ids


@dataclass(eq=False)
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
    state : str
        "new", "stepped" when `PagedKVCache.steps` has made steps of it, "over" after `update` or
        `retract`.
    """

    request_ids: list[Hashable]
    tables: list[BlockTable]
    counts: list[int]
    tokens: NDArray[np.int32]
    copies: list[tuple[int, int]]
    samples: list[Hashable]
    preempted: list[Hashable]
    state: Literal["new", "stepped", "over"] = "new"


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
    committed : bool
        Whether blocks are kept already.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self.aborted: list[Sequence] = []
        self.committed = False
        self._made: Schedule | None = None
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
        self._tables: list[BlockTable] = []
        self._counts: list[int] = []
        self._tokens = array("i")

    def take(self, sequences: Iterable[Sequence]) -> None:
        """Add sequences, with all tokens of theirs that are not in blocks, while tokens are left.

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
            chosen.append(sequence)
            tables.append(table)
            counts.append(count)
        self.left = left
        if len(chosen) > first:
            reservation = Reservation(tables[first:], counts[first:])
            self._reservations.append(reservation)
            reservation.take()

    def schedule(self, preempted: list[Hashable]) -> Schedule:
        """Return it as the caller sees it."""
        request_ids = [sequence.request_id for sequence in self.sequences]
        samples = request_ids[:]  # most often
        if len(self.sampled) < len(samples):
            samples = [sequence.request_id for sequence in self.sampled]
        self._made = Schedule(
            request_ids,
            self._tables,
            self._counts,
            np.array(self._tokens, np.int32),
            [copy for reservation in self._reservations for copy in reservation.copies],
            samples,
            preempted,
        )
        return self._made

    def end(self) -> None:
        """Let nobody compute it any more."""
        if self._made is not None:
            self._made.state = "over"

    def sampled_tokens(self, tokens: Mapping[Hashable, int]) -> Iterable[tuple[Sequence, int]]:
        """Return each sequence that goes on with its next token, those aborted left out.

        Raises
        ------
        ValueError
            If `tokens` are not 32-bit integers of just these requests.
        """
        sequences, aborted = self.sampled, {s.request_id for s in self.aborted}
        if aborted:
            sequences = [sequence for sequence in sequences if sequence not in self.aborted]
        try:
            if not isinstance(tokens, Mapping):
                raise TypeError
            new = [tokens[sequence.request_id] for sequence in sequences]
            if len(tokens) - sum(request in tokens for request in aborted) == len(new):
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
