"""A step: one forward pass over all layers for some sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import TracebackType

import mlx.core as mx
import numpy as np

from pagedkv.attention.plan import AttentionPlan
from pagedkv.attention.scores import PLAIN, ScoreOptions
from pagedkv.cache.batches import Batches
from pagedkv.cache.pools import Pools
from pagedkv.cache.slots import SlotMapping
from pagedkv.errors import PagedKVError
from pagedkv.host.block_table import BlockTable
from pagedkv.host.reservation import Reservation
from pagedkv.host.schedule import Schedule
from pagedkv.limits import id_below

_UNCHANGED = "sequences that nobody changes before their step is over, but somebody did"


class Step:
    """The new tokens of some sequences, on their way through the layers of a model.

    Attributes
    ----------
    batch : DecodeBatch
        The sequences with their new tokens.
    is_even : bool
        Whether all have as many new tokens.
    """

    def __init__(self, pools: Pools, batches: Batches, counts: Sequence[int]) -> None:
        self.batch = batches.next()
        self._seen = batches.rows.seen
        self._pools, self._counts = pools, counts
        self._shape = len(counts), counts[0]
        self._plans: dict[Hashable, AttentionPlan] = {}  # of layers of a kind
        self._slots: dict[int, SlotMapping] = {}  # by group of layers
        self.is_even = counts.count(counts[0]) == len(counts)

    @property
    def tables(self) -> list[BlockTable]:
        """The sequences, to be read only."""
        return self._seen.tables

    @property
    def slots(self) -> SlotMapping:
        """The slots of the new tokens, sequence by sequence, where layers are in one group."""
        return self.slots_of(0)

    def slots_of(self, layer: int) -> SlotMapping:
        """Return the slots of the new tokens in a layer's pools, sequence by sequence.

        ValueError if there is no such layer.
        """
        group_of = self._pools.groups.group_of
        group = group_of[id_below(len(group_of), layer, "a layer")]
        slots = self._slots.get(group)
        if slots is None:
            size = self._pools.block_size
            blocks, offsets = np.divmod(self._seen.last_slots(self._counts), size)
            places = self._seen.tables[0].pool.places(blocks)[group]
            made = mx.array(places * size + offsets.astype(np.int32))
            slots = SlotMapping(made, size, self._pools.num_blocks, self._pools.slot_group(layer))
            self._slots[group] = slots
        return slots

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        path: str = "auto",
        scores: ScoreOptions = PLAIN,
    ) -> mx.array:
        """Write the new tokens' K and V into a layer's pools, and attend with the same tokens.

        Each token sees those before it and itself. All sequences have Q new tokens; where their
        counts differ, `PagedKVCache.write` takes K and V, and `PagedKVCache.attend` some of them.
        On a GPU the kernel that attends also writes where it can: up to 8 tokens a sequence. A
        step changes what the cache knows: it is not to be traced, as by `mx.compile`.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        queries : mx.array
            Shape [B, Hq, Q, D], dtype of the pools.
        keys, values : mx.array
            Shape [B, Hkv, Q, D] with Hkv and D of the layer, dtype of the pools; Hq is a multiple
            of Hkv.
        scale, path, scores
            As for `decode_attention`.

        Returns
        -------
        mx.array
            Shape [B, Hq, Q, D], dtype of `queries`; lazy.

        Raises
        ------
        ValueError, UnsupportedPathError
            If an argument does not fit, as `paged_attention` and `PagedKVCache.write` say, or the
            sequences have different counts of new tokens. Nothing has changed then.
        RuntimeError
            As `PagedKVCache.write`.
        PagedKVError
            If the step is over, or somebody else changed one of its sequences.
        """
        self._check_open()
        if not self._seen.holds():
            raise PagedKVError(f"expected {_UNCHANGED}")
        kind = (
            queries.shape,
            keys.shape,
            values.shape,
            queries.dtype,
            keys.dtype,
            values.dtype,
            scale,
            path,
            scores.kind,
        )
        plan = self._plans.get(kind)
        if plan is None:
            self._check_new(queries, keys)
            plan = self._pools.plan(layer, queries, (keys, values), self.batch, scale, path, scores)
            self._plans[kind] = plan
        return self._pools.write_and_attend(
            layer, plan, queries, (keys, values), self.slots_of, scores, self.batch
        )

    def _check_new(self, queries: mx.array, keys: mx.array) -> None:
        shape = self._shape
        if not self.is_even:
            counts = sorted(set(self._counts))
            raise ValueError(f"expected as many new tokens of each sequence, got counts {counts}")
        for name, array in (("queries", queries), ("keys", keys)):
            if array.ndim != 4 or array.shape[::2] != shape:
                raise ValueError(
                    f"expected {name} of shape [{shape[0]}, H, {shape[1]}, D], got {array.shape}"
                )

    def _check_open(self) -> None:
        """Raise PagedKVError if the step is over."""


class ScheduledStep(Step):
    """The sequences of a schedule that compute equally many tokens.

    Nothing of it is to be committed: `Scheduler.update` or `retract` ends the schedule.

    Attributes
    ----------
    request_ids : list
        Whose tokens, B of them.
    tokens : mx.array
        The tokens to compute, shape [B, Q], int32; lazy if some are known to the device alone.
    sample_rows : list of int
        Which of the B sequences' next token follows from this step.
    """

    def __init__(
        self,
        pools: Pools,
        batches: Batches,
        schedule: Schedule,
        rows: list[int],
        sampled: mx.array | None,
    ) -> None:
        count = schedule.counts[rows[0]]
        super().__init__(pools, batches, [count] * len(rows))
        self.request_ids = [schedule.request_ids[row] for row in rows]
        ends = np.cumsum(schedule.counts)[rows]
        self.tokens = mx.array(schedule.tokens[ends[:, None] + np.arange(-count, 0)])
        last = [schedule.unknown.get(end - 1, -1) for end in ends.tolist()]
        unknown = [row for row, index in enumerate(last) if index >= 0]
        if sampled is not None and unknown:
            indices = mx.array([last[row] for row in unknown])
            self.tokens[mx.array(unknown), -1] = sampled[indices]
        samples = set(schedule.samples)
        self._schedule = schedule
        self.sample_rows = [
            row for row, request_id in enumerate(self.request_ids) if request_id in samples
        ]

    def _check_open(self) -> None:
        if self._schedule.state == "over":
            raise PagedKVError("expected a step under way, the schedule of this one is over")


class Extension(Step):
    """A step that takes its blocks itself: `commit` or `rollback` ends it, or a `with` statement.

    Attributes
    ----------
    copies : list of (int, int)
        Blocks that were copied because they were shared: from which id, to which id.
    """

    def __init__(self, pools: Pools, batches: Batches, reservation: Reservation) -> None:
        self._mark = pools.mark()
        super().__init__(pools, batches, reservation.counts)
        self.copies = reservation.copies
        self._reservation = reservation
        self._over = ""
        self._undoing = False

    @property
    def is_open(self) -> bool:
        """Whether it was neither committed nor rolled back."""
        return self._reservation.is_open

    def commit(self) -> None:
        """Keep the new tokens.

        Raises
        ------
        PagedKVError
            If the step is over; or if somebody else changed one of its sequences. The step is over
            then, and the sequences stay as they are now.
        """
        self._check_open()
        self._check_sequences()
        self._reservation.commit()
        self._over = "committed"

    def rollback(self) -> None:
        """Leave pool, tables, and K and V of every sequence as they were before the step.

        Raises
        ------
        PagedKVError
            If the step is over; if somebody else changed one of its sequences, when the step is
            over and the sequences stay as they are now; or, on a GPU, as `PagedKVCache.wait`, if an
            earlier step failed when it was evaluated, or this one did and others came after it.
            Pool and tables are as they were also then.
        """
        self._check_open()
        if not self._undoing:  # again, after an interrupt
            self._check_sequences()
        self._undoing = True
        self._reservation.undo()
        self._over = "rolled back"
        self._pools.rewind(self._mark)

    def __enter__(self) -> Extension:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._over:
            return
        if kind is not None:
            self.rollback()
            return
        try:
            self.commit()
        except BaseException:
            if self._reservation.is_open:
                self.rollback()
            raise

    def _check_open(self) -> None:
        if self._over:
            raise PagedKVError(f"expected a step under way, this one was {self._over}")

    def _check_sequences(self) -> None:
        """Raise PagedKVError if somebody changed a sequence, and let go of all but what it has.

        What of the step's blocks is still the step's to undo is not known then.
        """
        if not self._seen.holds():
            self._reservation.commit()
            self._over = "given up"
            raise PagedKVError(f"expected {_UNCHANGED}: they stay as they are now")
