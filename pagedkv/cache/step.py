"""A step: one forward pass over all layers for some sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any
from weakref import ref

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.inputs import New
from pagedkv.attention.plan import AttentionPlan
from pagedkv.attention.scores import PLAIN, ScoreOptions
from pagedkv.cache.batches import Batches
from pagedkv.cache.pools import Pools
from pagedkv.cache.slots import SlotMapping
from pagedkv.errors import PagedKVError
from pagedkv.host.block_table import BlockTable
from pagedkv.host.interrupts import Uninterrupted
from pagedkv.host.schedule import Schedule
from pagedkv.limits import id_below

_UNCHANGED = "sequences that do not change before their step is over, one did"


def positions_of(
    first: NDArray[np.int64], counts: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the positions of new tokens, sequence by sequence, shape [T].

    Parameters
    ----------
    first : ndarray
        Position of the first new token of each sequence, shape [B].
    counts : sequence of int
        New tokens of each.
    """
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(ends[-1])


class _Part:
    """Sequences side by side with as many new tokens each.

    Attributes
    ----------
    tokens : slice
        Of all new tokens of the step, sequence by sequence.
    """

    def __init__(self, batch: DecodeBatch, count: int, first_token: int) -> None:
        self.batch, self.shape = batch, (len(batch.lens), count)
        self.tokens = slice(first_token, first_token + len(batch.lens) * count)
        self._plans: dict[Hashable, AttentionPlan] = {}  # of layers of a kind

    def plan(
        self,
        pools: Pools,
        layer: int,
        queries: mx.array,
        new: New,
        scale: float,
        path: str,
        scores: ScoreOptions,
    ) -> AttentionPlan:
        """Return the plan of such arguments, [B, H, Q, D] each, checked when it is made."""
        keys, values = new
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
            self.check("queries", queries)
            self.check("keys", keys)
            plan = pools.plan(layer, queries, new, self.batch, scale, path, scores)
            self._plans[kind] = plan
        return plan

    def check(self, name: str, array: mx.array) -> None:
        """Raise ValueError unless an array is of these sequences and tokens."""
        if array.ndim != 4 or array.shape[::2] != self.shape:
            sequences, count = self.shape
            raise ValueError(
                f"expected {name} of shape [{sequences}, H, {count}, D], got {array.shape}"
            )

    def of(self, packed: mx.array) -> mx.array:
        """Return what is the part's of an array [T, H, 1, D], as [B, H, Q, D]."""
        _, heads, _, head_dim = packed.shape
        own = packed[self.tokens]
        if self.shape[1] == 1:
            return own
        return own.reshape(*self.shape, heads, head_dim).swapaxes(1, 2)

    def packed(self, out: mx.array) -> mx.array:
        """Return an array [B, H, Q, D] as [B * Q, H, 1, D]."""
        if self.shape[1] == 1:
            return out
        return mx.flatten(out.swapaxes(1, 2), 0, 1)[:, :, None]


