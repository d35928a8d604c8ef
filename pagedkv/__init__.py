"""Paged KV cache for MLX."""

from pagedkv.attention import (
    DECODE_PATHS,
    DecodePath,
    Layout,
    append_block,
    contiguous_attention,
    decode_attention,
    gather_blocks,
)
from pagedkv.block_pool import BlockPool
from pagedkv.block_table import DecodeBatch, SlotMapping, blocks_needed
from pagedkv.errors import OutOfBlocksError, PagedKVError, UnsupportedPathError
from pagedkv.kv_cache import MemoryUsage, PagedKVCache

__version__ = "0.1.0"

__all__ = [
    "DECODE_PATHS",
    "BlockPool",
    "DecodeBatch",
    "DecodePath",
    "Layout",
    "MemoryUsage",
    "OutOfBlocksError",
    "PagedKVCache",
    "PagedKVError",
    "SlotMapping",
    "UnsupportedPathError",
    "__version__",
    "append_block",
    "blocks_needed",
    "contiguous_attention",
    "decode_attention",
    "gather_blocks",
]
