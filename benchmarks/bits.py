"""K and V in few bits: what steps, writes and a GiB gain by it, and how exact it is."""

from inspect import signature

import mlx.core as mx
import numpy as np

from .caches import Attended
from .common import (
    DTYPE,
    HEAD_DIM,
    KV_HEADS,
    QUERY_HEADS,
    SCALE,
    feature,
    layers,
    random,
    require_cell,
    require_fast,
    require_gpu,
    require_memory,
)
from .step import Generation, num_steps

FORMATS = {"8": 8, "8 and 4": (8, 4), "4": 4, "16": None}
"""What the benchmarks call the bits of K and V, or of K and of V."""
CODES = [name for name, bits in FORMATS.items() if bits]
BLOCK_SIZE = 32


def cache_of(bits, **sizes):
    """Return a cache of the suite's heads in some bits; n/a where there are none."""
    cache = feature("PagedKVCache")
    if "bits" not in signature(cache).parameters:
        raise NotImplementedError("PagedKVCache has no bits at this commit")
    sizes |= {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": DTYPE, "bits": FORMATS[bits]}
    return cache(**sizes)


class _Coded(Attended):
    """As `Attended`, in so many bits."""

    def __init__(self, bits, *args):
        self.bits = bits
        super().__init__(*args)

    def make_cache(self, num_layers):
        self.cache = cache_of(self.bits, num_layers=num_layers, **self.sizes)


class Step:
    """Pipelined steps over K and V in few bits, over the same over float16; both write theirs.

    Below 1.0 a token comes sooner. 16 sequences are measured on a GPU: on a CPU, where each step
    makes numbers of all codes, they say what 4 sequences say.
    """

    version = "1"
    params = [CODES, [1, 4, 16], [4096, 16384, 32768], [BLOCK_SIZE]]
    param_names = ["bits", "batch", "context", "block_size"]
    unit = "x float16"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)

    def setup(self, bits, *cell):
        if cell[0] == 16:
            require_gpu()
        num_layers, steps = layers(*cell), num_steps()
        require_cell(*cell, copies=3 * num_layers + 10)
        generation = self.generation = Generation(*cell[:2], num_layers, steps)
        self.coded = _Coded(bits, cell, num_layers, steps, generation.contents)
        require_fast(lambda: mx.eval(self.coded.step(generation.queries[0], generation.new[0])))
        self.coded.back()
        self.plain = _Coded("16", cell, num_layers, steps, generation.contents)
        generation.contents.clear()
        run = generation.run
        for out, right in zip(run(self.coded), run(self.plain), strict=True):
            out, right = out.astype(mx.float32), right.astype(mx.float32)
            if not mx.linalg.norm(out - right) < 0.5 * mx.linalg.norm(right):
                raise AssertionError("a step over codes is off from one over float16")

    def ratio_step_vs_float16(self, *cell):
        run = self.generation.run
        return lambda: run(self.coded), lambda: run(self.plain)


class Write:
    """`PagedKVCache.write` of a chunk of a prompt into 4 layers in few bits, over float16."""

    version = "1"
    params = [CODES, [512, 2048]]
    param_names = ["bits", "tokens"]
    unit = "x float16"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 50, 2.0)
    num_layers = 4

    def setup(self, bits, tokens):
        mx.random.seed(0)
        self.new = [random(1, KV_HEADS, tokens, HEAD_DIM) for _ in "kv"]
        sizes = {"num_blocks": 2 * tokens // BLOCK_SIZE, "block_size": BLOCK_SIZE}
        slots = np.random.default_rng(1).permutation(2 * tokens)[:tokens]
        self.slots = feature("SlotMapping").from_slots(slots, **sizes)
        self.caches = [cache_of(each, num_layers=self.num_layers, **sizes) for each in (bits, "16")]

    def write(self, cache):
        for layer in range(self.num_layers):
            cache.write(layer, *self.new, self.slots)
        cache.wait()

    def ratio_write_vs_float16(self, bits, tokens):
        coded, plain = self.caches
        return lambda: self.write(coded), lambda: self.write(plain)


class Error:
    """How far attention is from that over K and V as they were, in float64: norms, one query.

    K and V are normal numbers, and queries such that a few tokens weigh most, as they do in models.
    """

    version = "1"
    params = [list(FORMATS), [1024, 16384]]
    param_names = ["bits", "context"]
    unit = "relative"
    better = "smaller"
    timeout = 600

    def track_error(self, bits, context):
        mx.random.seed(0)
        cache = cache_of(bits, num_layers=1, num_blocks=context // 32, block_size=BLOCK_SIZE)
        table = cache.new_table()
        keys, values = (mx.random.normal((1, KV_HEADS, context, HEAD_DIM), DTYPE) for _ in "kv")
        queries = 2 * mx.random.normal((1, QUERY_HEADS, 1, HEAD_DIM), DTYPE)
        with cache.extend([table], [context]) as step:
            cache.write(0, keys, values, step.slots)
        out = cache.attend(0, queries, cache.batch([table]), scale=SCALE)
        got, exact, k, v = (
            np.array(x.astype(mx.float32), np.float64) for x in (out, queries, keys, values)
        )
        scores = exact.reshape(KV_HEADS, -1, HEAD_DIM) @ k[0].swapaxes(1, 2) * SCALE
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        right = (weights / weights.sum(axis=-1, keepdims=True) @ v[0]).reshape(got.shape)
        return float(np.linalg.norm(got - right) / np.linalg.norm(right))


class Capacity:
    """Tokens in a GiB of a model of Llama 3 8B's shape, 32 layers, by what the pools take."""

    version = "1"
    params = [list(FORMATS)]
    param_names = ["bits"]
    unit = "tokens"
    better = "larger"

    def track_tokens(self, bits):
        require_memory(2**28)
        usage = cache_of(bits, num_layers=32, num_blocks=8, block_size=BLOCK_SIZE).memory_usage()
        return 2**30 / usage.block_bytes * BLOCK_SIZE
