"""Paged KV cache for MLX."""

from pagedkv.attention import (
    Explanation,
    contiguous_attention,
    decode_attention,
    explain,
    paged_attention,
)
from pagedkv.block_pool import BlockPool
from pagedkv.block_table import BlockTable, Reservation, blocks_needed, reserve
from pagedkv.errors import (
    OutOfBlocksError,
    PagedKVError,
    SharedBlockError,
    UnsupportedPathError,
)
from pagedkv.gather import Layout, append_block, gather_blocks, gather_rows
from pagedkv.kv_cache import MemoryUsage, PagedKVCache
from pagedkv.paths import DECODE_PATHS, DecodePath
from pagedkv.prefix_cache import PrefixMatch, RadixNode, RadixTree
from pagedkv.scheduler import ScheduledStep, Scheduler
from pagedkv.stats import Stats, render_prometheus
from pagedkv.step import DecodeBatch, SlotMapping, Step

__version__ = "0.1.0"

__all__ = [
    "DECODE_PATHS",
    "BlockPool",
    "BlockTable",
    "DecodeBatch",
    "DecodePath",
    "Explanation",
    "Layout",
    "MemoryUsage",
    "OutOfBlocksError",
    "PagedKVCache",
    "PagedKVError",
    "PrefixMatch",
    "RadixNode",
    "RadixTree",
    "Reservation",
    "ScheduledStep",
    "Scheduler",
    "SharedBlockError",
    "SlotMapping",
    "Stats",
    "Step",
    "UnsupportedPathError",
    "__version__",
    "append_block",
    "blocks_needed",
    "contiguous_attention",
    "decode_attention",
    "explain",
    "gather_blocks",
    "gather_rows",
    "paged_attention",
    "render_prometheus",
    "reserve",
]
