"""Decode attention over a paged K/V pool, and the contiguous attention it is measured against.

Shapes: B batch, Hq query heads, Hkv KV heads, D head dim, N blocks in the pool, S block size,
M blocks of the longest table, L context length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import mlx.core as mx

from pagedkv.block_table import DecodeBatch
from pagedkv.errors import UnsupportedPathError
from pagedkv.kv_cache import DTYPES


class Layout(Enum):
    """Order of a pool's dimensions."""

    BLOCK_MAJOR = "block_major"
    """[N, S, Hkv, D]: a block's tokens of all heads lie together. What the package uses."""

    HEAD_MAJOR = "head_major"
    """[Hkv, N, S, D]: each head has a pool of its own. A measured alternative."""

    def dims(self, pool: mx.array) -> tuple[int, int, int, int]:
        """Return (N, S, Hkv, D) of a four-dimensional pool."""
        if self is Layout.BLOCK_MAJOR:
            num_blocks, block_size, kv_heads, head_dim = pool.shape
        else:
            kv_heads, num_blocks, block_size, head_dim = pool.shape
        return num_blocks, block_size, kv_heads, head_dim


def contiguous_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float
) -> mx.array:
    """Attend over contiguous K/V with MLX's own kernel: the bound that paged paths are held to.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, 1, D]; float16, bfloat16 or float32.
    keys, values : mx.array
        Shape [B, Hkv, L, D], same dtype; Hq is a multiple of Hkv.
    scale : float
        Factor on the scores, usually D ** -0.5.

    Returns
    -------
    mx.array
        Shape [B, Hq, 1, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit together or `scale` is not finite.
    """
    _check_rank("keys", keys)
    _check_queries(queries, keys, values, kv_heads=keys.shape[1], head_dim=keys.shape[3])
    _check_scale(scale)
    if keys.shape[0] != queries.shape[0]:
        raise ValueError(f"expected K/V of batch {queries.shape[0]}, got {keys.shape[0]}")
    if queries.dtype not in DTYPES:
        raise ValueError(f"expected float16, bfloat16 or float32, got {queries.dtype}")
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)


def gather_blocks(
    pool: mx.array, batch: DecodeBatch, *, layout: Layout = Layout.BLOCK_MAJOR
) -> mx.array:
    """Gather the blocks of each sequence into one K or V tensor, block by block.

    Parameters
    ----------
    pool : mx.array
        K or V pool in `layout`.
    batch : DecodeBatch
        The step's tables.
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
        If the pool does not have the number of blocks and block size the tables were made for.
    """
    layout = Layout(layout)
    _check_pool("pool", pool, batch, layout)
    return _gather(pool, batch, layout)


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
    _check_rank("pool", pool)
    axis = 0 if layout is Layout.BLOCK_MAJOR else 1
    expected = (*pool.shape[:axis], *pool.shape[axis + 1 :])
    if block.shape != expected:
        raise ValueError(f"expected a block of shape {expected}, got {block.shape}")
    if block.dtype != pool.dtype:
        raise ValueError(f"expected a block of dtype {pool.dtype}, got {block.dtype}")
    if not isinstance(block_id, int) or not 0 <= block_id < pool.shape[axis]:
        raise ValueError(f"expected a block id in [0, {pool.shape[axis]}), got {block_id}")
    return mx.slice_update(pool, mx.expand_dims(block, axis), mx.array([block_id]), axes=[axis])


@dataclass(frozen=True)
class DecodePath:
    """One way to attend over a pool.

    Attributes
    ----------
    layout : Layout
        The pool layout it reads.
    attend : callable
        (queries, keys, values, batch, scale) -> output, arguments already checked.
    supports : callable
        (device, dtype, head_dim) -> whether it can run.
    """

    layout: Layout
    attend: Callable[[mx.array, mx.array, mx.array, DecodeBatch, float], mx.array]
    supports: Callable[[mx.Device, mx.Dtype, int], bool]


def decode_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    *,
    scale: float,
    path: str = "auto",
) -> mx.array:
    """Attend with one query token a sequence over the blocks that its table names.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, 1, D]; float16, bfloat16 or float32.
    keys, values : mx.array
        K and V pools of one layer in the path's layout, [N, S, Hkv, D] for ``"auto"``; dtype of
        `queries`; Hq is a multiple of Hkv.
    batch : DecodeBatch
        The step's tables, the same for every layer.
    scale : float
        Factor on the scores, usually D ** -0.5.
    path : str
        A key of `DECODE_PATHS`, or ``"auto"`` for what the package chooses.

    Returns
    -------
    mx.array
        Shape [B, Hq, 1, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        If the path is unknown, shapes or dtypes do not fit together, or `scale` is not finite.
    UnsupportedPathError
        If the path cannot run this dtype or head dim on the default device.
    """
    name = _choose() if path == "auto" else path
    if name not in DECODE_PATHS:
        known = ", ".join(["auto", *DECODE_PATHS])
        raise ValueError(f"expected path to be one of {known}, got {path!r}")
    chosen = DECODE_PATHS[name]
    _, _, kv_heads, head_dim = _check_pool("keys", keys, batch, chosen.layout)
    _check_queries(queries, keys, values, kv_heads=kv_heads, head_dim=head_dim)
    _check_scale(scale)
    if queries.shape[0] != batch.context_lens.shape[0]:
        raise ValueError(
            f"expected queries of batch {batch.context_lens.shape[0]}, got {queries.shape[0]}"
        )
    device = mx.default_device()
    if not chosen.supports(device, queries.dtype, head_dim):
        raise UnsupportedPathError(
            f"path {name!r} does not support {queries.dtype} with head dim {head_dim} on {device}"
        )
    return chosen.attend(queries, keys, values, batch, scale)


