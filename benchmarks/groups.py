"""Models that mix layers which see everything with layers that see a window, in groups.

Shapes of Gemma 3 27B (five layers with a window of 1024 tokens to one without) and gpt-oss 20B (one
with a window of 128 to one without).
"""

from dataclasses import dataclass
from inspect import signature

import mlx.core as mx
import numpy as np

from .caches import Attended
from .common import (
    DTYPE,
    HEAD_DIM,
    KV_HEADS,
    PARAM_NAMES,
    SCALE,
    feature,
    layers,
    require_cell,
    require_fast,
)
from .step import Generation, num_steps

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Shape:
    """A model's layers: their number, which of them see everything, and K and V of a token."""

    num_layers: int
    every: int  # the last of so many sees everything
    window: int
    kv_heads: int
    head_dim: int

    @property
    def windows(self):
        """The window of each layer, None where it sees everything."""
        return [
            None if layer % self.every == self.every - 1 else self.window
            for layer in range(self.num_layers)
        ]

    @property
    def layer_bytes(self):
        """Bytes of K and V of a token in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPE.size


MODELS = {
    "gemma3-27b": Shape(62, 6, 1024, 16, 128),
    "gpt-oss-20b": Shape(24, 2, 128, 8, 64),
}


def require_groups():
    """Raise NotImplementedError (n/a) at a commit whose layers are not in groups."""
    if "windows" not in signature(feature("BlockPool")).parameters:
        feature("FramePool")


def _blocks(shape, budget, windows):
    """Return the pool of a budget of bytes, and the bytes that it takes."""
    groups = feature("Groups").of(windows)
    frame_bytes = groups.num_slabs * BLOCK_SIZE * shape.layer_bytes
    count = budget // frame_bytes
    if len(groups.windows) == 1:
        return feature("BlockPool")(count), count * frame_bytes
    if "windows" in signature(feature("BlockPool")).parameters:
        return feature("BlockPool")(count, groups.windows), count * frame_bytes
    return feature("FramePool")(count, groups.windows, BLOCK_SIZE), count * frame_bytes


def _paged_tokens(shape, context, windows):
    """Return the tokens in a GiB when sequences of `context` tokens have filled a budget."""
    pool, taken = _blocks(shape, 2**40, windows)
    held, chunk = [], 512
    while True:
        table = feature("BlockTable")(pool, BLOCK_SIZE)
        try:
            for start in range(0, context, chunk):
                table.append(min(chunk, context - start))
        except feature("OutOfBlocksError"):
            return len(held) * context / (taken / 2**30)
        held.append(table)


def _mlx_lm_tokens(shape, context):
    """Return the same of mlx-lm's own caches: what one layer of a kind takes, counted, by layer."""
    try:
        from mlx_lm.models.cache import KVCache, RotatingKVCache
    except ImportError as error:
        raise NotImplementedError(f"no mlx-lm here: {error}") from None
    held = 0
    for window in {*shape.windows}:
        cache = KVCache() if window is None else RotatingKVCache(window)
        for start in range(0, context, 2048):  # as mlx-lm computes a prompt
            tokens = mx.zeros((1, 1, min(2048, context - start), 1), DTYPE)
            cache.update_and_fetch(tokens, tokens)
        cache.update_and_fetch(tokens[:, :, :1], tokens[:, :, :1])  # which drops what is not seen
        mx.eval(cache.keys)
        tokens_held = cache.keys.shape[2]
        held += shape.windows.count(window) * tokens_held * shape.layer_bytes
    return context / (held / 2**30)


class Capacity:
    """Tokens in a GiB, of sequences of so many: by groups, in one table, in mlx-lm's caches.

    Counted on the host, as sequences fill a budget of 1 TiB after their prompts. What layers with a
    window have given back is what the first has over the second.
    """

    version = "1"
    params = [list(MODELS), [8192, 32768, 131072], ["groups", "one table", "mlx-lm"]]
    param_names = ["model", "context", "storage"]
    unit = "tokens"
    better = "larger"
    timeout = 600

    def track_tokens(self, model, context, storage):
        shape = MODELS[model]
        require_groups()
        if storage == "mlx-lm":
            return _mlx_lm_tokens(shape, context)
        windows = shape.windows if storage == "groups" else [None] * shape.num_layers
        return _paged_tokens(shape, context, windows)


