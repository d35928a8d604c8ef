"""Paged KV cache for MLX."""

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.calls import (
    contiguous_attention,
    decode_attention,
    explain,
    paged_attention,
)
from pagedkv.attention.gather import append_block, gather_blocks, gather_rows
from pagedkv.attention.inputs import Layout
from pagedkv.attention.paths import DECODE_PATHS
from pagedkv.attention.scores import ScoreOptions
from pagedkv.cache.groups import Groups
from pagedkv.cache.kv_cache import PagedKVCache
from pagedkv.cache.slots import SlotMapping
from pagedkv.cache.step import Step
from pagedkv.errors import (
    OutOfBlocksError,
    PagedKVError,
    SharedBlockError,
    UnsupportedPathError,
)
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable, blocks_needed
from pagedkv.host.prefix_cache import RadixTree
from pagedkv.host.scheduler import Scheduler
from pagedkv.host.stats import Stats, render_prometheus

__version__ = "0.1.0"

__all__ = [
    "DECODE_PATHS",
    "BlockPool",
    "BlockTable",
    "DecodeBatch",
    "Groups",
    "Layout",
    "OutOfBlocksError",
    "PagedKVCache",
    "PagedKVError",
    "RadixTree",
    "Scheduler",
    "ScoreOptions",
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
]
