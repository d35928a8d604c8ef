"""A small tree of cached prefixes, and what fills it."""

from pagedkv import BlockPool, RadixTree


def tree(num_blocks=32, block_size=2):
    return RadixTree(BlockPool(num_blocks), block_size)


def cache(radix, tokens, namespace=None):
    """Insert tokens in new blocks that only the tree holds; return the match.

    Blocks for what was cached already are taken too, and are free again afterwards.
    """
    blocks = radix.pool.allocate(len(tokens) // radix.block_size)
    match = radix.insert(tokens, blocks, namespace)
    radix.pool.release(blocks)
    return match
