"""One decode call of one layer, evaluated by itself, as a microbenchmark would time it.

Absolute times of a noisy machine; `overhead` is what to compare across commits.
"""

import statistics
import time

import mlx.core as mx
import numpy as np

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
    kv_bytes,
    layout_of,
    require_cell,
    require_fast,
    require_gpu,
    require_memory,
    require_path,
    workload,
)


class _Decode:
    version = "1"
    params = GRID
    param_names = PARAM_NAMES
    timeout = 600
    warmup_time = 0.1
    repeat = (3, 50, 2.0)

    def setup(self, *cell):
        if not hasattr(self, "cell"):  # asv sets up before every sample; the inputs stay
            # Contiguous once, pool twice; and SDPA of a strided gather took 10 more on a CPU.
            require_cell(*cell, copies=13)
            self.prepare(*cell)


class Contiguous(_Decode):
    """`contiguous_attention`, MLX's own SDPA: the bound. A change is MLX's or the machine's."""

    def prepare(self, *cell):
        self.cell = workload(*cell, num_layers=1)
        require_fast(self.cell.contiguous)

    def time_decode(self, batch, context, block_size):
        self.cell.contiguous()


class _Path(_Decode):
    def prepare(self, *cell):
        self.cell = workload(*cell, num_layers=1, layout=layout_of(self.path))
        require_path(self.cell, self.path)

    def time_decode(self, batch, context, block_size):
        self.cell.paged(self.path)


class Auto(_Path):
    """`decode_attention(path="auto")`. A change is the package's choice or the path chosen."""

    path = "auto"


class GatherBlockMajor(_Path):
    """`gather_block_major`: take whole blocks of a [N, S, Hkv, D] pool, then SDPA."""

    path = "gather_block_major"


class GatherHeadMajor(_Path):
    """`gather_head_major`: take whole blocks of a [Hkv, N, S, D] pool, then SDPA."""

    path = "gather_head_major"


class GatherRows(_Path):
    """`gather_rows`: take rows of a [N, S, Hkv, D] pool into contiguous K/V, then SDPA."""

    path = "gather_rows"


class GatherRowsGrouped(_Path):
    """`gather_rows_grouped`: the same rows, then grouped matrix products."""

    path = "gather_rows_grouped"


class Fused(_Path):
    """`fused`: kernels that read K and V where they lie; n/a without a GPU."""

    path = "fused"


class _GatherOnly(_Decode):
    def prepare(self, *cell):
        self.gather = feature("gather_blocks")
        self.layout = feature("Layout")(self.layout_name)
        self.cell = workload(*cell, num_layers=1, layout=self.layout_name)
        require_fast(lambda: self.time_gather(*cell))

    def time_gather(self, batch, context, block_size):
        layer, step = self.cell.layers[0], self.cell.batch
        mx.eval(
            self.gather(layer.key_pool, step, layout=self.layout),
            self.gather(layer.value_pool, step, layout=self.layout),
        )


class GatherOnlyBlockMajor(_GatherOnly):
    """`gather_blocks` of K and V together from [N, S, Hkv, D] pools.

    The copy alone: the result is strided, and what SDPA does about that is not in this time.
    """

    layout_name = "block_major"


class GatherOnlyHeadMajor(_GatherOnly):
    """`gather_blocks` of K and V together from [Hkv, N, S, D] pools; otherwise as block-major."""

    layout_name = "head_major"


class Plan:
    """`DecodeBatch.from_tables`: what a step of 64 sequences pays on the host, once for all layers.

    From lists of block ids, as every commit takes them. The goal is under 1 ms.
    """

    version = "1"
    params = [[64], [4096], [32]]
    param_names = PARAM_NAMES
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 100, 2.0)

    def setup(self, batch, context, block_size):
        self.from_tables = feature("DecodeBatch").from_tables
        self.tables, self.num_blocks = block_tables(batch, context, block_size)
        self.lens = [context] * batch

    def plan(self):
        return self.from_tables(
            self.tables, self.lens, block_size=self.params[2][0], num_blocks=self.num_blocks
        )

    def time_plan(self, batch, context, block_size):
        self.plan()