class Step:
    """The new tokens of some sequences, on their way through the layers of a model.

    Attributes
    ----------
    batch : DecodeBatch
        The sequences with their new tokens.
    tables : list of BlockTable
        The sequences, read-only.
    is_even : bool
        Whether all have as many new tokens.
    """

    def __init__(
        self, pools: Pools, batches: Batches, tables: list[BlockTable], counts: NDArray[np.int64]
    ) -> None:
        self.batch, self.tables = batches.next(), tables
        self._pool, self._rows = tables[0].pool, batches.rows
        self._versions, self._changes = self._pool.versions[self._rows], self._pool.changes
        self._pools, self._counts = pools, counts
        self._slots: dict[int, SlotMapping] = {}  # by group of layers
        self._ref = ref(self)
        self._written: set[int] = set()  # layers
        first = int(counts[0])
        self.is_even = len(counts) == 1 or bool((counts == first).all())
        self._parts = [_Part(self.batch, first, 0)] if self.is_even else []

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
            size, lens, counts = self._pools.block_size, self.batch.lens, self._counts
            positions, rows = lens - 1, self._rows
            if not self.is_even or counts[0] > 1:
                positions, rows = positions_of(lens - counts, counts), np.repeat(rows, counts)
            blocks, offsets = np.divmod(positions, size)
            ids = self._pool.ids[group, rows, blocks]
            made = mx.array((ids * size + offsets).astype(np.int32))
            slots = SlotMapping(made, size, self._pools.num_blocks, group, self._ref)
            self._slots[group] = slots
        return slots

    def is_current(self) -> bool:
        """Whether the sequences are as they were; in constant time while none changes."""
        if self._pool.changes != self._changes:
            versions, lens = self._pool.versions[self._rows], self._pool.lens[self._rows]
            if (versions != self._versions).any() or (lens != self.batch.lens).any():
                return False
            self._changes = self._pool.changes
        return True

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

        Each token sees itself and the tokens before it. On a GPU the kernel that attends, or
        gathers, also writes. A step changes Python state, so it cannot be traced by `mx.compile`.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        queries : mx.array
            Shape [B, Hq, Q, D] where all B sequences have Q new tokens, else [T, Hq, 1, D]: all
            new tokens, sequence by sequence. Dtype of the pools.
        keys, values : mx.array
            The same with Hkv heads of the layer; Hq is a multiple of Hkv.
        scale, path, scores
            As for `decode_attention`; the window of `scores` as for `PagedKVCache.attend`.

        Returns
        -------
        mx.array
            Shape and dtype of `queries`; lazy.

        Raises
        ------
        ValueError, UnsupportedPathError
            If an argument does not fit, as `paged_attention` and `PagedKVCache.write` say. Nothing
            has changed then.
        RuntimeError
            As `PagedKVCache.write`.
        PagedKVError
            If the step is over, or one of its sequences was changed elsewhere.
        """
        self._check_open()
        if not self.is_current():
            raise PagedKVError(f"expected {_UNCHANGED}")
        pools, slots, new = self._pools, self.slots_of, (keys, values)
        scores = pools.scores_of(layer, scores)
        if self.is_even:
            [part] = self._parts
            plan = part.plan(pools, layer, queries, new, scale, path, scores)
            out = pools.write_and_attend(layer, plan, queries, new, slots, scores, part.batch)
            self._written.add(layer)
            return out
        parts = self._parts or self._make_parts()
        self._check_packed(queries=queries, keys=keys, values=values)
        planned = []
        for part in parts:
            own, own_new = part.of(queries), (part.of(keys), part.of(values))
            plan = part.plan(pools, layer, own, own_new, scale, path, scores)
            planned.append((part, plan, own, own_new))
        if not all(pools.writes(plan) for _, plan, _, _ in planned):
            pools.write(layer, keys, values, slots(layer))
            written = None
        else:
            written = slots
        outputs = [
            part.packed(
                pools.write_and_attend(layer, plan, own, own_new, written, scores, part.batch)
            )
            for part, plan, own, own_new in planned
        ]
        self._written.add(layer)
        return mx.concatenate(outputs)

    def attend_again(
        self,
        layer: int,
        queries: mx.array,
        *,
        scale: float,
        path: str = "auto",
        scores: ScoreOptions = PLAIN,
    ) -> mx.array:
        """Attend once more over a layer whose tokens of this step are written, as `attend` does.

        For layers without K and V of their own. They may come when the step was committed, as long
        as its sequences are as they were then. Parameters, returns and raises as `attend`.
        """
        if not self.is_current():
            raise PagedKVError(f"expected {_UNCHANGED}")
        options: dict[str, Any] = {"scale": scale, "path": path, "scores": scores}
        if self.is_even:
            self._parts[0].check("queries", queries)
            return self._pools.attend(layer, queries, self.batch, **options)
        self._check_packed(queries=queries)
        outputs = [
            part.packed(self._pools.attend(layer, part.of(queries), part.batch, **options))
            for part in self._parts or self._make_parts()
        ]
        return mx.concatenate(outputs)

    def check_writing(self, pools: object) -> None:
        """Raise unless `PagedKVCache.write` of these pools may take the step's slots.

        Raises
        ------
        PagedKVError
            If the step is over.
        ValueError
            If it is another cache's.
        """
        if pools is not self._pools:
            raise ValueError("expected slots of this cache, got those of a step of another")
        self._check_open()

    def wrote(self, layer: int) -> None:
        """Note that a layer's K and V were written, by `PagedKVCache.write`."""
        self._written.add(layer)

    def _check_packed(self, **arrays: mx.array) -> None:
        total = int(self._counts.sum())
        for name, array in arrays.items():
            if array.ndim != 4 or array.shape[::2] != (total, 1):
                raise ValueError(
                    f"expected {name} of all new tokens, shape [{total}, H, 1, D], "
                    f"got {array.shape}"
                )

    def _make_parts(self) -> list[_Part]:
        """Cut uneven sequences into runs of as many new tokens."""
        row = token = 0
        for count, run in groupby(self._counts.tolist()):
            rows = slice(row, row + len(list(run)))
            if count:
                self._parts.append(_Part(self.batch.part(rows), count, token))
            row, token = rows.stop, token + count * (rows.stop - rows.start)
        return self._parts

    def _check_open(self) -> None:
        """Raise PagedKVError if the step is over."""


