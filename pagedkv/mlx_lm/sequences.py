"""The sequences of a prompt cache, which all its layers share."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.attention.batch import DecodeBatch
from pagedkv.cache.kv_cache import PagedKVCache
from pagedkv.cache.step import Extension, positions_of
from pagedkv.errors import PagedKVError
from pagedkv.host.block_table import BlockTable
from pagedkv.host.turns import FairLock, synchronized
from pagedkv.mlx_lm.memory import MARGIN, Memory


class Sequences:
    """Sequences that a model computes together, and the forward pass that is under way.

    mlx-lm works layer by layer: it reads the offset of each, hands K and V to each, trims, filters
    and extends each. Here the first layer acts for all of them.

    Parameters
    ----------
    memory : Memory
        The memory of their blocks.
    tables : list of BlockTable
        The sequences. This object owns the list; when both are dropped, the blocks are freed.
    is_batch : bool
        Whether mlx-lm made a batch of them: then the offset is an array.

    Attributes
    ----------
    counts : list of int or None
        New tokens of each sequence in the pass to come, if it has no padding: its tokens are
        [B, Q] of those with as many, or [T, 1], sequence by sequence.
    is_prompt : bool
        Whether the pass under way has several tokens of a sequence.
    num_held : int
        Tokens of all sequences at its end.
    is_padded : bool
        Whether the pass under way has padding: sequences with fewer tokens than others.
    begins : list of int
        For each sequence the first token that every layer has; earlier ones may be missing in
        layers with windows.
    is_spare : bool
        Whether one of the pool's `reclaimers` will drop them; set by the code that adds it.
    """

    def __init__(self, memory: Memory, tables: list[BlockTable], *, is_batch: bool = False) -> None:
        self.memory, self.tables, self.is_batch = memory, tables, is_batch
        self.lengths: list[int] | None = None  # of prompts to come, which are padded on the right
        self._passed = 0  # tokens of them, with padding
        self.step: Extension | None = None
        # Lengths to go back to, from a step's begin to its end; or those of a `trim` under way.
        self._begun: list[int] | None = None
        self.version = self.trims = 0  # grow with each pass, with each `trim`
        self.mask: mx.array | None = None  # the last one that was asked for as an array
        self.lens: list[int] = []  # before the step under way
        self._size = 0, 0  # sequences and tokens of it, padding too
        self._done: set[int] = set()
        self._offsets: mx.array | None = None
        self.is_padded = self.is_spare = self.is_prompt = False
        self.num_held = 0
        self.counts: list[int] | None = None
        self.begins = [0] * len(tables)
        self.trimmed = 0  # by the first layer, for the others; so is `made`
        self.made: weakref.ref[Sequences] | None = None
        memory.live.add(self)

    @property
    def kv(self) -> PagedKVCache:
        """The pools; PagedKVError if the store was closed."""
        self.memory.check_open()
        return self.memory.kv

    @property
    def lock(self) -> FairLock:
        """The lock of the store."""
        return self.memory.lock

    def num_tokens(self, layer: int) -> list[int]:
        """Return the tokens of each sequence before the pass that `layer` takes part in next."""
        self._end_stale(layer)
        return self.lens if self.step else [table.num_tokens for table in self.tables]

    def offset(self, layer: int) -> int | mx.array:
        """Return the position of the next token: an int, or [B] int32 for a batch."""
        lens = self.num_tokens(layer)
        if not self.is_batch:
            return lens[0]
        if self._offsets is None:
            positions = np.array(lens)
            if self.counts is not None:
                counts = np.array(self.counts)
                positions = positions[counts > 0]
                counts = counts[counts > 0]
                if (counts != counts[0]).any():
                    positions = positions_of(positions, counts)
            self._offsets = mx.array(positions.astype(np.int32))
        return self._offsets

    def begin(self, layer: int, batch: int, count: int) -> Extension:
        """Return the step of a pass over `batch` sequences with `count` tokens each, padding too.

        Raises
        ------
        OutOfBlocksError
            If the store has too few blocks even without cached prefixes. Nothing has changed then.
        PagedKVError
            If another thread computes with the store. Nothing has changed then.
        ValueError
            If the number of sequences differs.
        """
        self._end_stale(layer)
        if self.step is not None and self._size != (batch, count):
            if self._done:
                raise ValueError(
                    f"expected K and V of {self._size[0]} sequences and {self._size[1]} tokens in "
                    f"every layer, got {batch} and {count}"
                )
            self.end()
        if self.step is None:
            self.memory.begin(self)
            self.memory.collect()
            if batch != len(self.tables) and self.counts is None:
                if self.is_batch or any(table.num_tokens for table in self.tables):
                    raise ValueError(f"expected {len(self.tables)} sequences, got {batch}")
                more = [self.kv.new_table() for _ in range(batch - len(self.tables))]
                # One statement, here and below: an interrupt does not come between its parts.
                self.tables[:], self.begins = [*self.tables, *more][:batch], [0] * batch
            lens = [table.num_tokens for table in self.tables]
            counts = [count] * batch
            if self.counts is not None:
                counts = self.counts
                if sum(counts) != batch * count:
                    raise ValueError(f"expected {sum(counts)} tokens, got {batch} times {count}")
            elif self.lengths is not None:
                counts = [min(max(x - self._passed, 0), count) for x in self.lengths]
            rows = [row for row, new in enumerate(counts) if new]
            self.lens, self._done, self._size = lens, set(), (batch, count)
            self.is_padded = self.counts is None and len(set(counts)) > 1
            self.is_prompt, self.num_held = max(counts) > 1, sum(lens) + sum(counts)
            if self.is_padded:
                self._note_padding(counts, count)
            self._begun = lens
            self.step = self.memory.extend(
                [self.tables[row] for row in rows], [counts[row] for row in rows]
            )
        return self.step

    def _note_padding(self, counts: list[int], width: int) -> None:
        places = np.concatenate([np.arange(new) + row * width for row, new in enumerate(counts)])
        back = np.zeros(len(counts) * width, np.int32)
        back[places] = np.arange(len(places))
        self._real, self._back = mx.array(places.astype(np.int32)), mx.array(back)
        real = {new for new in counts if new}
        self._even = (len([*filter(None, counts)]), *real) if len(real) == 1 else None

    def packed(self, padded: mx.array) -> mx.array:
        """Return an array [B, H, Q, D] of the pass as its step takes it, without padding."""
        _, heads, _, head_dim = padded.shape
        rows = padded.swapaxes(1, 2).reshape(-1, heads, 1, head_dim)[self._real]
        if self._even is None:
            return rows
        return rows.reshape(*self._even, heads, head_dim).swapaxes(1, 2)

    def unpacked(self, out: mx.array) -> mx.array:
        """Return an output of the step in the layout of `packed`; padding is undefined."""
        if self._even is not None:
            out = mx.flatten(out.swapaxes(1, 2), 0, 1)[:, :, None]
        _, heads, _, head_dim = out.shape
        return out[self._back].reshape(*self._size, heads, head_dim).swapaxes(1, 2)

    def batch_of(self, rows: Sequence[int]) -> DecodeBatch:
        """Return the batch with which attention reads all tokens of some sequences."""
        return self.kv.batch([self.tables[row] for row in rows])

    def attended(self, layer: int, count: int) -> None:
        """Note that a layer has attended; the last one ends the step."""
        self._done.add(layer)
        if len(self._done) == len(self.memory.shapes):
            assert self.step is not None
            offsets, self._offsets = self._offsets, None
            self.version += 1
            self.step.commit()
            self.end()
            if offsets is not None and self.lengths is None and self.counts is None:
                self._offsets = offsets + count

    def end(self) -> None:
        """End the pass under way, if there is one: layers are missing, so nothing is kept.

        It can be called again after an interrupt, and then completes the interrupted call.
        """
        passed = self._passed
        if self.step is not None:
            if self.step.is_open:
                self.step.rollback()
            elif self.lengths and [table.num_tokens for table in self.tables] != self._begun:
                passed += self._size[1]  # all layers have attended
        elif self._begun is not None:  # the step was not noted, or a `trim` is under way
            for table, length in zip(self.tables, self._begun, strict=True):
                table.truncate(min(length, table.num_tokens))
        self.step, self._begun, self._passed = None, None, passed

    def _end_stale(self, layer: int) -> None:
        """End a pass that never ended, if `layer` belongs to the next one."""
        if self._begun is not None and (self.step is None or layer in self._done):
            self.end()

    def changed(self) -> None:
        """Note that lengths or sequences have changed."""
        self.end()
        self._offsets = None

    @contextmanager
    def without_padding(self, counts: list[int]) -> Iterator[None]:
        """Let a pass compute `counts` new tokens of each sequence."""
        self.changed()
        try:
            self.counts = counts
            yield
        finally:
            self.counts = None
            self.changed()

    def prepare(self, lengths: Sequence[int] | None) -> None:
        """Note the lengths of prompts that are padded on the right; None at their end."""
        self.changed()
        self.lengths, self._passed = (None if lengths is None else list(lengths)), 0

    @synchronized
    def trim(self, count: int) -> int:
        """Drop tokens from the end of each sequence; return how many.

        Raises
        ------
        ValueError
            If what would be seen then has left a window. Nothing has changed then.
        """
        self.changed()
        count = min([count, *(table.num_tokens for table in self.tables)])
        if not self.can_trim(count):
            raise ValueError(
                f"expected to trim {MARGIN} tokens at most, got {count}: what the tokens before "
                "them see has left a layer's window"
            )
        lengths = [table.num_tokens - count for table in self.tables]
        self.trims, self._begun = self.trims + 1, lengths
        self.end()
        return count

    def can_trim(self, count: int) -> bool:
        """Whether `count` tokens can be dropped: everything seen afterwards is still there."""
        longest = max([window for window in self.kv.groups.windows if window], default=1)
        for table, begins in zip(self.tables, self.begins, strict=True):
            kept = max(table.num_tokens - count, 0)
            # After that many tokens nothing is seen of what is missing.
            lacks = begins and 0 < kept < begins + longest - 1
            if lacks or not table.sees_all(kept):
                return False
        return True

    def is_all_there(self) -> bool:
        """Whether no block has left a window: any number of tokens can be dropped."""
        return not any(self.begins) and all((table.blocks >= 0).all() for table in self.tables)

    @synchronized
    def fork(self, rows: Sequence[int], *, is_batch: bool = False) -> Sequences:
        """Return a fork of some of the sequences: nothing is copied."""
        self.end()
        tables = [self.tables[row].fork() for row in rows]
        fork = Sequences(self.memory, tables, is_batch=is_batch)
        fork.begins = [self.begins[row] for row in rows]
        return fork

    @synchronized
    def filter(self, rows: Sequence[int]) -> None:
        """Keep some of the sequences."""
        self.changed()
        tables, begins, lengths = self.tables, self.begins, self.lengths
        if lengths is not None:
            lengths = [lengths[row] for row in rows]
        kept = [tables[row] for row in rows], [begins[row] for row in rows]
        before = tables[:], begins, self.lengths
        try:
            self.tables[:], self.begins, self.lengths = *kept, lengths
        except BaseException:
            self.tables[:], self.begins, self.lengths = before
            raise

    @synchronized
    def extend(self, other: Sequences) -> None:
        """Take over the sequences of another batch of the same store."""
        if other.memory is not self.memory:
            raise PagedKVError("expected caches of one store")
        self.changed()
        other.changed()
        before = self.tables[:], self.begins, other.tables[:], other.begins
        tables, begins = before[0] + before[2], before[1] + before[3]
        try:
            self.tables[:], self.begins, other.tables[:], other.begins = tables, begins, [], []
        except BaseException:
            self.tables[:], self.begins, other.tables[:], other.begins = before
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequences:
        return self.fork(range(len(self.tables)), is_batch=self.is_batch)
