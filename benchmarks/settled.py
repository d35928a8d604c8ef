"""Experiments that settled a decision (docs/adr) and say nothing about the package.

The quick grid leaves this module out. Ask again when MLX or a machine may answer otherwise.
"""

from inspect import signature

import mlx.core as mx
import numpy as np

from .append import _Pipelined
from .common import (
    DTYPE,
    HEAD_DIM,
    KV_HEADS,
    PARAM_NAMES,
    SCALE,
    feature,
    random,
    require_cell,
    require_gpu,
    require_memory,
    workload,
)


class Slabs:
    """Gather K and V from pools grown by slabs over the same gather from one pool.

    The blocks lie in 4 slabs, a tensor each. MLX has no gather over several tensors, so each slab
    is asked for every block and the right answer chosen. Why `PagedKVCache` allocates once.
    """

    version = "1"
    params = [[1, 4], [4096], [32]]
    param_names = PARAM_NAMES
    unit = "x one pool"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)
    slabs = 4

    def setup(self, *cell):
        require_cell(*cell, copies=30)
        self.cell = workload(*cell, num_layers=1)
        layer = self.cell.layers[0]
        self.pools = layer.key_pool, layer.value_pool
        self.split = [mx.split(pool, self.slabs) for pool in self.pools]
        mx.eval(self.split)
        whole = mx.take(layer.key_pool, self.cell.batch.block_tables, axis=0)
        if not mx.array_equal(self.gather(self.split[0]), whole).item():
            raise AssertionError("the gather from slabs differs from the gather from one pool")

    def gather(self, slabs):
        ids = self.cell.batch.block_tables
        size = slabs[0].shape[0]
        out = mx.take(slabs[0], mx.minimum(ids, size - 1), axis=0)
        for number, slab in enumerate(slabs[1:], start=1):
            here = mx.clip(ids - number * size, 0, size - 1)
            mine = (ids // size == number)[:, :, None, None, None]
            out = mx.where(mine, mx.take(slab, here, axis=0), out)
        return out

    def ratio_vs_one_pool(self, batch, context, block_size):
        ids = self.cell.batch.block_tables
        return (
            lambda: mx.eval([self.gather(slabs) for slabs in self.split]),
            lambda: mx.eval([mx.take(pool, ids, axis=0) for pool in self.pools]),
        )


class BlockSize:
    """Does the block size matter: blocks of 16 and of 64 tokens over blocks of 32.

    Through `decode_attention(path="auto")`, four layers, on a GPU.
    """

    version = "1"
    params = [[4], [4096, 32768], [16, 64]]
    param_names = PARAM_NAMES
    unit = "x blocks of 32"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)

    def setup(self, batch, context, block_size):
        require_gpu()
        require_cell(batch, context, 32, copies=2 * 3 * 4 + 10)
        self.cells = [workload(batch, context, size, num_layers=4) for size in (block_size, 32)]

    def ratio_vs_32(self, batch, context, block_size):
        this, other = self.cells
        return lambda: this.paged("auto"), lambda: other.paged("auto")


class BlockOrder:
    """Does it matter how blocks are scattered: a seeded random permutation over reversed order.

    Both through `decode_attention(path="auto")`, two layers. 1.0 means that the reversed tables of
    every other benchmark stand for any scatter.
    """

    version = "1"
    params = [[1], [4096], [32]]
    param_names = PARAM_NAMES
    unit = "x"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)

    def setup(self, *cell):
        require_cell(*cell, copies=2 * 3 * 2 + 10)
        self.cells = [
            workload(*cell, num_layers=2, order=order) for order in ("random", "reversed")
        ]

    def ratio_random_vs_reversed(self, batch, context, block_size):
        random, in_reverse = self.cells
        return lambda: random.paged("auto"), lambda: in_reverse.paged("auto")