def _choose() -> str:
    """Return the name of the path behind ``"auto"``."""
    return "gather_block_major"


def _gather(pool: mx.array, batch: DecodeBatch, layout: Layout) -> mx.array:
    rows, blocks = batch.block_tables.shape
    _, block_size, kv_heads, head_dim = layout.dims(pool)
    positions = blocks * block_size
    if layout is Layout.BLOCK_MAJOR:
        taken = mx.take(pool, batch.block_tables, axis=0)
        return taken.reshape(rows, positions, kv_heads, head_dim).transpose(0, 2, 1, 3)
    taken = mx.take(pool, batch.block_tables, axis=1)
    return taken.reshape(kv_heads, rows, positions, head_dim).transpose(1, 0, 2, 3)


def _gather_then_sdpa(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    scale: float,
    layout: Layout,
) -> mx.array:
    keys, values = _gather(keys, batch, layout), _gather(values, batch, layout)
    if batch.mask is not None:
        # A weight of zero does not silence a stale NaN, so positions past the context are zeroed.
        keep = batch.mask.swapaxes(2, 3)
        zero = mx.zeros((), dtype=keys.dtype)
        keys, values = mx.where(keep, keys, zero), mx.where(keep, values, zero)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=batch.mask)


def _gather_block_major(
    queries: mx.array, keys: mx.array, values: mx.array, batch: DecodeBatch, scale: float
) -> mx.array:
    return _gather_then_sdpa(queries, keys, values, batch, scale, Layout.BLOCK_MAJOR)


def _gather_head_major(
    queries: mx.array, keys: mx.array, values: mx.array, batch: DecodeBatch, scale: float
) -> mx.array:
    return _gather_then_sdpa(queries, keys, values, batch, scale, Layout.HEAD_MAJOR)


def _sdpa_supports(device: mx.Device, dtype: mx.Dtype, head_dim: int) -> bool:
    return dtype in DTYPES  # MLX falls back to an unfused graph for any head dim


DECODE_PATHS: Mapping[str, DecodePath] = MappingProxyType(
    {
        "gather_block_major": DecodePath(Layout.BLOCK_MAJOR, _gather_block_major, _sdpa_supports),
        "gather_head_major": DecodePath(Layout.HEAD_MAJOR, _gather_head_major, _sdpa_supports),
    }
)
"""Every decode path by name."""


def _check_rank(name: str, array: mx.array) -> None:
    if array.ndim != 4:
        raise ValueError(f"expected {name} with 4 dimensions, got shape {array.shape}")


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite scale, got {scale}")


def _check_pool(
    name: str, pool: mx.array, batch: DecodeBatch, layout: Layout
) -> tuple[int, int, int, int]:
    """Return (N, S, Hkv, D) of a pool that fits the batch."""
    _check_rank(name, pool)
    dims = layout.dims(pool)
    if dims[:2] != (batch.num_blocks, batch.block_size):
        raise ValueError(
            f"expected {name} in {layout.value} layout with {batch.num_blocks} blocks of "
            f"{batch.block_size} tokens, got shape {pool.shape}"
        )
    return dims


def _check_queries(
    queries: mx.array, keys: mx.array, values: mx.array, *, kv_heads: int, head_dim: int
) -> None:
    if values.shape != keys.shape:
        raise ValueError(f"expected values of shape {keys.shape}, got {values.shape}")
    if queries.ndim != 4 or queries.shape[2] != 1 or queries.shape[3] != head_dim:
        raise ValueError(f"expected queries of shape [B, Hq, 1, {head_dim}], got {queries.shape}")
    if 0 in keys.shape:
        raise ValueError(f"expected keys without empty dimensions, got shape {keys.shape}")
    if queries.shape[1] == 0 or queries.shape[1] % kv_heads:
        raise ValueError(
            f"expected query heads to be a multiple of {kv_heads} KV heads, got {queries.shape[1]}"
        )
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"expected one dtype, got {queries.dtype}, {keys.dtype} and {values.dtype} "
            f"for queries, keys and values"
        )
