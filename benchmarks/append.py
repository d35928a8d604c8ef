"""What a decode step pays to append to its pools."""

import functools

import mlx.core as mx
import numpy as np

import pagedkv

from .common import (
    DTYPE,
    GRID,
    HEAD_DIM,
    KV_HEADS,
    PARAM_NAMES,
    QUERY_HEADS,
    SCALE,
    block_tables,
    feature,
    on_gpu,
    random,
    require_cell,
    require_memory,
)


class _Append:
    """One new block for each sequence, K and V, one layer."""

    version = "1"
    params = GRID
    param_names = PARAM_NAMES
    timeout = 600
    # The call changes its state: one call a sample, on pools copied for it in setup.
    number = 1
    warmup_time = 0
    repeat = (3, 20, 2.0)


@functools.lru_cache(maxsize=1)
def _template(num_blocks, block_size, batch):
    """Block-major pool and the blocks to append, seeded."""
    mx.random.seed(0)
    block = (block_size, KV_HEADS, HEAD_DIM)
    return random(num_blocks, *block), random(batch, *block)


class _Naive(_Append):
    def setup(self, batch, context, block_size):
        # Template, two pools, two results.
        require_cell(batch, context, block_size, copies=6)
        self.append = feature("append_block")
        self.layout = feature("Layout")(self.layout_name)
        tables, num_blocks = block_tables(batch, context, block_size)
        self.block_ids = [table[-1] for table in tables]
        pool, new = _template(num_blocks, block_size, batch)
        if self.layout_name == "head_major":
            pool, new = pool.transpose(2, 0, 1, 3), new.swapaxes(1, 2)
        self.blocks = [mx.contiguous(block) for block in new]
        # `+ 0` because mx.contiguous may hand back the template itself.
        self.pools = [mx.contiguous(pool) + 0 for _ in "kv"]
        mx.eval(self.blocks, self.pools)

    def time_append(self, batch, context, block_size):
        updated = []
        for pool in self.pools:
            for block, block_id in zip(self.blocks, self.block_ids, strict=True):
                pool = self.append(pool, block, block_id, layout=self.layout)
            updated.append(pool)
        mx.eval(updated)


class NaiveBlockMajor(_Naive):
    """`append_block` on [N, S, Hkv, D] pools that the caller keeps: MLX copies the pool."""

    layout_name = "block_major"


class NaiveHeadMajor(_Naive):
    """`append_block` on [Hkv, N, S, D] pools that the caller keeps: MLX copies the pool."""

    layout_name = "head_major"


class _CopiedPools:
    """K and V pools of one layer before the package stored any itself."""

    def __init__(self, num_blocks, block_size):
        self.append_block = feature("append_block")
        self.pools = [random(num_blocks, block_size, KV_HEADS, HEAD_DIM) for _ in "kv"]

    def append(self, blocks, block_ids):
        updated = []
        for pool in self.pools:
            for block, block_id in zip(blocks.swapaxes(1, 2), block_ids, strict=True):
                pool = self.append_block(pool, block, block_id)
            updated.append(pool)
        mx.eval(updated)


class _CachePools:
    """K and V pools of one layer in a PagedKVCache."""

    def __init__(self, num_blocks, block_size):
        self.sizes = {"num_blocks": num_blocks, "block_size": block_size}
        self.cache = feature("PagedKVCache")(
            num_layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=DTYPE, **self.sizes
        )
        self.mapping = feature("SlotMapping")

    def append(self, blocks, block_ids):
        size = self.sizes["block_size"]
        slots = [block * size + offset for block in block_ids for offset in range(size)]
        mapping = self.mapping.from_slots(slots, **self.sizes)
        self.cache.write(0, blocks, blocks, mapping)
        mx.eval(self.cache.keys, self.cache.values)


def _pools(num_blocks, block_size):
    """Return pools that are appended to as the package does it at its commit."""
    kind = _CachePools if hasattr(pagedkv, "PagedKVCache") else _CopiedPools
    return kind(num_blocks, block_size)


