"""Decode attention over a paged K/V pool, and the contiguous attention it is measured against.

Shapes: B batch, Hq query heads, Hkv KV heads, D head dim, N blocks in the pool, S block size,
M blocks of the longest table, L context length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx

from pagedkv.errors import UnsupportedPathError
from pagedkv.gather import Layout, check_pool, check_rank, take_blocks, take_rows
from pagedkv.kv_cache import DTYPES
from pagedkv.step import DecodeBatch


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
    check_rank("keys", keys)
    _check_one_token(queries)
    _check_queries(queries, keys, values, kv_heads=keys.shape[1], head_dim=keys.shape[3])
    _check_scale(scale)
    if keys.shape[0] != queries.shape[0]:
        raise ValueError(f"expected K/V of batch {queries.shape[0]}, got {keys.shape[0]}")
    if queries.dtype not in DTYPES:
        raise ValueError(f"expected float16, bfloat16 or float32, got {queries.dtype}")
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)


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
    causal : bool
        Whether it takes several query tokens a sequence, each seeing those before it.
    """

    layout: Layout
    attend: Callable[[mx.array, mx.array, mx.array, DecodeBatch, float], mx.array]
    supports: Callable[[mx.Device, mx.Dtype, int], bool]
    causal: bool = False


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
    _check_one_token(queries)
    return _attend(queries, keys, values, batch, scale, path)


def paged_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    *,
    scale: float,
    path: str = "auto",
) -> mx.array:
    """Attend with the last Q tokens of each sequence, causally: a prefill chunk, a verification.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, Q, D]; query i is the token at position context length - Q + i and sees the
        positions up to its own. K and V of all Q tokens are in the pools.
    keys, values, batch, scale, path
        As for `decode_attention`, which is the same for Q = 1.

    Returns
    -------
    mx.array
        Shape [B, Hq, Q, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        As `decode_attention`, and if a context is shorter than Q.
    UnsupportedPathError
        If the path cannot run this dtype, head dim or Q on the default device.
    """
    return _attend(queries, keys, values, batch, scale, path)


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    scale: float,
    path: str,
) -> mx.array:
    """Check everything, choose, attend."""
    if path != "auto" and path not in DECODE_PATHS:
        known = ", ".join(["auto", *DECODE_PATHS])
        raise ValueError(f"expected path to be one of {known}, got {path!r}")
    device = mx.default_device()
    tokens = batch.block_tables.shape[0] * batch.longest
    name = _choose(device, tokens, queries.shape[2]) if path == "auto" else path
    chosen = DECODE_PATHS[name]
    _, _, kv_heads, head_dim = check_pool("keys", keys, batch, chosen.layout)
    _check_queries(queries, keys, values, kv_heads=kv_heads, head_dim=head_dim)
    _check_scale(scale)
    if queries.shape[0] != batch.context_lens.shape[0]:
        raise ValueError(
            f"expected queries of batch {batch.context_lens.shape[0]}, got {queries.shape[0]}"
        )
    query_len = queries.shape[2]
    if not 1 <= query_len <= batch.shortest:
        raise ValueError(
            f"expected 1 to {batch.shortest} query tokens, the shortest context, got {query_len}"
        )
    if not chosen.supports(device, queries.dtype, head_dim):
        raise UnsupportedPathError(
            f"path {name!r} does not support {queries.dtype} with head dim {head_dim} on {device}"
        )
    if query_len > 1 and not chosen.causal:
        raise UnsupportedPathError(f"path {name!r} takes one query token, got {query_len}")
    return chosen.attend(queries, keys, values, batch, scale)


def _gather_then_sdpa(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    scale: float,
    layout: Layout,
) -> mx.array:
    keys, values = take_blocks(keys, batch, layout), take_blocks(values, batch, layout)
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


def _gather_rows(
    queries: mx.array, keys: mx.array, values: mx.array, batch: DecodeBatch, scale: float
) -> mx.array:
    return mx.fast.scaled_dot_product_attention(
        queries,
        take_rows(keys, batch),
        take_rows(values, batch),
        scale=scale,
        mask=batch.causal_mask(queries.shape[2]),
    )


