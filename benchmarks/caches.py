"""The caches that a decode step is measured over: the package's at each commit, and mlx-lm's.

`step(queries, new)` builds one step over all layers, for one token of each sequence: `new` holds
its K and V, [B, Hkv, 1, D] each, by layer. What it returns is lazy. `back()` drops all tokens but
those of the context, once every step is computed; it costs next to nothing.
"""

import mlx.core as mx
import numpy as np

import pagedkv

from .common import DTYPE, HEAD_DIM, KV_HEADS, SCALE, feature, padded_context


class ContiguousLayer:
    """K and V of one layer as mlx-lm 0.32 keeps them in its KVCache; a test holds the two together.

    Room grows by 256 tokens at a time, by concatenation, and tokens are assigned to a slice.
    """

    room = 256

    def __init__(self):
        self.keys = self.values = None  # [B, Hkv, capacity, D]
        self.offset = 0

    def update_and_fetch(self, keys, values):
        """Append tokens, [B, Hkv, L, D]; return K and V of all."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.offset > self.keys.shape[2]:
            self.keys = self._grown(self.keys, keys, start)
            self.values = self._grown(self.values, values, start)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.fetch()

    def fetch(self):
        """Return K and V of all tokens."""
        if self.offset == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _grown(self, held, new, start):
        batch, heads, count, dim = new.shape
        more = mx.zeros((batch, heads, -(-count // self.room) * self.room, dim), new.dtype)
        if held is None:
            return more
        if start % self.room:
            held = held[..., :start, :]
        return mx.concatenate([held, more], axis=2)


class Contiguous:
    """What a user of mlx-lm has: a KVCache a layer, and MLX's own SDPA.

    The call that mlx-lm makes, so that no commit of the package changes it.
    """

    def __init__(self, contents):
        self.context = contents[0][0].shape[2]
        self.layers = [ContiguousLayer() for _ in contents]
        for layer, (keys, values) in zip(self.layers, contents, strict=True):
            layer.update_and_fetch(keys, values)
            mx.eval(layer.keys, layer.values)

    def step(self, queries, new):
        for layer, (keys, values) in zip(self.layers, new, strict=True):
            held = layer.update_and_fetch(keys, values)
            queries = mx.fast.scaled_dot_product_attention(queries, *held, scale=SCALE)
        return queries

    def back(self):
        for layer in self.layers:
            layer.offset = self.context


class Bound(Contiguous):
    """The least that a step can cost: attention over as many tokens, all of them written before."""

    def __init__(self, contents, steps):
        super().__init__(contents)
        for new in steps:
            for layer, (keys, values) in zip(self.layers, new, strict=True):
                layer.update_and_fetch(keys, values)
                mx.eval(layer.keys, layer.values)
        self.back()

    def step(self, queries, new):
        for layer in self.layers:
            layer.offset += 1
            queries = mx.fast.scaled_dot_product_attention(queries, *layer.fetch(), scale=SCALE)
        return queries


def _scattered(num_blocks):
    """Return all ids of a pool in a seeded random order."""
    return np.random.default_rng(1).permutation(num_blocks).tolist()


class _Paged:
    """A pool with room for a cell and `steps` more tokens a sequence; its blocks lie scattered.

    `contents` is K and V of the context by layer, [B, Hkv, L, D] each; None leaves it unwritten.
    """

    def __init__(self, cell, num_layers, steps, contents=None):
        self.num_sequences, self.context, self.block_size = cell
        tokens = padded_context(self.context + steps, self.block_size)
        self.sizes = {
            "num_blocks": self.num_sequences * tokens // self.block_size,
            "block_size": self.block_size,
        }
        self.prepare(num_layers)
        self.fill(contents or [])
        mx.eval(self.pools())

    def make_cache(self, num_layers):
        self.attend = feature("decode_attention")
        self.cache = feature("PagedKVCache")(
            num_layers=num_layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=DTYPE, **self.sizes
        )

    def write_and_attend(self, layer, queries, keys, values, slots, batch):
        cache = self.cache
        cache.write(layer, keys, values, slots)
        return self.attend(queries, cache.keys[layer], cache.values[layer], batch, scale=SCALE)

    def pools(self):
        return self.cache.keys, self.cache.values


class Attended(_Paged):
    """`PagedKVCache.extend` and `Step.attend`."""

    def prepare(self, num_layers):
        self.make_cache(num_layers)
        pool = self.cache.pool
        pool.allocate(self.sizes["num_blocks"])
        pool.release(_scattered(self.sizes["num_blocks"]))  # and so they are handed out
        self.tables = [self.cache.new_table() for _ in range(self.num_sequences)]

    def fill(self, contents):
        if not contents:
            for table in self.tables:
                table.append(self.context)
            return
        with self.cache.extend(self.tables, [self.context] * self.num_sequences) as step:
            for layer, (keys, values) in enumerate(contents):
                self.cache.write(layer, keys, values, self.slots_of(step, layer))

    def slots_of(self, step, layer):
        return step.slots

    def step(self, queries, new):
        with self.cache.extend(self.tables, [1] * self.num_sequences) as step:
            for layer, (keys, values) in enumerate(new):
                queries = self.layer(step, layer, queries, keys, values)
        return queries

    def layer(self, step, layer, queries, keys, values):
        return step.attend(layer, queries, keys, values, scale=SCALE)

    def back(self):
        for table in self.tables:
            table.truncate(self.context)


class Extended(Attended):
    """`PagedKVCache.extend`, `write` and `decode_attention`: from phase 3 to `Step.attend`."""

    def layer(self, step, layer, queries, keys, values):
        return self.write_and_attend(layer, queries, keys, values, step.slots, step.batch)


class Written(_Paged):
    """`PagedKVCache.write` and `decode_attention`, phases 1 and 2: tables and slots are ours."""

    def prepare(self, num_layers):
        self.make_cache(num_layers)
        self.take_blocks()

    def take_blocks(self):
        ids = np.reshape(_scattered(self.sizes["num_blocks"]), (self.num_sequences, -1))
        self.tables, self.length = ids.tolist(), self.context
        positions = np.arange(self.context)
        slots = ids[:, positions // self.block_size] * self.block_size
        self.context_slots = (slots + positions % self.block_size).ravel()

    def fill(self, contents):
        for layer, (keys, values) in enumerate(contents):
            slots = feature("SlotMapping").from_slots(self.context_slots, **self.sizes)
            self.cache.write(layer, keys, values, slots)

    def step(self, queries, new):
        column, offset = divmod(self.length, self.block_size)
        slots = self.slots([table[column] for table in self.tables], offset)
        self.length += 1
        batch = feature("DecodeBatch").from_tables(
            self.tables, [self.length] * self.num_sequences, **self.sizes
        )
        for layer, (keys, values) in enumerate(new):
            queries = self.write_and_attend(layer, queries, keys, values, slots, batch)
        return queries

    def slots(self, blocks, offset):
        slots = [block * self.block_size + offset for block in blocks]
        return feature("SlotMapping").from_slots(slots, **self.sizes)

    def back(self):
        self.length = self.context


class Copied(Written):
    """Phase 0: `append_block` of each last block with its new token, and `decode_attention`."""

    def prepare(self, num_layers):
        self.append, self.attend = feature("append_block"), feature("decode_attention")
        shape = (*self.sizes.values(), KV_HEADS, HEAD_DIM)
        self.keys, self.values = ([mx.zeros(shape, DTYPE)] * num_layers for _ in "kv")
        self.take_blocks()

    def fill(self, contents):
        slots = mx.array(self.context_slots)
        for layer, new in enumerate(contents):
            for pools, tokens in zip(self.pools(), new, strict=True):
                rows = pools[layer].reshape(-1, KV_HEADS, HEAD_DIM)
                rows[slots] = tokens.swapaxes(1, 2).reshape(-1, KV_HEADS, HEAD_DIM)
                pools[layer] = rows.reshape(pools[layer].shape)
                mx.eval(pools[layer])

    def slots(self, blocks, offset):
        return blocks, offset

    def write_and_attend(self, layer, queries, keys, values, slots, batch):
        for pools, tokens in ((self.keys, keys), (self.values, values)):
            for row, block_id in enumerate(slots[0]):
                block = pools[layer][block_id]
                block[slots[1]] = tokens[row, :, 0]
                pools[layer] = self.append(pools[layer], block, block_id)
        return self.attend(queries, self.keys[layer], self.values[layer], batch, scale=SCALE)

    def pools(self):
        return self.keys, self.values


def paged(*arguments):
    """Return a cache that takes a step as the package does it at its commit."""
    if not hasattr(pagedkv, "PagedKVCache"):
        return Copied(*arguments)
    if not hasattr(pagedkv.PagedKVCache, "extend"):
        return Written(*arguments)
    return (Attended if hasattr(pagedkv.Step, "attend") else Extended)(*arguments)
