"""What one step reads, its block tables: checked on the host, put on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.limits import INT32_MAX, integers, positive_int32


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """The block tables of one decode step, checked on the host and put on the device once.

    Built once a step and shared by every layer, like the plan of FlashInfer's plan/run split.

    Attributes
    ----------
    block_tables : mx.array
        Block ids, shape [B, M], int32. M is the largest number of blocks any sequence needs;
        shorter rows repeat their own first block.
    context_lens : mx.array
        Tokens to attend over, shape [B], int32.
    mask : mx.array or None
        True where a gathered position belongs to the sequence, shape [B, 1, 1, M * S], bool;
        None when every context fills its M blocks exactly and there is nothing to mask.
    block_size : int
        S, tokens in a block.
    num_blocks : int
        N, blocks in the pool that the ids index.
    lens : ndarray
        The context lengths on the host, shape [B], int64.
    plans : dict
        What attention has found out about this step and need not do again for every layer.
    """

    block_tables: mx.array
    context_lens: mx.array
    mask: mx.array | None
    block_size: int
    num_blocks: int
    lens: NDArray[np.int64]
    plans: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    _rows: dict[int, mx.array] = field(default_factory=dict, init=False, repr=False)
    _masks: dict[tuple[int, int | None], mx.array] = field(
        default_factory=dict, init=False, repr=False
    )

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
            One row of block ids a sequence, in the order of its tokens. Rows may differ in length;
            ids past the last block that the context needs are checked and then left out.
        context_lens : sequence of int
            Context length in tokens, one a sequence.
        block_size : int
            Tokens in a block.
        num_blocks : int
            Blocks in the pool. `mx.take` does not check bounds, so ids are checked here.

        Returns
        -------
        DecodeBatch
            The step's tables.

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
        positions = len(columns) * block_size
        mask = None
        if lens.min() < positions:
            mask = mx.array(np.arange(positions) < lens[:, None])[:, None, None, :]
        return cls(
            block_tables=mx.array(padded.astype(np.int32)),
            context_lens=mx.array(lens.astype(np.int32)),
            mask=mask,
            block_size=block_size,
            num_blocks=num_blocks,
            lens=lens,
        )

    @cached_property
    def shortest(self) -> int:
        """The smallest context length, in tokens."""
        return int(self.lens.min())

    @cached_property
    def longest(self) -> int:
        """The largest context length, in tokens."""
        return int(self.lens.max())

    def rows(self, kv_heads: int) -> mx.array:
        """Return where each position of each head lies in a block-major pool.

        Made on the device when first asked for, kept, and shared by all layers and by K and V.

        Parameters
        ----------
        kv_heads : int
            Hkv, KV heads of the pool.

        Returns
        -------
        mx.array
            Indices into the first dimension of ``pool.reshape(N * S * Hkv, D)``, shape
            [B, Hkv, `longest`]; int32, or int64 for a pool with that many rows. Positions past a
            context length repeat the sequence's own first position, so that whatever its blocks
            held before is never read.
        """
        if kv_heads not in self._rows:
            in_int32 = self.num_blocks * self.block_size * kv_heads <= INT32_MAX
            dtype = mx.int32 if in_int32 else mx.int64
            positions = mx.arange(self.longest)
            blocks = mx.take(self.block_tables, positions // self.block_size, axis=1).astype(dtype)
            slots = blocks * self.block_size + (positions % self.block_size).astype(dtype)
            if self.shortest < self.longest:
                slots = mx.where(positions < self.context_lens[:, None], slots, slots[:, :1])
            heads = mx.arange(kv_heads, dtype=dtype)[:, None]
            self._rows[kv_heads] = slots[:, None, :] * kv_heads + heads
        return self._rows[kv_heads]

    def distances(self, query_len: int = 1) -> mx.array:
        """Return how far each position lies behind each of the last `query_len` tokens.

        Parameters
        ----------
        query_len : int
            Q; query i is the token at position context length - Q + i.

        Returns
        -------
        mx.array
            Position less the query's own, int32, shape [B, 1, 1, Q, `longest`]; positive where
            the position comes after it.
        """
        own = self.context_lens[:, None] + (mx.arange(query_len) - query_len)
        return mx.arange(self.longest) - own[:, None, None, :, None]

    def causal_mask(self, query_len: int = 1, window: int | None = None) -> mx.array | None:
        """Return which positions each of the last `query_len` tokens of a sequence may see.

        Parameters
        ----------
        query_len : int
            Q; query i is the token at position context length - Q + i.
        window : int, optional
            How many positions it may see at most, its own the last.

        Returns
        -------
        mx.array or None
            True where query i may see a position, bool, shape [B, 1, Q, `longest`]; None when it
            would be True everywhere.
        """
        everything = window is None or window >= self.longest
        if query_len == 1 and everything and self.shortest == self.longest:
            return None
        key = (query_len, window)
        if key not in self._masks:
            behind = self.distances(query_len)[:, 0]
            mask = behind <= 0
            self._masks[key] = mask if window is None else mask & (behind > -window)
        return self._masks[key]
