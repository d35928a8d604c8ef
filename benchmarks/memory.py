"""What the cache takes in memory, counted; and how fast this machine's memory is."""

import statistics
import time

import mlx.core as mx
import numpy as np

from .common import DTYPE, HEAD_DIM, KV_HEADS, feature, require_memory

TOKENS = 4090  # not a multiple of any block size


def _cache(block_size, tokens):
    """Return a cache of one layer with room for `tokens` tokens."""
    num_blocks = -(-tokens // block_size)
    require_memory(4 * num_blocks * block_size * KV_HEADS * HEAD_DIM * DTYPE.size)
    cache = feature("PagedKVCache")(
        num_layers=1,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
    )
    if not hasattr(cache, "extend"):
        raise NotImplementedError("PagedKVCache has no extend at this commit")
    return cache


def _extend(cache, table, keys):
    with cache.extend([table], [keys.shape[2]]) as step:
        cache.write(0, keys, keys, step.slots)
        mx.eval(cache.keys, cache.values)


def _tokens(count):
    keys = mx.random.uniform(-1, 1, (1, KV_HEADS, count, HEAD_DIM), dtype=DTYPE)
    mx.eval(keys)
    return keys


class Bandwidth:
    """Bytes that MLX reads and writes a second in an elementwise operation on 256 MiB.

    What memory allows on this machine: `kv_bytes` of a cell over its `decode` time is a share of
    it. A change is MLX's or the machine's.
    """

    version = "1"
    params = [[256]]
    param_names = ["MiB"]
    unit = "GB/s"
    better = "larger"
    passes = 8

    def setup(self, mib):
        require_memory(3 * mib * 2**20)
        mx.random.seed(0)
        self.data = mx.random.normal((mib * 2**18,))
        mx.eval(self.data)

    def one_pass(self):
        """Return the seconds of one pass over the data, in place, in a graph of several."""
        data, self.data = self.data, None
        start = time.perf_counter()
        for _ in range(self.passes):
            data = mx.negative(data)
        mx.eval(data)
        self.data = data
        return (time.perf_counter() - start) / self.passes

    def track_bandwidth(self, mib):
        self.one_pass()
        seconds = statistics.median(self.one_pass() for _ in range(9))
        return 2 * self.data.nbytes / seconds / 1e9


class _ByBlockSize:
    version = "1"
    params = [[8, 16, 32, 64, 128]]
    param_names = ["block_size"]


class Fragmentation(_ByBlockSize):
    """Slots without a token, in percent of the slots held by 64 sequences of 1 to 4096 tokens."""

    unit = "%"
    better = "smaller"

    def track_unused(self, block_size):
        blocks_needed = feature("blocks_needed")
        lens = np.random.default_rng(0).integers(1, 4097, 64).tolist()
        slots = sum(blocks_needed(length, block_size) for length in lens) * block_size
        return 100 * (slots - sum(lens)) / slots


class PrefillPeak(_ByBlockSize):
    """Peak bytes while a prompt is written in one piece, over the bytes of pools and prompt.

    1.0 means that nothing is copied on the way.
    """

    unit = "x pools and prompt"
    better = "smaller"

    def setup(self, block_size):
        self.cache = _cache(block_size, 2 * TOKENS)
        mx.random.seed(0)
        self.keys = _tokens(TOKENS)

    def track_peak(self, block_size):
        mx.synchronize()
        mx.reset_peak_memory()
        _extend(self.cache, self.cache.new_table(), self.keys)
        pools = self.cache.memory_usage().allocated_bytes
        return mx.get_peak_memory() / (pools + self.keys.nbytes)


class Forks(_ByBlockSize):
    """Bytes live in 8 forks of a prompt that have each gone on by a token, over 8 copies' bytes."""

    unit = "x copies"
    better = "smaller"

    def setup(self, block_size):
        self.cache = _cache(block_size, TOKENS + 9 * block_size)
        mx.random.seed(0)
        self.prompt = self.cache.new_table()
        _extend(self.cache, self.prompt, _tokens(TOKENS))

    def track_live(self, block_size):
        forks = [self.prompt.fork() for _ in range(8)]
        self.prompt.truncate(0)
        for fork in forks:
            _extend(self.cache, fork, _tokens(1))
        usage = self.cache.memory_usage()
        copies = 8 * feature("blocks_needed")(TOKENS + 1, block_size) * usage.block_bytes
        return usage.live_bytes / copies


class SharedPrefix(_ByBlockSize):
    """Bytes live in 8 sequences of one cached prompt and a token of their own, over 8 copies'."""

    unit = "x copies"
    better = "smaller"

    def setup(self, block_size):
        self.tree = feature("RadixTree")
        self.cache = _cache(block_size, TOKENS + 9 * block_size)

    def track_live(self, block_size):
        cache, tree = self.cache, self.tree(self.cache.pool, block_size)
        mx.random.seed(0)
        prompt, first = list(range(TOKENS)), cache.new_table()
        _extend(cache, first, _tokens(TOKENS))
        tree.insert(prompt, first.block_ids)
        first.truncate(0)
        for _ in range(8):
            table, match = cache.new_table(), tree.match_prefix(prompt)
            table.adopt(match.blocks, len(match.blocks) * block_size)
            _extend(cache, table, _tokens(TOKENS + 1 - table.num_tokens))
        usage = cache.memory_usage()
        copies = 8 * feature("blocks_needed")(TOKENS + 1, block_size) * usage.block_bytes
        return usage.live_bytes / copies
