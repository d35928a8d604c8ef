"""One decode call of one layer, evaluated by itself, as a microbenchmark would time it.

Absolute times of a noisy machine; `overhead` is what to compare across commits.
"""

import mlx.core as mx

from ._workload import (
    GRID,
    KV_HEADS,
    PARAM_NAMES,
    block_tables,
    feature,
    layout_of,
    require_cell,
    require_fast,
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


class BlockOrder:
    """Does it matter how blocks are scattered: a seeded random permutation over reversed order.

    Both through `decode_attention(path="auto")` at one cell, two layers. 1.0 means that the
    reversed tables of every other benchmark stand for any scatter.
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
