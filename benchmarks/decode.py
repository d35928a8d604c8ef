"""One decode call of one layer, evaluated by itself, as a microbenchmark would time it.

Absolute times of a noisy machine; `overhead` is what to compare across commits.
"""

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
