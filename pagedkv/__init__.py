"""Paged KV cache for MLX."""

from pagedkv.block_table import DecodeBatch, blocks_needed

__version__ = "0.1.0"

__all__ = ["DecodeBatch", "__version__", "blocks_needed"]
