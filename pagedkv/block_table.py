"""Where tokens lie in the pool: what one step reads (block tables) and writes (slots)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

_INT32_MAX = 2**31 - 1


def blocks_needed(tokens: int, block_size: int) -> int:
    """Return how many blocks hold `tokens` tokens: ceil(tokens / block_size).

    Parameters
    ----------
    tokens : int
        Number of tokens, 0 or more.
    block_size : int
        Tokens in a block, 1 or more.

    Returns
    -------
    int
        Number of blocks.

    Raises
    ------
    ValueError
        If `tokens` is negative or `block_size` is not positive.
    """
    if tokens < 0:
        raise ValueError(f"expected tokens >= 0, got {tokens}")
    if block_size < 1:
        raise ValueError(f"expected block_size >= 1, got {block_size}")
    return -(-tokens // block_size)


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
    """

    block_tables: mx.array
    context_lens: mx.array
    mask: mx.array | None
    block_size: int
    num_blocks: int

    @classmethod
    def from_tables(
        cls,
        block_tables: Sequence[Sequence[int]],
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
        block_size = _integer(block_size, "block_size")
        num_blocks = _integer(num_blocks, "num_blocks")
        if len(block_tables) == 0:
            raise ValueError("expected at least one block table, got an empty batch")
        if len(block_tables) != len(context_lens):
            raise ValueError(
                f"expected one context length per block table, "
                f"got {len(context_lens)} lengths for {len(block_tables)} tables"
            )
        lens = _integers(context_lens, "context_lens")
        if lens.min() < 1:
            row = int(lens.argmin())
            raise ValueError(f"expected context lengths >= 1, got {lens[row]} in row {row}")

        needed = -(-lens // block_size)
        tables = [_integers(table, f"block table {b}") for b, table in enumerate(block_tables)]
        for row, ids in enumerate(tables):
            if len(ids) < needed[row]:
                raise ValueError(
                    f"expected at least {needed[row]} blocks for {lens[row]} tokens in row {row}, "
                    f"got {len(ids)}"
                )
            if ids.min() < 0 or ids.max() >= num_blocks:
                bad = ids[(ids < 0) | (ids >= num_blocks)][0]
                raise ValueError(f"expected block ids in [0, {num_blocks}), got {bad} in row {row}")

        padded = np.empty((len(tables), int(needed.max())), dtype=np.int32)
        for row, ids in enumerate(tables):
            padded[row] = ids[0]
            padded[row, : needed[row]] = ids[: needed[row]]

        positions = padded.shape[1] * block_size
        mask = None
        if lens.min() < positions:
            mask = mx.array(np.arange(positions) < lens[:, None])[:, None, None, :]
        return cls(
            block_tables=mx.array(padded),
            context_lens=mx.array(lens.astype(np.int32)),
            mask=mask,
            block_size=block_size,
            num_blocks=num_blocks,
        )


@dataclass(frozen=True, eq=False)
class SlotMapping:
    """The slots that one step writes, checked on the host and put on the device once.

    Built once a step and shared by every layer, as `DecodeBatch` is.

    Attributes
    ----------
    slots : mx.array
        slot = block_id * S + offset of each token, shape [T], int32.
    block_size : int
        S, tokens in a block.
    num_blocks : int
        N, blocks in the pool that the slots index.
    """

    slots: mx.array
    block_size: int
    num_blocks: int

    @classmethod
    def from_slots(
        cls, slots: Sequence[int] | NDArray[np.integer], *, block_size: int, num_blocks: int
    ) -> SlotMapping:
        """Check host-side slots and place them on the default device.

        Parameters
        ----------
        slots : sequence of int
            One slot a token, in the order in which the tokens will be written; no slot twice.
        block_size : int
            Tokens in a block.
        num_blocks : int
            Blocks in the pool. MLX does not check bounds when it writes, so slots are checked here.

        Returns
        -------
        SlotMapping
            The step's slots.

        Raises
        ------
        ValueError
            If there is no slot, one is not in [0, num_blocks * block_size) or occurs twice, or
            `block_size`, `num_blocks` or their product is not a positive 32-bit integer. Nothing
            has reached the device then.
        """
        block_size = _integer(block_size, "block_size")
        num_blocks = _integer(num_blocks, "num_blocks")
        num_slots = _integer(num_blocks * block_size, "num_blocks * block_size")
        array = _integers(slots, "slots")
        if array.min() < 0 or array.max() >= num_slots:
            bad = array[(array < 0) | (array >= num_slots)][0]
            raise ValueError(f"expected slots in [0, {num_slots}), got {bad}")
        ordered = np.sort(array)
        twice = ordered[1:] == ordered[:-1]
        if twice.any():
            raise ValueError(f"expected each slot once, got {ordered[1:][twice][0]} twice")
        return cls(mx.array(array.astype(np.int32)), block_size, num_blocks)


def _integer(value: int, name: str) -> int:
    """Return a count as an int that fits the device's 32-bit ids, refusing anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"expected {name} to be an integer, got {value!r}") from None
    if not 1 <= number <= _INT32_MAX:
        raise ValueError(f"expected {name} in [1, {_INT32_MAX}], got {number}")
    return number


def _integers(values: Sequence[int] | NDArray[np.integer], name: str) -> NDArray[np.int64]:
    """Return `values` as a one-dimensional int64 array, refusing anything but integers."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"expected {name} to be one-dimensional, got {array.ndim} dimensions")
    if array.size == 0:
        raise ValueError(f"expected {name} to have at least one entry, got none")
    if array.dtype.kind not in "iu":
        raise ValueError(f"expected {name} to hold integers, got {array.dtype}")
    return array.astype(np.int64)
