"""What is measured: geometry, seeded inputs, scattered block tables, and which cells are n/a.

A cell is (batch, context, block_size). Names of pagedkv are looked up when a benchmark is set up,
so that a commit that lacks one shows n/a.
"""

import os
import sys
import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

import pagedkv

from .kinds import NotApplicableError

BATCHES = [1, 4]
CONTEXTS = [1024, 4096, 16384, 32768]
BLOCK_SIZES = [16, 32, 64]
GRID = [BATCHES, CONTEXTS, BLOCK_SIZES]
PARAM_NAMES = ["batch", "context", "block_size"]

# The short grid: `asv --bench` asks for these cells alone, and the numbers of the others stay.
SHORT_CONTEXTS = [1024, 4096]
SHORT_BLOCK_SIZES = [32]

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = mx.float16
SCALE = HEAD_DIM**-0.5

LONGEST_CALL = 5.0  # seconds
MEMORY_SHARE = 0.7  # of the machine's memory


def padded_context(context, block_size):
    """Tokens that the blocks of `context` tokens have room for."""
    return -(-context // block_size) * block_size


def kv_bytes(batch, context, block_size):
    """Bytes of K and V that one layer of the cell attends over."""
    tokens = batch * padded_context(context, block_size)
    return 2 * tokens * KV_HEADS * HEAD_DIM * DTYPE.size


def on_gpu():
    """Whether MLX's default device is a GPU."""
    return mx.default_device().type == mx.gpu


def random(*shape, limit=1):
    """Return seeded numbers between -`limit` and `limit`, evaluated."""
    array = mx.random.uniform(-limit, limit, shape, dtype=DTYPE)
    mx.eval(array)
    return array


def layers(batch, context, block_size):
    """Layers in a measured decode step, fixed for a cell and a kind of device.

    Enough that caches are cold: paged and contiguous steps take turns, so at least 128 MiB pass
    between two reads of the same K/V. On a GPU enough, too, that launching and awaiting a step,
    which is part of both times, does not pull the ratio towards 1: on an H100, batch 4 at 4096
    tokens read 3.2 with 2 layers, 6.0 with 8, 7.3 with 16 and 7.9 with 32.
    """
    fewest, most, step_bytes = (8, 32, 2**31) if on_gpu() else (2, 16, 2**26)
    return max(fewest, min(most, step_bytes // kv_bytes(batch, context, block_size)))


def settle():
    """Wait for everything in flight, on MLX's default stream and on the one mlx-lm generates on."""
    mx.synchronize()
    if (module := sys.modules.get("mlx_lm.generate")) is not None:
        mx.synchronize(module.generation_stream)


def host_share(call, between, times=3):
    """Return how much of the time of a call its thread computed, and did not wait.

    `between` runs after each call, in neither time.
    """
    computed = passed = 0.0
    for measured in (False, *[True] * times):
        before = time.thread_time(), time.perf_counter()
        call()
        after = time.thread_time(), time.perf_counter()
        if measured:
            computed += after[0] - before[0]
            passed += after[1] - before[1]
        between()
    return computed / passed


def series_of_host_share(self, *cell):
    """Return how much of the package's time is the host's, of the thread that calls.

    A class with a ratio has it as `track_host_share`, and a method `ours` that returns the
    package's side. Near 1 the processor bounds what is measured, and the ratio moves with the
    processor's speed.
    """
    return host_share(self.ours(), getattr(self, "between", settle))


series_of_host_share.unit = "of wall time"
series_of_host_share.better = "smaller"


def require_gpu():
    """Raise NotImplementedError (n/a) on a CPU, where the answer says nothing new."""
    if not on_gpu():
        raise NotImplementedError("measured on a GPU")


def feature(name):
    """Return a public name of pagedkv; n/a on commits that lack it."""
    if not hasattr(pagedkv, name):
        raise NotImplementedError(f"pagedkv has no {name} at this commit")
    return getattr(pagedkv, name)


def decode_path(name):
    """Return the DecodePath called `name`; n/a on commits and devices that lack it."""
    paths = feature("DECODE_PATHS")
    if name not in paths:
        raise NotImplementedError(f"pagedkv has no decode path {name} at this commit")
    device = mx.default_device()
    if not paths[name].supports(device, DTYPE, HEAD_DIM):
        raise NotImplementedError(f"decode path {name} does not run on {device}")
    return paths[name]


def require_cell(batch, context, block_size, *, copies):
    """Raise NotImplementedError (n/a) for a cell that does not fit in memory.

    `copies` is the peak of K/V held at once, in units of `kv_bytes` of the cell.
    """
    require_memory(copies * kv_bytes(batch, context, block_size))


def require_memory(need):
    """Raise NotImplementedError (n/a) if `need` bytes are too much for this machine."""
    have = machine_memory()
    if need > MEMORY_SHARE * have:
        raise NotApplicableError(
            f"needs {need / 2**30:.1f} GiB, more than {MEMORY_SHARE:.0%} of {have / 2**30:.1f} GiB",
            "too large",
        )


def machine_memory():
    """Bytes of memory that MLX's default device can use."""
    if on_gpu():
        info = mx.device_info()
        return info.get("memory_size") or info["total_memory"]  # Metal's name, CUDA's name
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_fast(call):
    """Run `call`; n/a if it takes longer than a benchmark should wait, whenever it is tried.

    The first time it may compile kernels, and any time the machine may stall.
    """
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds <= LONGEST_CALL:
            return
    raise NotApplicableError(
        f"one call takes {seconds:.1f} s on this machine, more than {LONGEST_CALL:.0f} s",
        "too slow",
    )


def block_tables(batch, context, block_size, order="reversed"):
    """Return (tables, number of blocks in the pool): scattered blocks of a pool with 2x slack.

    ``"reversed"`` hands out every second block from the end of the pool; ``"random"`` is a seeded
    permutation of the whole pool.
    """
    per_sequence = padded_context(context, block_size) // block_size
    used = batch * per_sequence
    if order == "reversed":
        ids = np.arange(2 * used)[::-2]
    else:
        ids = np.random.default_rng(1).permutation(2 * used)[:used]
    return ids.reshape(batch, per_sequence).tolist(), 2 * used


@dataclass
class Layer:
    """One layer's K/V, contiguous [B, Hkv, L, D] and as pools; evaluated."""

    keys: mx.array
    values: mx.array
    key_pool: mx.array
    value_pool: mx.array


@dataclass
class Workload:
    """A cell's inputs: queries [B, Hq, 1, D], the step's tables, and its layers."""

    queries: mx.array
    batch: object
    layers: list

    def contiguous(self):
        """Evaluate one decode step over contiguous K/V."""
        attend = feature("contiguous_attention")
        out = self.queries
        for layer in self.layers:
            out = attend(out, layer.keys, layer.values, scale=SCALE)
        mx.eval(out)
        return out

    def paged(self, path):
        """Evaluate one decode step over the pools."""
        attend = feature("decode_attention")
        out = self.queries
        for layer in self.layers:
            out = attend(out, layer.key_pool, layer.value_pool, self.batch, scale=SCALE, path=path)
        mx.eval(out)
        return out


def workload(batch, context, block_size, *, num_layers, layout="block_major", order="reversed"):
    """Build a cell's inputs from a fixed seed.

    The contiguous copy is read from the pool slot by slot, not by the package's own gather, so
    that a wrong gather cannot agree with it.
    """
    tables, num_blocks = block_tables(batch, context, block_size, order)
    padded = padded_context(context, block_size)
    step = feature("DecodeBatch").from_tables(
        tables, [padded] * batch, block_size=block_size, num_blocks=num_blocks
    )
    positions = np.arange(padded)
    table_array = np.array(tables)
    slots = table_array[:, positions // block_size] * block_size + positions % block_size

    mx.random.seed(0)
    shape = (num_blocks, block_size, KV_HEADS, HEAD_DIM)
    seeded = [mx.random.uniform(-1, 1, shape, dtype=DTYPE) for _ in ("keys", "values")]

    def pool_and_contiguous(blocks):
        rows = blocks.reshape(-1, KV_HEADS, HEAD_DIM)[mx.array(slots)]
        pool = blocks if layout == "block_major" else blocks.transpose(2, 0, 1, 3)
        return mx.contiguous(pool), mx.contiguous(rows.transpose(0, 2, 1, 3))

    made = []
    for layer in range(num_layers):
        # Each layer holds the seeded blocks in another order, in memory of its own.
        key_pool, keys = pool_and_contiguous(mx.roll(seeded[0], layer + 1, axis=0))
        value_pool, values = pool_and_contiguous(mx.roll(seeded[1], layer + 1, axis=0))
        mx.eval(key_pool, keys, value_pool, values)
        made.append(Layer(keys, values, key_pool, value_pool))
    queries = mx.random.uniform(-4, 4, (batch, QUERY_HEADS, 1, HEAD_DIM), dtype=DTYPE)
    mx.eval(queries)
    return Workload(queries, step, made)


def paths_run(call):
    """Run `call` and return the names of the decode paths whose code it entered."""
    entered = set()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = feature("DECODE_PATHS").items()
    return [name for name, path in paths if getattr(path.attend, "__code__", None) in entered]


def auto_path(cell):
    """Return the path that the package chooses for a cell; an error if the environment does.

    None on commits that say nothing of their choice.
    """
    if not hasattr(pagedkv, "explain"):
        return None
    layer = cell.layers[0]
    pools = layer.key_pool, layer.value_pool
    said = pagedkv.explain(cell.queries, *pools, cell.batch, scale=SCALE)
    if "PAGEDKV_DECODE_PATH" in said.because:
        raise AssertionError(f"expected the package's choice, got {said.because}")
    return said.path


def require_path(cell, path):
    """Check one layer over `path`: n/a if slow, an error if another path ran or it is wrong."""
    one = Workload(cell.queries, cell.batch, cell.layers[:1])
    require_fast(lambda: one.paged(path))
    outputs = []
    ran = paths_run(lambda: outputs.append(one.paged(path)))
    expected = auto_path(one) if path == "auto" else path
    if len(ran) != 1 or expected not in (None, ran[0]):
        raise AssertionError(f"asked for path {path}, expected {expected or 'one'}, ran {ran}")
    expected = one.contiguous().astype(mx.float32)
    error = outputs[0].astype(mx.float32) - expected
    relative = (mx.linalg.norm(error) / mx.linalg.norm(expected)).item()
    if not relative < 0.02:
        raise AssertionError(f"path {path} is off from contiguous attention by {relative:.1%}")


def layout_of(path):
    """Return the name of the pool layout that `path` reads."""
    return "block_major" if path == "auto" else decode_path(path).layout.value