class PlanRows(Plan):
    """The same, and the device's index array that the rows paths share between layers."""

    def setup(self, batch, context, block_size):
        super().setup(batch, context, block_size)
        if not hasattr(feature("DecodeBatch"), "rows"):
            raise NotImplementedError("DecodeBatch has no rows at this commit")

    def time_plan(self, batch, context, block_size):
        mx.eval(self.plan().rows(KV_HEADS))


class Build:
    """Host time of one layer's `decode_attention(path="auto")`: checks and graph, nothing run.

    In a step of 32 layers whose plan is made. The goal for the fused kernels is 6 us. On a CPU
    `auto` is a graph of a dozen operations, which is most of it.
    """

    version = "1"
    params = [[1, 16], [1024], [32]]
    param_names = PARAM_NAMES
    timeout = 600
    warmup_time = 0.1
    unit = "us"
    num_layers = 32

    def setup(self, *cell):
        require_cell(*cell, copies=13)
        if not hasattr(self, "cell"):
            self.cell = workload(*cell, num_layers=1)
            self.cell.paged("auto")
            self.attend = feature("decode_attention")

    def track_build(self, batch, context, block_size):
        cell, samples = self.cell, []
        layer = cell.layers[0]
        for _ in range(100):
            out = cell.queries
            start = time.perf_counter()
            for _ in range(self.num_layers):
                out = self.attend(out, layer.key_pool, layer.value_pool, cell.batch, scale=SCALE)
            samples.append(time.perf_counter() - start)
            del out  # never evaluated
        return statistics.median(samples) / self.num_layers * 1e6


class Mixed:
    """One long and fifteen short sequences over sixteen equal ones with as many tokens in all.

    `path="auto"`, four layers, on a GPU. 1.0 means that no sequence waits for the longest; the
    goal is 1.3.
    """

    version = "1"
    params = [[16], [32768], [32]]
    param_names = ["batch", "longest", "block_size"]
    unit = "x equal lengths"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)
    shortest = 1024

    def setup(self, batch, longest, block_size):
        require_gpu()
        tokens = longest + (batch - 1) * self.shortest
        require_memory(10 * 4 * kv_bytes(1, tokens, block_size))
        blocks = tokens // block_size
        num_blocks = 2 * blocks
        ids = np.random.default_rng(1).permutation(num_blocks)[:blocks]
        equal = tokens // batch // block_size * block_size
        mixed = [longest] + [self.shortest] * (batch - 1)
        self.batches = [
            self.step(ids, lens, block_size, num_blocks) for lens in (mixed, [equal] * batch)
        ]
        mx.random.seed(0)
        shape = (num_blocks, block_size, KV_HEADS, HEAD_DIM)
        self.pools = [mx.random.uniform(-1, 1, shape, dtype=DTYPE) for _ in range(8)]
        self.queries = mx.random.uniform(-4, 4, (batch, QUERY_HEADS, 1, HEAD_DIM), dtype=DTYPE)
        mx.eval(self.pools, self.queries)
        self.attend = feature("decode_attention")

    def step(self, ids, lens, block_size, num_blocks):
        needed = [length // block_size for length in lens]
        ends = np.cumsum(needed)
        tables = [ids[end - n : end].tolist() for end, n in zip(ends, needed, strict=True)]
        return feature("DecodeBatch").from_tables(
            tables, lens, block_size=block_size, num_blocks=num_blocks
        )

    def run(self, step):
        out = self.queries
        for keys, values in zip(self.pools[::2], self.pools[1::2], strict=True):
            out = self.attend(out, keys, values, step, scale=SCALE)
        mx.eval(out)

    def ratio_mixed_vs_equal(self, batch, longest, block_size):
        mixed, equal = self.batches
        return lambda: self.run(mixed), lambda: self.run(equal)


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
