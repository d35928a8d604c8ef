"""Block tables for attention: checked on the host, then copied to the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.limits import INT32_MAX, integers, positive_int32

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """Block tables for attention, on the device; `from_tables` checks them.

    Make it once per step and share it between layers. It caches what attention derives from it:
    indices, masks, and a plan for each kind of call.

    Attributes
    ----------
    block_tables : mx.array
        Block ids, shape [B, M], int32. M is the largest number of blocks any sequence needs, or
        more; past those of a row are any ids of the pool.
    block_size : int
        S, tokens in a block.
    num_blocks : int
        N, blocks in the pool that the ids index.
    lens : ndarray
        Tokens to attend over, on the host, shape [B], int64.
    groups : tuple of mx.array
        As `block_tables`, the first of these, for each group of layers; empty if there is one.
    carried : dict
        Plans that can be reused for longer sequences, by kind of call, each with the `position` it
        was made at. Batches of the same sequences share it, and nothing in it may reference a
        batch.
    position : int
        Number of tokens by which each sequence has grown since the first of those batches.
    """

    block_tables: mx.array
    block_size: int
    num_blocks: int
    lens: NDArray[np.int64]
    groups: tuple[mx.array, ...] = ()
    carried: dict[Hashable, tuple[Any, int]] = field(default_factory=dict, repr=False)
    position: int = 0
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_tables(
        cls,
        block_tables: Sequence[Sequence[int] | NDArray[np.integer]],
        context_lens: Sequence[int],
        *,
        block_size: int,
        num_blocks: int,
    ) -> DecodeBatch:
        """Check host-side tables and place them on the default device.

        Parameters
        ----------
        block_tables : sequence of sequence of int
            One row of block ids per sequence, in the order of its tokens. Rows may differ in
            length; ids past the last block that the context needs are checked and then ignored.
        context_lens : sequence of int
            Context length in tokens, one per sequence.
        block_size : int
            Tokens in a block.
        num_blocks : int
            Blocks in the pool. `mx.take` does not check bounds, so ids are checked here.

        Returns
        -------
        DecodeBatch
            The tables.

        Raises
        ------
        ValueError
            If the batch is empty, the two sequences differ in length, a context length is not
            positive, a table is shorter than its context needs, an id is not in [0, num_blocks),
            or `block_size` or `num_blocks` is not a positive 32-bit integer. Nothing has reached
            the device then.
        """
        block_size = positive_int32(block_size, "block_size")
        num_blocks = positive_int32(num_blocks, "num_blocks")
        if len(block_tables) == 0:
            raise ValueError("expected at least one block table, got an empty batch")
        if len(block_tables) != len(context_lens):
            raise ValueError(
                f"expected one context length per block table, "
                f"got {len(context_lens)} lengths for {len(block_tables)} tables"
            )
        lens = integers(context_lens, "context_lens")
        if lens.min() < 1:
            row = int(lens.argmin())
            raise ValueError(f"expected context lengths >= 1, got {lens[row]} in row {row}")

        needed = -(-lens // block_size)
        tables = [integers(table, f"block table {b}") for b, table in enumerate(block_tables)]
        sizes = np.array([len(table) for table in tables])
        if (sizes < needed).any():
            row = int((sizes < needed).argmax())
            raise ValueError(
                f"expected at least {needed[row]} blocks for {lens[row]} tokens in row {row}, "
                f"got {sizes[row]}"
            )
        ids = np.concatenate(tables)
        starts = np.cumsum(sizes) - sizes
        outside = (ids < 0) | (ids >= num_blocks)
        if outside.any():
            bad = int(outside.argmax())
            row = int(np.searchsorted(starts, bad, side="right")) - 1
            raise ValueError(
                f"expected block ids in [0, {num_blocks}), got {ids[bad]} in row {row}"
            )

        columns = np.arange(needed.max())
        padded = ids[starts[:, None] + np.where(columns < needed[:, None], columns, 0)]
        return cls(
            block_tables=mx.array(padded.astype(np.int32)),
            block_size=block_size,
            num_blocks=num_blocks,
            lens=lens,
        )

    def once(self, what: Hashable, make: Callable[..., T], *arguments: Any) -> T:
        """Return what `make` returned when this batch was first asked for `what`.

        Layers of one step ask for the same. What is made must not hold the batch: it would keep
        its memory until Python's garbage collector comes.
        """
        made: T | None = self._made.get(what)
        if made is None:
            made = self._made[what] = make(*arguments)
        return made

    def of_group(self, group: int) -> DecodeBatch:
        """Return the same sequences by the tables of one group of layers."""
        if not self.groups:
            return self
        sizes = self.block_size, self.num_blocks
        return self.once(("group", group), DecodeBatch, self.groups[group], *sizes, self.lens)

    def part(self, rows: slice) -> DecodeBatch:
        """Return some of the sequences, which lie side by side."""
        groups = tuple(tables[rows] for tables in self.groups)
        lead = groups[0] if groups else self.block_tables[rows]
        return DecodeBatch(lead, self.block_size, self.num_blocks, self.lens[rows], groups)

    @cached_property
    def context_lens(self) -> mx.array:
        """Tokens to attend over, shape [B], int32."""
        return mx.array(self.lens.astype(np.int32))

    @cached_property
    def shortest(self) -> int:
        """The smallest context length, in tokens."""
        return int(self.lens.min())

    @cached_property
    def longest(self) -> int:
        """The largest context length, in tokens."""
        return int(self.lens.max())

    @cached_property
    def mask(self) -> mx.array | None:
        """True where a gathered position belongs to the sequence, shape [B, 1, 1, M * S], bool.

        None when every context fills its M blocks exactly and there is nothing to mask.
        """
        positions = self.block_tables.shape[1] * self.block_size
        if self.shortest == positions:
            return None
        return (mx.arange(positions) < self.context_lens[:, None])[:, None, None, :]

    def seen_from(self, query_len: int = 1, window: int | None = None) -> NDArray[np.int64]:
        """Return the first position that one of the last `query_len` tokens may see.

        Parameters
        ----------
        query_len : int
            Q; query i is the token at position context length - Q + i.
        window : int, optional
            How many positions each may see at most, its own the last.

        Returns
        -------
        ndarray
            On the host, shape [B], int64.
        """
        if window is None:
            return np.zeros_like(self.lens)
        return np.maximum(self.lens - query_len + 1 - window, 0)

    def rows(self, kv_heads: int, query_len: int = 1, window: int | None = None) -> mx.array:
        """Return where each position of each head lies in a block-major pool, of those seen.

        Made on the device when first asked for, kept, and shared by all layers and by K and V.

        Parameters
        ----------
        kv_heads : int
            Hkv, KV heads of the pool.
        query_len, window
            As for `seen_from`.

        Returns
        -------
        mx.array
            Indices into the first dimension of ``pool.reshape(N * S * Hkv, D)``, shape
            [B, Hkv, L]; int32, or int64 for a pool with that many rows. Position `seen_from` comes
            first, and L is the most that a sequence has from there on; a shorter one repeats its
            first, so that whatever its blocks held before is never read.
        """
        first = self.seen_from(query_len, window)
        seen = self.lens - first
        length, every = int(seen.max()), np.arange(len(seen))
        arguments = every, first, seen, length, kv_heads
        return self.once(("rows", kv_heads, query_len, window), self.rows_from, *arguments)

    def rows_from(
        self,
        sequences: NDArray[np.integer],
        first: NDArray[np.integer],
        tokens: NDArray[np.integer],
        length: int,
        kv_heads: int,
    ) -> mx.array:
        """Return where consecutive positions lie in a block-major pool, as `rows` does.

        Parameters
        ----------
        sequences, first, tokens : ndarray
            Of R spans the row of the batch, the first position and how many there are, [R] each.
        length : int
            L, no less than these.
        kv_heads : int
            Hkv, KV heads of the pool.

        Returns
        -------
        mx.array
            Shape [R, Hkv, L]; a shorter span repeats its first position.
        """
        in_int32 = self.num_blocks * self.block_size * kv_heads <= INT32_MAX
        dtype = mx.int32 if in_int32 else mx.int64
        positions = mx.arange(length)
        tables = self.block_tables
        if len(sequences) != len(self.lens) or (sequences != np.arange(len(sequences))).any():
            tables = tables[mx.array(sequences.astype(np.int32))]
        if first.any() or (tokens < length).any():
            begin, seen = mx.array(np.stack([first, tokens]).astype(np.int32))[..., None]
            positions = begin + mx.where(positions < seen, positions, 0)
            blocks = mx.take_along_axis(tables, positions // self.block_size, axis=1)
        else:
            blocks = mx.take(tables, positions // self.block_size, axis=1)
        offsets = (positions % self.block_size).astype(dtype)
        slots = blocks.astype(dtype) * self.block_size + offsets
        heads = mx.arange(kv_heads, dtype=dtype)[:, None]
        return slots[:, None, :] * kv_heads + heads