def _gather_rows_grouped(
    queries: mx.array, keys: mx.array, values: mx.array, batch: DecodeBatch, scale: float
) -> mx.array:
    """All query heads of a KV head in one matrix product; K and V are read once for them."""
    rows, heads, query_len, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = (queries * scale).reshape(rows, kv_heads, -1, head_dim)  # [B, Hkv, G * Q, D]
    scores = grouped @ take_rows(keys, batch).swapaxes(2, 3)
    mask = batch.causal_mask(query_len)
    if mask is not None:
        by_query = scores.reshape(rows, kv_heads, -1, query_len, scores.shape[-1])
        masked = mx.where(mask[:, :, None], by_query, mx.array(-mx.inf, scores.dtype))
        scores = masked.reshape(scores.shape)
    out = mx.softmax(scores, axis=-1, precise=True) @ take_rows(values, batch)
    return out.reshape(rows, heads, query_len, head_dim)


def _sdpa_supports(device: mx.Device, dtype: mx.Dtype, head_dim: int) -> bool:
    return dtype in DTYPES  # MLX falls back to an unfused graph for any head dim


DECODE_PATHS: Mapping[str, DecodePath] = MappingProxyType(
    {
        "gather_block_major": DecodePath(Layout.BLOCK_MAJOR, _gather_block_major, _sdpa_supports),
        "gather_head_major": DecodePath(Layout.HEAD_MAJOR, _gather_head_major, _sdpa_supports),
        "gather_rows": DecodePath(Layout.BLOCK_MAJOR, _gather_rows, _sdpa_supports, causal=True),
        "gather_rows_grouped": DecodePath(
            Layout.BLOCK_MAJOR, _gather_rows_grouped, _sdpa_supports, causal=True
        ),
    }
)
"""Every decode path by name."""


# What "auto" is: by kind of device, up to so many tokens in the batch, which path. The order of the
# paths was the same for every dtype measured.
_AUTO: Mapping[str, tuple[tuple[float, str], ...]] = MappingProxyType(
    {
        # MLX's SDPA is an unfused graph here. Times over contiguous SDPA, 128 to 4096 tokens, batch
        # 1 and 4 (linux-2core-xeon, MLX 0.32.4), rows and grouped: float16 1.06-1.18 and 0.52-0.64,
        # bfloat16 1.15-1.33 and 0.81-0.96, float32 1.3-1.9 and 1.4-1.8. Block-major: 1.9 to 12.
        "cpu": ((math.inf, "gather_rows_grouped"),),
        # H100, float16, MLX 0.32.4, microseconds a layer, block-major and rows: 47 and 59 at one
        # sequence of 1024 tokens, 121 and 116 at 4096, 787 and 660 at 32768; 3484 and 2585 at four.
        "cuda": ((1024, "gather_block_major"), (math.inf, "gather_rows")),
        # Not measured. SDPA copies strided K/V, so the gather that it can read is the better guess.
        "metal": ((math.inf, "gather_rows"),),
    }
)


def _choose(device: mx.Device, tokens: int, query_len: int) -> str:
    """Return the name of the path behind ``"auto"``."""
    gpu = "metal" if mx.metal.is_available() else "cuda"
    table = _AUTO["cpu" if device.type == mx.cpu else gpu]
    return next(
        name
        for limit, name in table
        if tokens <= limit and (query_len == 1 or DECODE_PATHS[name].causal)
    )


def _check_one_token(queries: mx.array) -> None:
    if queries.ndim != 4 or queries.shape[2] != 1:
        raise ValueError(f"expected queries of shape [B, Hq, 1, D], got {queries.shape}")


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite scale, got {scale}")


def _check_queries(
    queries: mx.array, keys: mx.array, values: mx.array, *, kv_heads: int, head_dim: int
) -> None:
    if values.shape != keys.shape:
        raise ValueError(f"expected values of shape {keys.shape}, got {values.shape}")
    if queries.ndim != 4 or queries.shape[3] != head_dim:
        raise ValueError(f"expected queries of shape [B, Hq, Q, {head_dim}], got {queries.shape}")
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
