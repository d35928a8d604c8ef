"""Whole decode steps, as users have them: blocks, a plan, K and V written, attention by layer.

The queries of a step follow from the output of the one before, as a sampled token does, and one
step is in flight while the next is built, as in mlx-lm's `generate_step`.
"""

import mlx.core as mx

from .caches import Bound as BoundCache
from .caches import Contiguous, paged
from .common import (
    BATCHES,
    CONTEXTS,
    DTYPE,
    HEAD_DIM,
    KV_HEADS,
    PARAM_NAMES,
    QUERY_HEADS,
    layers,
    on_gpu,
    require_cell,
    require_fast,
    require_gpu,
)


def num_steps():
    """Return the steps of a sample.

    On a GPU as many as fill a block, so that each sequence takes one, as in the mean. On a CPU a
    step is long, and the host has nothing to run ahead of.
    """
    return 32 if on_gpu() else 4


def _random(*shape, limit=1):
    array = mx.random.uniform(-limit, limit, shape, dtype=DTYPE)
    mx.eval(array)
    return array


class Generation:
    """Seeded inputs: what the context holds, and the queries and the new K and V of each step.

    Attributes
    ----------
    contents : list of (mx.array, mx.array)
        K and V of the context by layer, [B, Hkv, L, D].
    queries : list of mx.array
        By step, [B, Hq, 1, D].
    new : list of list of (mx.array, mx.array)
        K and V by step and layer, [B, Hkv, 1, D].
    """

    def __init__(self, batch, context, num_layers, steps):
        mx.random.seed(0)
        token = (batch, KV_HEADS, 1, HEAD_DIM)
        seeded = [_random(batch, KV_HEADS, context, HEAD_DIM) for _ in "kv"]
        # Each layer holds the seeded tokens in another order, in memory of its own.
        self.contents = [
            tuple(mx.roll(x, layer + 1, axis=2) for x in seeded) for layer in range(num_layers)
        ]
        self.queries = [_random(batch, QUERY_HEADS, 1, HEAD_DIM, limit=4) for _ in range(steps)]
        self.new = [
            [(_random(*token), _random(*token)) for _ in range(num_layers)] for _ in range(steps)
        ]

    def run(self, cache, *, ahead=True):
        """Generate over `cache`, go back to its context, and return the output of each step.

        With `ahead` one step is in flight while the next is built; without, none is.
        """
        outputs = []
        for queries, new in zip(self.queries, self.new, strict=True):
            if outputs:
                queries = queries + outputs[-1]
            outputs.append(cache.step(queries, new))
            mx.async_eval(outputs[-1])
            mx.eval(outputs[-2:-1] if ahead else outputs[-1])
        mx.eval(outputs)
        cache.back()
        return outputs


class Probe(Generation):
    """One layer, with queries that find single tokens: a wrong or missing one changes an output.

    The query heads of a KV head ask for the step's own token, the one before, the first of the
    generation and the first of the context.
    """

    def __init__(self, batch, context, steps):
        super().__init__(batch, context, 1, steps)
        keys = [keys for [(keys, _)] in self.new]
        first = self.contents[0][0][:, :, :1]
        for step, own in enumerate(keys):
            wanted = mx.concatenate([own, keys[max(step - 1, 0)], keys[0], first], axis=2)
            self.queries[step] = 8 * wanted.reshape(batch, QUERY_HEADS, 1, HEAD_DIM)

    def run_one(self, cache):
        mx.eval(cache.step(self.queries[0], self.new[0]))
        cache.back()


def require_step(batch, context, block_size):
    """Check the package's step on one layer: n/a if it is slow, an error if it is wrong."""
    steps = num_steps()
    probe = Probe(batch, context, steps)
    cache = paged((batch, context, block_size), 1, steps, probe.contents)
    require_fast(lambda: probe.run_one(cache))
    expected = probe.run(Contiguous(probe.contents))
    for step, (out, right) in enumerate(zip(probe.run(cache), expected, strict=True)):
        out, right = out.astype(mx.float32), right.astype(mx.float32)
        relative = (mx.linalg.norm(out - right) / mx.linalg.norm(right)).item()
        if not relative < 0.02:
            raise AssertionError(f"step {step} is off from contiguous attention by {relative:.1%}")


class _Step:
    version = "1"
    params = [BATCHES, CONTEXTS, [32]]
    param_names = PARAM_NAMES
    unit = "x contiguous"
    timeout = 600
    warmup_time = 0.1
    repeat = (5, 25, 4.0)
    ahead = True

    def setup(self, *cell):
        num_layers, steps = layers(*cell), num_steps()
        # A layer: contiguous, as much again where MLX copies it under way, pool. Gathers take more.
        require_cell(*cell, copies=3 * num_layers + 10)
        require_step(*cell)
        self.generation = Generation(*cell[:2], num_layers, steps)
        contents = self.generation.contents
        self.paged = paged(cell, num_layers, steps, contents)
        self.contiguous = self.make_contiguous()
        contents.clear()

    def make_contiguous(self):
        return Contiguous(self.generation.contents)

    def pair(self):
        # The contiguous cache grows in the first call, the warm-up, and then has room: users pay
        # for that once in 256 steps.
        run = self.generation.run
        return (
            lambda: run(self.paged, ahead=self.ahead),
            lambda: run(self.contiguous, ahead=self.ahead),
        )


class Auto(_Step):
    """Pipelined steps through the package, over the same through a cache like mlx-lm's.

    Each step is planned anew and writes new K and V into every layer. At phase 0 `append_block`
    writes, then `PagedKVCache.write`, then `Step.attend`. 1.0 means that a user of the package and
    one of mlx-lm wait equally long for a token, the rest of the model aside.
    """

    def ratio_step_vs_contiguous(self, batch, context, block_size):
        return self.pair()


class Batch16(Auto):
    """`Auto` at 16 sequences, on a GPU: on a CPU it says what 4 sequences say."""

    params = [[16], *_Step.params[1:]]

    def setup(self, *cell):
        require_gpu()
        super().setup(*cell)


class Waiting(Auto):
    """`Auto` where both sides wait for each step before they build the next.

    What the host does is not hidden behind the device. A rise in this one alone is host time.
    """

    ahead = False


class WaitingBatch16(Batch16):
    """`Waiting` at 16 sequences, on a GPU."""

    ahead = False


class Bound(_Step):
    """Pipelined steps through the package, over contiguous attention that writes nothing.

    The least that a step over contiguous K and V can cost: unlike `Auto`'s baseline it copies
    nothing. A change in `Auto` alone is the other cache's.
    """

    unit = "x bound"

    def make_contiguous(self):
        return BoundCache(self.generation.contents, self.generation.new)

    def ratio_step_vs_bound(self, batch, context, block_size):
        return self.pair()


class BoundBatch16(Bound):
    """`Bound` at 16 sequences, on a GPU."""

    params = [[16], *_Step.params[1:]]

    def setup(self, *cell):
        require_gpu()
        super().setup(*cell)