class HitRate:
    """Share of prompt tokens that were cached in a trace of chats: by groups, and in one table.

    Chats with one of 8 system prompts of 1024 tokens go on turn by turn, in 2 GiB of a model of
    gpt-oss 20B's shape. A hit of groups needs all of the layers that see everything, and the last
    window of the others.
    """

    version = "1"
    params = [["groups", "one table"]]
    param_names = ["storage"]
    unit = "share"
    better = "larger"
    timeout = 600

    def track_hit_rate(self, storage):
        shape = MODELS["gpt-oss-20b"]
        require_groups()
        windows = shape.windows if storage == "groups" else [None] * shape.num_layers
        pool, _ = _blocks(shape, 2**31, windows)
        scheduler = feature("Scheduler")(pool, BLOCK_SIZE, max_tokens=2048, max_running=32)
        rng = np.random.default_rng(0)
        systems = rng.integers(0, 200_000, (8, 1024))
        chats = [systems[rng.integers(8)] for _ in range(96)]
        for turn in range(4):
            for number in rng.permutation(len(chats)).tolist():
                said = rng.integers(0, 200_000, rng.integers(32, 512))
                chats[number] = np.concatenate([chats[number], said])
                scheduler.add((turn, number), chats[number], 64)
            while (schedule := scheduler.schedule()).request_ids:
                tokens = {i: int(rng.integers(0, 200_000)) for i in schedule.samples}
                for (_, number), token in tokens.items():
                    chats[number] = np.append(chats[number], token)
                scheduler.update(tokens)
        return scheduler.stats().hit_rate


class _Mixed(Attended):
    """Layers with a window of 1024, every sixth without; in groups, or one table for all."""

    grouped = True

    def make_cache(self, num_layers):
        self.scores = [
            feature("ScoreOptions")(window=window)
            for window in Shape(num_layers, 6, 1024, KV_HEADS, HEAD_DIM).windows
        ]
        windows = [scores.window for scores in self.scores] if self.grouped else None
        self.cache = feature("PagedKVCache")(
            num_layers=num_layers,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=DTYPE,
            windows=windows,
            margin=num_steps(),  # `back` takes so many tokens back
            **self.sizes,
        )

    def slots_of(self, step, layer):
        return step.slots_of(layer)

    def layer(self, step, layer, queries, keys, values):
        scores = self.scores[layer]
        return step.attend(layer, queries, keys, values, scale=SCALE, scores=scores)


class _OneTable(_Mixed):
    grouped = False


class Step:
    """Pipelined steps of layers in groups, over the same where every layer sees everything.

    Five layers with a window of 1024 tokens to one without, over one table for all and no window.
    Above 1.0 a model pays for its groups more than it saves.
    """

    version = "1"
    params = [[1, 4], [4096, 16384, 32768], [32]]
    param_names = PARAM_NAMES
    unit = "x full"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)

    def setup(self, *cell):
        require_groups()
        num_layers, steps = max(6, layers(*cell) // 6 * 6), num_steps()
        require_cell(*cell, copies=4 * num_layers + 10)
        generation = self.generation = Generation(*cell[:2], num_layers, steps)
        self.mixed = _Mixed(cell, num_layers, steps, generation.contents)
        require_fast(lambda: mx.eval(self.mixed.step(generation.queries[0], generation.new[0])))
        self.mixed.back()
        other = _OneTable(cell, num_layers, steps, generation.contents)
        for out, right in zip(generation.run(self.mixed), generation.run(other), strict=True):
            error = out.astype(mx.float32) - right.astype(mx.float32)
            if not mx.linalg.norm(error) < 0.02 * mx.linalg.norm(right.astype(mx.float32)):
                raise AssertionError("groups are off from one table for all layers")
        del other
        self.full = Attended(cell, num_layers, steps, generation.contents)
        generation.contents.clear()

    def ratio_step_vs_full(self, batch, context, block_size):
        run = self.generation.run
        return lambda: run(self.mixed), lambda: run(self.full)