class Auto(_Append):
    """The package's own append: `append_block` at phase 0, `PagedKVCache.write` from phase 1.

    A fall means that appending costs less; from phase 1 on a rise with the context would mean that
    MLX copies the pool again.
    """

    repeat = (5, 50, 2.0)

    def setup(self, batch, context, block_size):
        if hasattr(self, "pools"):
            return
        require_cell(batch, context, block_size, copies=6)
        tables, num_blocks = block_tables(batch, context, block_size)
        self.block_ids = [table[-1] for table in tables]
        self.pools = _pools(num_blocks, block_size)
        self.blocks = random(batch, KV_HEADS, block_size, HEAD_DIM)
        self.pools.append(self.blocks, self.block_ids)

    def time_append(self, batch, context, block_size):
        self.pools.append(self.blocks, self.block_ids)


class PoolSize(Auto):
    """The package's own append of one block of 32 tokens, by the size of one layer's K and V.

    Flat from phase 1 on: what is written costs, not where.
    """

    params = [[64, 256, 1024]]
    param_names = ["pool_MiB"]

    def setup(self, pool_mib):
        if hasattr(self, "pools"):
            return
        require_memory(3 * pool_mib * 2**20)
        block_size = 32
        block_bytes = 2 * block_size * KV_HEADS * HEAD_DIM * DTYPE.size
        self.pools = _pools(pool_mib * 2**20 // block_bytes, block_size)
        self.blocks = random(1, KV_HEADS, block_size, HEAD_DIM)
        self.time_append(pool_mib)

    def time_append(self, pool_mib):
        self.pools.append(self.blocks, [1])


class _Pipelined:
    """Decode steps one ahead of each other (`mx.async_eval`), that append over ones that do not."""

    version = "1"
    params = [[1], [1024], [32]]
    param_names = PARAM_NAMES
    unit = "x without append"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)
    steps = 4
    num_blocks = 4096  # 128 MiB for K and for V of each layer at block size 32

    def setup(self, batch, context, block_size):
        num_layers = 32 if on_gpu() else 2
        pool_bytes = self.num_blocks * block_size * KV_HEADS * HEAD_DIM * DTYPE.size
        require_memory((2 * num_layers + 6) * pool_bytes)
        self.attend = feature("decode_attention")
        sizes = {"num_blocks": self.num_blocks, "block_size": block_size}
        mx.random.seed(0)
        self.layers = range(num_layers)
        self.make_pools(**sizes)
        tables, _ = block_tables(batch, context, block_size)
        self.batch = feature("DecodeBatch").from_tables(tables, [context] * batch, **sizes)
        last = [table[-1] * block_size for table in tables]
        self.slots = feature("SlotMapping").from_slots(last, **sizes)
        self.queries = random(batch, QUERY_HEADS, 1, HEAD_DIM)
        self.token = random(batch, KV_HEADS, 1, HEAD_DIM)

    def decode(self, write):
        for _ in range(self.steps):
            out = self.queries
            for layer in self.layers:
                write(layer)
                out = self.read(layer, out)
            mx.async_eval(out)
        mx.synchronize()

    def ratio_append_vs_none(self, batch, context, block_size):
        return lambda: self.decode(self.write), lambda: self.decode(lambda layer: None)


class PipelinedWrite(_Pipelined):
    """`PagedKVCache.write`; until phase 7 it waits once a step for the step in flight.

    What it takes above 1.0 is the most that a way to write without waiting could gain.
    """

    def make_pools(self, num_blocks, block_size):
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        self.cache = feature("PagedKVCache")(
            num_layers=len(self.layers),
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=DTYPE,
            **sizes,
        )
        num_slots = num_blocks * block_size
        slots = feature("SlotMapping").from_slots(np.arange(num_slots), **sizes)
        for layer in self.layers:
            new = [random(1, KV_HEADS, num_slots, HEAD_DIM) for _ in "kv"]
            self.cache.write(layer, *new, slots)
            mx.eval(self.cache.keys, self.cache.values)

    def read(self, layer, queries):
        if hasattr(self.cache, "attend"):
            return self.cache.attend(layer, queries, self.batch, scale=SCALE)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return self.attend(queries, keys, values, self.batch, scale=SCALE)

    def write(self, layer):
        self.cache.write(layer, self.token, self.token, self.slots)
