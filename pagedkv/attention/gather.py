"""Pools by block and by row: reading them into one tensor, replacing a block.

Shapes: B batch, Hkv KV heads, D head dim, N blocks in the pool, S block size, M blocks of the
longest table, L longest context length.
"""

from __future__ import annotations

import mlx.core as mx

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.codes import take
from pagedkv.attention.inputs import Layout, check_pool, check_rank
from pagedkv.limits import id_below


def gather_blocks(
    pool: mx.array, batch: DecodeBatch, *, layout: Layout = Layout.BLOCK_MAJOR
) -> mx.array:
    """Gather the blocks of each sequence into one K or V tensor, block by block.

    Parameters
    ----------
    pool : mx.array
        K or V pool in `layout`.
    batch : DecodeBatch
        Block tables and context lengths.
    layout : Layout
        Order of the pool's dimensions.

    Returns
    -------
    mx.array
        Shape [B, Hkv, M * S, D], lazy, not contiguous: the copy is in the pool's order and the
        heads are brought forward by strides. Positions past a context length hold whatever the
        block held before.

    Raises
    ------
    ValueError
        If the pool does not have the number of blocks and block size the tables were made for, or
        is quantized.
    """
    layout = Layout(layout)
    check_pool("pool", pool.shape, batch, layout)
    _check_numbers(pool)
    return take_blocks(pool, batch.block_tables, layout)


def gather_rows(pool: mx.array, batch: DecodeBatch) -> mx.array:
    """Gather the tokens of each sequence into one contiguous K or V tensor, row by row.

    Parameters
    ----------
    pool : mx.array
        K or V pool, [N, S, Hkv, D].
    batch : DecodeBatch
        Block tables and context lengths.

    Returns
    -------
    mx.array
        Shape [B, Hkv, L, D] with L the longest context length; lazy, contiguous, what SDPA reads
        without a second copy. Positions past a context length repeat the sequence's first.

    Raises
    ------
    ValueError
        If the pool does not have the number of blocks and block size the tables were made for, or
        is quantized.
    """
    _, _, kv_heads, head_dim = check_pool("pool", pool.shape, batch, Layout.BLOCK_MAJOR)
    _check_numbers(pool)
    return take(pool, batch.rows(kv_heads), head_dim, pool.dtype, is_keys=False)


def append_block(
    pool: mx.array, block: mx.array, block_id: int, *, layout: Layout = Layout.BLOCK_MAJOR
) -> mx.array:
    """Return a pool in which one block is replaced; the naive append, O(pool) while `pool` lives.

    `pool` stays valid and unchanged, so MLX copies all of it to write one block.

    Parameters
    ----------
    pool : mx.array
        K or V pool in `layout`.
    block : mx.array
        Shape [S, Hkv, D] (block-major) or [Hkv, S, D] (head-major), dtype of the pool.
    block_id : int
        Which block to replace, in [0, N).
    layout : Layout
        Order of the pool's dimensions.

    Returns
    -------
    mx.array
        The new pool, lazy.

    Raises
    ------
    ValueError
        If shape, dtype or id do not fit the pool.
    """
    layout = Layout(layout)
    check_rank("pool", pool.shape)
    axis = 0 if layout is Layout.BLOCK_MAJOR else 1
    expected = (*pool.shape[:axis], *pool.shape[axis + 1 :])
    if block.shape != expected:
        raise ValueError(f"expected a block of shape {expected}, got {block.shape}")
    if block.dtype != pool.dtype:
        raise ValueError(f"expected a block of dtype {pool.dtype}, got {block.dtype}")
    block_id = id_below(pool.shape[axis], block_id, "a block id")
    return mx.slice_update(pool, mx.expand_dims(block, axis), mx.array([block_id]), axes=[axis])


def take_blocks(pool: mx.array, block_tables: mx.array, layout: Layout) -> mx.array:
    """Do what `gather_blocks` says, without its checks."""
    rows, blocks = block_tables.shape
    _, block_size, kv_heads, head_dim = layout.dims(pool.shape)
    positions = blocks * block_size
    if layout is Layout.BLOCK_MAJOR:
        taken = mx.take(pool, block_tables, axis=0)
        return taken.reshape(rows, positions, kv_heads, head_dim).transpose(0, 2, 1, 3)
    taken = mx.take(pool, block_tables, axis=1)
    return taken.reshape(kv_heads, rows, positions, head_dim).transpose(1, 0, 2, 3)


def _check_numbers(pool: mx.array) -> None:
    if pool.dtype == mx.uint32:
        raise ValueError("expected a pool that is not quantized, got a quantized one")
