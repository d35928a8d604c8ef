"""The cache: pools of K and V, and the bookkeeping of their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ReferenceType, ref

import mlx.core as mx
import numpy as np

from pagedkv.attention.batch import DecodeBatch
from pagedkv.cache.batches import Batches
from pagedkv.cache.pools import Pools
from pagedkv.cache.step import Extension, ScheduledStep
from pagedkv.errors import PagedKVError
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable
from pagedkv.host.interrupts import Uninterrupted
from pagedkv.host.schedule import Schedule


@dataclass(frozen=True)
class MemoryUsage:
    """Memory of the pools, in blocks and in bytes of K and V.

    Attributes
    ----------
    allocated_blocks : int
        Blocks in the pools.
    live_blocks : int
        Blocks in use.
    block_bytes : int
        Bytes of one block in the layers of its group.
    """

    allocated_blocks: int
    live_blocks: int
    block_bytes: int

    @property
    def free_blocks(self) -> int:
        """Blocks that are not in use."""
        return self.allocated_blocks - self.live_blocks

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pools."""
        return self.allocated_blocks * self.block_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return self.live_blocks * self.block_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks that are not in use."""
        return self.free_blocks * self.block_bytes


class PagedKVCache(Pools):
    """K and V pools of all layers, with the bookkeeping of their blocks.

    Parameters
    ----------
    num_layers : int
        Layers of the model.
    num_blocks : int
        N, blocks of each pool.
    block_size : int
        S, tokens in a block.
    kv_heads : int or sequence of int
        Hkv of every layer, or of each.
    head_dim : int or sequence of int
        D of every layer, or of each.
    dtype : mx.Dtype
        Of queries, new K and V, and outputs: float16, bfloat16 or float32.
    windows : sequence of int or None, optional
        For each layer, how many tokens a token sees, the last one itself; None for all. Layers are
        grouped by window, and a group frees blocks as they leave it. The pool then has `num_blocks`
        for each group, which any group may use. By default, `scores` gives the window with each
        call.
    margin : int
        Tokens that a sequence can drop from its end at any time, whatever the windows.
    bits : int or tuple of (int or None, int or None), optional
        Quantize K and V to 8 or 4 bits, or each to its own, see `pagedkv.attention.codes`; None:
        not quantized. D must then be a multiple of 8, up to 256.

    Attributes
    ----------
    pool : BlockPool
        Bookkeeping of the blocks. A block has the same id in every layer of its group.

    Raises
    ------
    ValueError
        If a size or the number of slots is not a positive 32-bit integer, a sequence does not have
        one for each layer, the dtype is another, or the pools are larger than what the device has
        left. Nothing has been allocated then.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: mx.Dtype = mx.float16,
        windows: Sequence[int | None] | None = None,
        margin: int = 0,
        bits: int | tuple[int | None, int | None] | None = None,
    ) -> None:
        super().__init__(
            num_layers, num_blocks, block_size, kv_heads, head_dim, dtype, windows, bits
        )
        self.pool = BlockPool(self.num_blocks, self.groups.windows, margin)
        self.pool.use_block_size(self.block_size)
        self._last: list[Batches] = []  # of the last steps, oldest first
        self._open: list[ReferenceType[Extension]] = []

    def memory_usage(self) -> MemoryUsage:
        """Return the blocks and bytes that are allocated, in use, and free."""
        return MemoryUsage(
            allocated_blocks=self.pool.num_blocks,
            live_blocks=self.pool.num_blocks - self.pool.num_free,
            block_bytes=self.block_bytes,
        )

    def new_table(self) -> BlockTable:
        """Return an empty sequence in this cache."""
        return BlockTable(self.pool, self.block_size)

    def extend(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> Extension:
        """Begin a step that appends tokens to sequences: prompts, chunks of them, one token each.

        Blocks are taken from the pool, and a partly filled last block that other sequences hold is
        copied first, it alone, in every layer. `Step.attend` follows for every layer, then `commit`
        or `rollback`. In ``with cache.extend(tables, counts) as step:`` the step is committed at
        the end of the body; an exception in it rolls back: pool, tables, and the K and V of every
        sequence are as they were before.

        A step with the sequences of the step before, in the same order and with as many tokens
        each, costs the host little: only changes are computed.

        Parameters
        ----------
        tables : sequence of BlockTable
            Distinct sequences of this cache, not to be changed before the step is over.
        counts : sequence of int
            New tokens of each, 0 or more, not all 0.

        Returns
        -------
        Extension
            The step.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks for all of it. Nothing has changed then.
        ValueError
            If the tables are not distinct sequences of this cache, the counts are not one a table,
            negative or all 0, or a sequence stays empty. Nothing has changed then.
        PagedKVError
            If a step of one of the sequences is under way. Nothing has changed then.
        """
        tables = list(tables)
        self._check_not_under_way(tables)
        batches = self._batches(tables)
        rows, mark, before = batches.rows, self.mark(), self.pool.lens[batches.rows]
        step = None
        try:
            with Uninterrupted():
                new, copies = batches.extend(counts)
                if copies:
                    try:
                        self.copy_blocks(copies)
                    except BaseException:
                        self.pool.uncopy(rows, copies)
                        raise
                    self.pool.unref(np.array([source for source, _ in copies], np.int32))
                step = Extension(self, batches, tables, new, copies, mark)
                self._open.append(ref(step))
            return step
        except BaseException:
            if step is not None:
                step.give_up()
            if (self.pool.lens[rows] > before).any():
                for row, length in zip(rows.tolist(), before.tolist(), strict=True):
                    self.pool.truncate(row, length)
            raise

    def step(self, schedule: Schedule, sampled: mx.array | None = None) -> ScheduledStep:
        """Return the step of a schedule: one forward pass over all its sequences.

        Blocks that the schedule shares and will write are copied first. `Step.attend` follows for
        every layer, then `Scheduler.update`, or `retract` if something failed. The next schedule
        may be chosen before that, when this has attended in every layer: it is lazy, and need not
        be computed.

        Parameters
        ----------
        schedule : Schedule
            What `Scheduler.schedule` returned last, of a scheduler with this cache's `pool`.
        sampled : mx.array
            The tokens that were sampled for `schedule.samples_before`, in this order, int32, or
            uint32 as `mx.argmax` returns them, shape [len(samples_before)]. They may be lazy:
            nothing waits for them here. Required, and read, only if some of the schedule's tokens
            are `unknown`.

        Returns
        -------
        ScheduledStep
            The step.

        Raises
        ------
        ValueError
            If the schedule is empty or of another cache's blocks, or `sampled` is missing or does
            not fit. Nothing has changed then.
        PagedKVError
            If a step was made of it before, the next was chosen before that, or it is over.
        """
        if schedule.state != "new":
            raise PagedKVError(f"expected a new schedule, this one is {schedule.state}")
        if not schedule.request_ids:
            raise ValueError("expected a schedule of at least one request")
        if schedule.unknown:
            _check_sampled(sampled, len(schedule.samples_before))
        order = np.argsort(schedule.counts, kind="stable")
        tables = [schedule.tables[place] for place in order.tolist()]
        step = ScheduledStep(self, self._batches(tables), schedule, tables, order, sampled)
        self.copy_blocks(schedule.copies)
        schedule.state = "stepped"
        return step

    def batch(self, tables: Sequence[BlockTable]) -> DecodeBatch:
        """Return the batch with which `attend` reads all tokens of some sequences.

        Raises
        ------
        ValueError
            If there is no table, one comes twice or is empty, or one is of another cache.
        """
        made = self._make_batches(list(tables))
        if not self.pool.lens[made.rows].all():
            raise ValueError("expected sequences of at least one token, got an empty one")
        return made.next()

    def _batches(self, tables: list[BlockTable]) -> Batches:
        """Return the `Batches` of tables: one of the last two; a prompt does not end the others."""
        found = next((last for last in self._last if last.are_of(tables)), None)
        if found is None:
            found = self._make_batches(tables)
        self._last = [*[last for last in self._last if last is not found][-1:], found]
        return found

    def _make_batches(self, tables: list[BlockTable]) -> Batches:
        """Return new `Batches`; ValueError unless tables are distinct and of this cache."""
        if not tables:
            raise ValueError("expected at least one table, got none")
        pool, size = self.pool, self.block_size
        if any(table.pool is not pool or table.block_size != size for table in tables):
            raise ValueError("expected tables of this cache")
        rows = [table.held_row() for table in tables]
        if len({*rows}) < len(rows):
            raise ValueError("expected distinct tables, got one twice")
        return Batches(pool, tables, np.array(rows, np.int64))

    def _check_not_under_way(self, tables: list[BlockTable]) -> None:
        """Raise PagedKVError if an open step extends one of the tables."""
        steps = [step for reference in self._open if (step := reference()) and step.is_open]
        self._open = [ref(step) for step in steps]
        busy = {id(table) for step in steps for table in step.tables}
        if busy and any(id(table) in busy for table in tables):
            raise PagedKVError(
                "expected sequences without a step under way, one is in a step that was neither "
                "committed nor rolled back"
            )


def _check_sampled(sampled: mx.array | None, count: int) -> None:
    if isinstance(sampled, mx.array):
        if sampled.shape == (count,) and sampled.dtype in (mx.int32, mx.uint32):
            return
        got = f"{sampled.dtype} of shape {sampled.shape}"
    else:
        got = repr(sampled)
    expected = f"as a uint32 or as an int32 array of shape ({count},)"
    raise ValueError(f"expected sampled tokens {expected}, got {got}")
