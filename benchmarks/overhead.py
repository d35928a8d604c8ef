"""Attention alone, of K and V that are in their place: the part of a step that paths differ in."""

from .common import (
    GRID,
    PARAM_NAMES,
    layers,
    layout_of,
    require_cell,
    require_gpu,
    require_path,
    workload,
)


class _Overhead:
    version = "1"
    params = GRID
    param_names = PARAM_NAMES
    unit = "x contiguous"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)

    def setup(self, *cell):
        num_layers = layers(*cell)
        # A layer: contiguous once, pool twice. SDPA of a strided gather took 10 more on a CPU.
        require_cell(*cell, copies=3 * num_layers + 10)
        self.cell = workload(*cell, num_layers=num_layers, layout=layout_of(self.path))
        require_path(self.cell, self.path)

    def ratio_vs_contiguous(self, batch, context, block_size):
        return lambda: self.cell.paged(self.path), self.cell.contiguous


class Auto(_Overhead):
    """`decode_attention(path="auto")`, the path users get, over `contiguous_attention`.

    The attention of several layers, each with its own pool, evaluated once. 1.0 means that paging
    costs nothing; a fall means the package got faster relative to MLX's own SDPA.
    """

    path = "auto"


class GatherBlockMajor(_Overhead):
    """The path `gather_block_major` over `contiguous_attention`.

    Takes whole blocks of a [N, S, Hkv, D] pool and hands SDPA a strided view. A change means that
    MLX's take, its copy of strided K/V, or its SDPA changed.
    """

    path = "gather_block_major"


class GatherHeadMajor(_Overhead):
    """The path `gather_head_major` over `contiguous_attention`.

    Takes whole blocks of a [Hkv, N, S, D] pool along its second axis. A change means that MLX's
    take on that axis, its copy of strided K/V, or its SDPA changed.
    """

    path = "gather_head_major"


class GatherRows(_Overhead):
    """The path `gather_rows` over `contiguous_attention`.

    Takes rows of a [N, S, Hkv, D] pool so that the copy is contiguous, then SDPA. A change means
    that MLX's take of rows or its SDPA changed.
    """

    path = "gather_rows"


class GatherRowsGrouped(_Overhead):
    """The path `gather_rows_grouped` over `contiguous_attention`.

    The same rows, then one matrix product for all query heads of a KV head. Below 1.0 where SDPA is
    an unfused graph (CPU). A change means that take, matmul or softmax changed.
    """

    path = "gather_rows_grouped"


class Fused(_Overhead):
    """The path `fused` over `contiguous_attention`.

    A kernel that reads K and V where they lie; n/a without a GPU. A change means that the kernel,
    how a step is cut up for it, or MLX's SDPA changed.
    """

    path = "fused"


class Batch16(_Overhead):
    """`path="auto"` at 16 sequences, on a GPU: on a CPU it says what 4 sequences say."""

    path = "auto"
    params = [[16], *GRID[1:]]

    def setup(self, *cell):
        require_gpu()
        super().setup(*cell)
