"""What it costs to write a prompt of 4096 tokens into blocks, K and V, one layer."""

import mlx.core as mx

from .common import DTYPE, HEAD_DIM, KV_HEADS, feature, require_memory

TOKENS = 4096
BLOCK_SIZE = 32


class Write:
    """`PagedKVCache.extend` and `write`, by chunk; of a shared prefix only the rest is written.

    4096 tokens over the time is the throughput. The prefix is a fork of another prompt that ends
    inside a block, so that one block is copied. Chunks are evaluated one by one, as a model would.
    """

    version = "1"
    params = [[512, 4096], [0, 2040]]
    param_names = ["chunk", "shared"]
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 50, 2.0)

    def setup(self, chunk, shared):
        if hasattr(self, "cache"):
            return
        feature("BlockTable")
        num_blocks = 4 * TOKENS // BLOCK_SIZE
        require_memory(8 * num_blocks * BLOCK_SIZE * KV_HEADS * HEAD_DIM * DTYPE.size)
        cache = feature("PagedKVCache")(
            num_layers=1,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=DTYPE,
        )
        if not hasattr(cache, "extend"):
            raise NotImplementedError("PagedKVCache has no extend at this commit")
        mx.random.seed(0)
        shape = (1, KV_HEADS, TOKENS, HEAD_DIM)
        self.keys, self.values = (mx.random.uniform(-1, 1, shape, dtype=DTYPE) for _ in "kv")
        mx.eval(self.keys, self.values)
        self.cache = cache
        self.prompt = cache.new_table()
        self.write(self.prompt, TOKENS)
        self.time_write(chunk, shared)

    def write(self, table, chunk):
        while table.num_tokens < TOKENS:
            start = table.num_tokens
            count = min(chunk, TOKENS - start)
            with self.cache.extend([table], [count]) as step:
                new = slice(start, start + count)
                keys, values = self.keys[:, :, new], self.values[:, :, new]
                self.cache.write(0, keys, values, step.slots)
                mx.eval(self.cache.keys, self.cache.values)

    def time_write(self, chunk, shared):
        table = self.prompt.fork()
        table.truncate(shared)
        self.write(table, chunk)
        table.truncate(0)
