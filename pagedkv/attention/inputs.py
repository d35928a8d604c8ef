"""What attention takes: dtypes, layouts of pools, shapes."""

from __future__ import annotations

from enum import Enum

import mlx.core as mx

from pagedkv.attention.batch import DecodeBatch

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
"""What pools and queries may hold."""


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


def check_rank(name: str, array: mx.array) -> None:
    """Raise ValueError unless an array has four dimensions."""
    if array.ndim != 4:
        raise ValueError(f"expected {name} with 4 dimensions, got shape {array.shape}")


def check_pool(
    name: str, pool: mx.array, batch: DecodeBatch, layout: Layout
) -> tuple[int, int, int, int]:
    """Return (N, S, Hkv, D) of a pool that fits the batch; ValueError if it does not."""
    check_rank(name, pool)
    dims = layout.dims(pool)
    if dims[:2] != (batch.num_blocks, batch.block_size):
        raise ValueError(
            f"expected {name} in {layout.value} layout with {batch.num_blocks} blocks of "
            f"{batch.block_size} tokens, got shape {pool.shape}"
        )
    return dims
