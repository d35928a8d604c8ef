"""What a decode step costs on the host: its plan, and the call of a layer."""

import re
import statistics
import time

import mlx.core as mx
import numpy as np

from .common import KV_HEADS, PARAM_NAMES, SCALE, block_tables, feature, require_cell, workload
from .counted import _Allocated, _Instructions, _Retired


class NumPy:
    """The version of NumPy, 20406 for 2.4.6: it decides `Plan`, `prefix_cache` and `scheduler`.

    A step here explains a step of theirs.
    """

    version = "1"
    params = []
    param_names = []
    unit = "version"
    better = "smaller"  # neither; asv must be told something

    def track_version(self):
        major, minor, patch = (int(x) for x in re.findall(r"\d+", np.__version__)[:3])
        return 10_000 * major + 100 * minor + patch


class _Plan:
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

    work = plan


class Plan(_Plan):
    """`DecodeBatch.from_tables`: what a step of 64 sequences pays on the host, once for all layers.

    From lists of block ids, as every commit takes them. The goal is under 1 ms.
    """

    def time_plan(self, batch, context, block_size):
        self.plan()


class PlanInstructions(_Instructions, _Plan):
    """Bytecode of the same plan."""


class PlanAllocated(_Allocated, _Plan):
    """Bytes of Python's and NumPy's memory that the same plan holds at once."""


class PlanRetired(_Retired, _Plan):
    """Instructions that the processor executes for the same plan."""


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
    better = "smaller"
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
