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
from pagedkv.block_table import DecodeBatch, blocks_needed
from pagedkv.errors import OutOfBlocksError, PagedKVError, UnsupportedPathError

__version__ = "0.1.0"

__all__ = [
    "DECODE_PATHS",
    "BlockPool",
    "DecodeBatch",
    "DecodePath",
    "Layout",
    "OutOfBlocksError",
    "PagedKVError",
    "UnsupportedPathError",
    "__version__",
    "append_block",
    "blocks_needed",
    "contiguous_attention",
    "decode_attention",
    "gather_blocks",
]