class PipelinedCopy(_Pipelined):
    """The same scatter without waiting: MLX copies a pool that the step in flight reads."""

    def make_pools(self, num_blocks, block_size):
        shape = num_blocks, block_size, KV_HEADS, HEAD_DIM
        self.pools = [[random(*shape) for _ in self.layers] for _ in "kv"]

    def read(self, layer, queries):
        keys, values = (pools[layer] for pools in self.pools)
        return self.attend(queries, keys, values, self.batch, scale=SCALE)

    def write(self, layer):
        tokens = self.token.swapaxes(1, 2).reshape(-1, KV_HEADS, HEAD_DIM)
        for pools in self.pools:
            flat = pools[layer].reshape(-1, KV_HEADS, HEAD_DIM)
            flat[self.slots.slots] = tokens
            pools[layer] = flat.reshape(pools[layer].shape)


class GrowByConcatenation:
    """Peak memory while a pool grows by a quarter through `mx.concatenate`, over the pool's size.

    Why `PagedKVCache` allocates its pools once: old and new pool are both alive.
    """

    version = "1"
    params = [[64, 256]]
    param_names = ["pool_MiB"]
    unit = "x pool"
    better = "smaller"

    def setup(self, pool_mib):
        require_memory(3 * pool_mib * 2**20)

    def track_peak(self, pool_mib):
        mx.random.seed(0)
        num_blocks = pool_mib * 2**20 // (32 * KV_HEADS * HEAD_DIM * DTYPE.size)
        shape = (num_blocks, 32, KV_HEADS, HEAD_DIM)
        pool = mx.random.uniform(-1, 1, shape, dtype=DTYPE)
        slab = mx.zeros((num_blocks // 4, *shape[1:]), DTYPE)
        mx.eval(pool, slab)
        size = pool.nbytes
        mx.synchronize()
        mx.reset_peak_memory()
        pool = mx.concatenate([pool, slab])
        del slab
        mx.eval(pool)
        return mx.get_peak_memory() / size


class _Watermark:
    """What a trace costs by the blocks that an admission leaves to those that run; -1: the default.

    300 requests that share nothing, prompts and outputs of half to all of so many tokens, up to 32
    sequences at a time, blocks of 32.
    """

    version = "1"
    params = [[200, 800], [40, 400], [60, 120, 240], [-1, 0, 4, 8]]
    param_names = ["prompt", "new", "blocks", "watermark"]
    timeout = 600
    better = "smaller"

    def setup(self, prompt, new, blocks, watermark):
        scheduler = feature("Scheduler")
        if watermark == -1 and signature(scheduler).parameters["watermark"].default is not None:
            raise NotImplementedError("Scheduler has no default of its own at this commit")

    def run(self, prompt, new, blocks, watermark):
        """Return (tokens computed, steps) of the trace."""
        options = {} if watermark == -1 else {"watermark": watermark}
        pool = feature("BlockPool")(blocks)
        scheduler = feature("Scheduler")(pool, 32, max_tokens=2048, max_running=32, **options)
        rng = np.random.default_rng(0)
        for number in range(300):
            tokens = rng.integers(0, 32000, rng.integers(prompt // 2, prompt + 1))
            scheduler.add(number, tokens, int(rng.integers(new // 2, new + 1)))
        computed = steps = 0
        while (schedule := scheduler.schedule()).request_ids:
            computed += len(schedule.tokens)
            steps += 1
            scheduler.update(dict.fromkeys(schedule.samples, 1))
        return computed, steps


class WatermarkTokens(_Watermark):
    """Tokens computed in a trace by the blocks that an admission leaves to those that run.

    A preempted sequence is computed again. Why the default is a block for every two that run.
    """

    unit = "tokens"

    def track_tokens(self, *trace):
        return self.run(*trace)[0]


class WatermarkSteps(_Watermark):
    """Steps of the same trace: what is left free, nobody computes in."""

    unit = "steps"

    def track_steps(self, *trace):
        return self.run(*trace)[1]