class ScheduledStep(Step):
    """All tokens of a schedule, for one forward pass.

    There is nothing to commit: `Scheduler.update` or `retract` ends the schedule.

    Attributes
    ----------
    request_ids : list
        The requests, those with the fewest new tokens first.
    tokens : mx.array
        The tokens to compute, int32; lazy if only the device knows some of them. Shape [B, Q] where
        all B sequences compute Q tokens, else [T, 1]: all tokens, sequence by sequence.
    positions : ndarray
        Position of the first token of each row of `tokens`, int32.
    sample_rows : list of int
        The rows whose next tokens this step samples, in the order of `Schedule.samples`.
    """

    def __init__(
        self,
        pools: Pools,
        batches: Batches,
        schedule: Schedule,
        tables: list[BlockTable],
        order: NDArray[np.int64],
        sampled: mx.array | None,
    ) -> None:
        every = np.array(schedule.counts, np.int64)
        counts = every[order]
        super().__init__(pools, batches, tables, counts)
        self._schedule = schedule
        self.request_ids = [schedule.request_ids[place] for place in order.tolist()]
        chosen = positions_of((np.cumsum(every) - every)[order], counts)
        tokens = mx.array(schedule.tokens[chosen])
        if sampled is not None and schedule.unknown:
            places = np.empty_like(chosen)
            places[chosen] = np.arange(len(chosen))
            known = [*schedule.unknown]
            tokens[mx.array(places[known])] = sampled[mx.array([*schedule.unknown.values()])]
        before = self.batch.lens - counts
        width = int(counts[0]) if self.is_even else 1
        self.tokens = tokens.reshape(-1, width)
        self.positions = positions_of(before, counts)[::width].astype(np.int32)
        last = np.cumsum(counts) // width - 1
        rows_of = dict(zip(self.request_ids, last.tolist(), strict=True))
        self.sample_rows = [rows_of[request_id] for request_id in schedule.samples]

    def _check_open(self) -> None:
        if self._schedule.state == "over":
            raise PagedKVError("expected a step under way, the schedule of this one is over")


class Extension(Step):
    """A step that owns its blocks: end it by `commit` or `rollback`, or use a `with` statement.

    Attributes
    ----------
    copies : list of (int, int)
        Blocks that were copied because they were shared: from which id, to which id.
    """

    def __init__(
        self,
        pools: Pools,
        batches: Batches,
        tables: list[BlockTable],
        counts: NDArray[np.int64],
        copies: list[tuple[int, int]],
        mark: object,
    ) -> None:
        super().__init__(pools, batches, tables, counts)
        self.copies, self._mark, self._over = copies, mark, ""

    @property
    def is_open(self) -> bool:
        """Whether it is neither committed nor rolled back."""
        return not self._over

    def give_up(self) -> None:
        """End the step, and leave its sequences to the caller."""
        self._over = "given up"

    def skip(self, layer: int) -> None:
        """Leave the new tokens out of a layer where no later token sees them.

        ValueError if there is no such layer.
        """
        self._written.add(id_below(self._pools.num_layers, layer, "a layer"))

    def commit(self) -> None:
        """Keep the new tokens, whose K and V `attend` or `PagedKVCache.write` put into every layer.

        Raises
        ------
        PagedKVError
            If a layer got no K and V; nothing has changed, and `rollback` is possible. If the step
            is over. If one of its sequences was changed elsewhere; the step is then over, and the
            sequences stay as they are.
        """
        self._check_open()
        self._check_sequences()
        if len(self._written) < self._pools.num_layers:
            missing = sorted({*range(self._pools.num_layers)} - self._written)
            raise PagedKVError(
                f"expected K and V in each of {self._pools.num_layers} layers before commit, got "
                f"none in layers {missing}"
            )
        with Uninterrupted():
            self._over = "committed"
            self._pool.leave_windows(self._rows, self.batch.lens)

    def rollback(self) -> None:
        """Let every sequence go back to its length before the step.

        Raises
        ------
        PagedKVError
            If the step is over; if one of its sequences was changed elsewhere, which ends the step
            and leaves the sequences as they are now; or, on a GPU, as `PagedKVCache.wait`, if an
            earlier step failed when it was evaluated, or this one did and others came after it.
            The sequences went back even then.
        """
        self._check_open()
        self._check_sequences()
        try:
            with Uninterrupted():
                self._over = "rolled back"
                before = self.batch.lens - self._counts
                for row, length in zip(self._rows.tolist(), before.tolist(), strict=True):
                    self._pool.truncate(row, length)
        finally:
            self._pools.rewind(self._mark)

    def __enter__(self) -> Extension:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._over:
            return
        if kind is not None:
            self.rollback()
            return
        try:
            self.commit()
        except BaseException:
            if not self._over:
                self.rollback()
            raise

    def _check_open(self) -> None:
        if self._over:
            raise PagedKVError(f"expected a step under way, this one was {self._over}")

    def _check_sequences(self) -> None:
        """Raise PagedKVError if a sequence was changed elsewhere, which ends the step."""
        if not self.is_current():
            self.give_up()
            raise PagedKVError(f"expected {_UNCHANGED}: they stay as they are now")
