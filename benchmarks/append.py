"""What a decode step pays to append: one new block for each sequence, K and V, one layer."""

import functools

import mlx.core as mx

from ._workload import (
    DTYPE,
    GRID,
    HEAD_DIM,
    KV_HEADS,
    PARAM_NAMES,
    block_tables,
    feature,
    require_cell,
)


@functools.lru_cache(maxsize=1)
def _template(num_blocks, block_size, batch):
    """Block-major pool and the blocks to append, seeded."""
    mx.random.seed(0)
    block = (block_size, KV_HEADS, HEAD_DIM)
    pool = mx.random.uniform(-1, 1, (num_blocks, *block), dtype=DTYPE)
    new = mx.random.uniform(-1, 1, (batch, *block), dtype=DTYPE)
    mx.eval(pool, new)
    return pool, new


class _Append:
    version = "1"
    params = GRID
    param_names = PARAM_NAMES
    timeout = 600
    # The call changes its state: one call a sample, on pools copied for it in setup.
    number = 1
    warmup_time = 0
    repeat = (3, 20, 2.0)

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


class NaiveBlockMajor(_Append):
    """`append_block` on [N, S, Hkv, D] pools that the caller keeps: MLX copies the pool."""

    layout_name = "block_major"


class NaiveHeadMajor(_Append):
    """`append_block` on [Hkv, N, S, D] pools that the caller keeps: MLX copies the pool."""

    layout_name = "head_major"
