"""Checks of attention's arguments: dtypes, layouts of pools, numbers and shapes."""

from __future__ import annotations

import math
from collections.abc import Hashable
from enum import Enum
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.codes import bits_of

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
"""Dtypes of pools and queries."""

Shape = tuple[int, ...]
New = tuple[mx.array, mx.array]
"""K and V of query tokens, [B, Hkv, Q, D] each."""


class Layout(Enum):
    """Order of a pool's dimensions."""

    BLOCK_MAJOR = "block_major"
    """[N, S, Hkv, D]: a block's tokens of all heads lie together. What the package uses."""

    HEAD_MAJOR = "head_major"
    """[Hkv, N, S, D]: each head has a pool of its own. A measured alternative."""

    def dims(self, pool: Shape) -> tuple[int, int, int, int]:
        """Return (N, S, Hkv, D) of a pool's four dimensions."""
        if self is Layout.BLOCK_MAJOR:
            num_blocks, block_size, kv_heads, head_dim = pool
        else:
            kv_heads, num_blocks, block_size, head_dim = pool
        return num_blocks, block_size, kv_heads, head_dim


class Call(NamedTuple):
    """The kind of a call: calls of one kind share a plan.

    Attributes
    ----------
    device : mx.DeviceType
        Where it runs.
    path : str
        The path asked for.
    scale : float
        Factor on the scores.
    queries, keys, values : tuple of int
        Shapes [B, Hq, Q, D] and, of the pools, [N, S, Hkv, D] or as the path's layout has it.
    dtype, keys_dtype, values_dtype : mx.Dtype
        Of queries, K and V.
    options : tuple
        `ScoreOptions.kind`.
    """

    device: mx.DeviceType
    path: str
    scale: float
    queries: Shape
    keys: Shape
    values: Shape
    dtype: mx.Dtype
    keys_dtype: mx.Dtype
    values_dtype: mx.Dtype
    options: tuple[tuple[str, Hashable], ...] = ()

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of quantized K and V, None where not quantized; ValueError if D does not fit."""
        head_dim = self.queries[3]
        return (
            bits_of(self.keys, self.keys_dtype, head_dim),
            bits_of(self.values, self.values_dtype, head_dim),
        )


@cache
def gpu_name(device: mx.DeviceType) -> str | None:
    """Return what MLX calls the GPU, None for a CPU."""
    if device == mx.cpu:
        return None
    return str(mx.device_info(mx.Device(device)).get("device_name", "unknown GPU"))


def finite(value: float, name: str) -> float:
    """Return a finite number as a float; ValueError for anything else."""
    try:
        if math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"expected a finite {name}, got {value}")


def check_rank(name: str, shape: Shape) -> None:
    """Raise ValueError unless there are four dimensions."""
    if len(shape) != 4:
        raise ValueError(f"expected {name} with 4 dimensions, got shape {shape}")


def check_pool(
    name: str, shape: Shape, batch: DecodeBatch, layout: Layout
) -> tuple[int, int, int, int]:
    """Return (N, S, Hkv, D) of a pool that fits the batch; ValueError if it does not."""
    check_rank(name, shape)
    dims = layout.dims(shape)
    if dims[:2] != (batch.num_blocks, batch.block_size):
        raise ValueError(
            f"expected {name} in {layout.value} layout with {batch.num_blocks} blocks of "
            f"{batch.block_size} tokens, got shape {shape}"
        )
    return dims


def check_one_token(queries: mx.array) -> None:
    """Raise ValueError unless queries have one token a sequence."""
    if queries.ndim != 4 or queries.shape[2] != 1:
        raise ValueError(f"expected queries of shape [B, Hq, 1, D], got {queries.shape}")


def check_heads(call: Call, *, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless queries, K and V have heads and dtypes that fit together."""
    queries, keys = call.queries, call.keys
    dtypes = {call.dtype, call.keys_dtype, call.values_dtype}
    has_codes = mx.uint32 in dtypes
    expected = (*keys[:3], call.values[3]) if has_codes else keys
    if call.values != expected:
        raise ValueError(f"expected values of shape {expected}, got {call.values}")
    if len(queries) != 4 or (queries[3] != head_dim and not has_codes):
        raise ValueError(f"expected queries of shape [B, Hq, Q, {head_dim}], got {queries}")
    if 0 in keys:
        raise ValueError(f"expected keys without empty dimensions, got shape {keys}")
    if queries[1] == 0 or queries[1] % kv_heads:
        raise ValueError(
            f"expected query heads to be a multiple of {kv_heads} KV heads, got {queries[1]}"
        )
    if dtypes - {mx.uint32} != {call.dtype}:
        raise ValueError(
            f"expected one dtype, got {call.dtype}, {call.keys_dtype} and {call.values_dtype} "
            f"for queries, keys and values"
        )
    _ = call.bits
