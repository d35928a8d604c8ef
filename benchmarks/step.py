"""The headline, whole decode steps as users have them: blocks, plan, K and V written, attention.

The queries of a step follow from the output of the one before, as a sampled token does, and one
step is in flight while the next is built, as in mlx-lm's `generate_step`.
"""

import statistics
import time

import mlx.core as mx

from .caches import Bound as BoundCache
from .caches import Contiguous, paged
from .common import (
    BATCHES,
    CONTEXTS,
    HEAD_DIM,
    KV_HEADS,
    PARAM_NAMES,
    QUERY_HEADS,
    feature,
    kv_bytes,
    layers,
    on_gpu,
    random,
    require_cell,
    require_fast,
    require_gpu,
    require_memory,
    series_of_host_share,
)
from .counted import allocated, instructions, require_retired, retired


def num_steps():
    """Return the steps of a sample.

    On a GPU as many as fill a block, so that each sequence takes one, as in the mean. On a CPU a
    step is long, and the host has nothing to run ahead of.
    """
    return 32 if on_gpu() else 4


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
        seeded = [random(batch, KV_HEADS, context, HEAD_DIM) for _ in "kv"]
        # Each layer holds the seeded tokens in another order, in memory of its own.
        self.contents = [
            tuple(mx.roll(x, layer + 1, axis=2) for x in seeded) for layer in range(num_layers)
        ]
        self.queries = [random(batch, QUERY_HEADS, 1, HEAD_DIM, limit=4) for _ in range(steps)]
        self.new = [
            [(random(*token), random(*token)) for _ in range(num_layers)] for _ in range(steps)
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

    def ours(self):
        return self.pair()[0]

    track_host_share = series_of_host_share


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


class _OnTheHost:
    version = "1"
    params = [[1, 8, 32, 256]]
    param_names = ["sequences"]
    timeout = 600
    better = "smaller"
    context, block_size = 1024, 32
    steps = 32  # each sequence takes one block

    def setup(self, sequences):
        feature("PagedKVCache")
        cell = (sequences, self.context, self.block_size)
        require_memory(4 * kv_bytes(*cell))
        self.cache = paged(cell, 1, self.steps)
        self.new = [tuple(random(sequences, KV_HEADS, 1, HEAD_DIM) for _ in "kv")]
        self.queries = random(sequences, QUERY_HEADS, 1, HEAD_DIM)

    def build(self):
        self.out = self.cache.step(self.queries, self.new)

    def mean(self, measure):
        """Return the mean of what `measure` says of a call that builds one step."""
        total = 0
        for _ in range(self.steps):
            total += measure(self.build)
            if not on_gpu():
                self.out = None  # 256 sequences would take a CPU seconds
            mx.eval(self.out, self.cache.pools())
        self.cache.back()
        return total / self.steps


class Host(_OnTheHost):
    """Host time of a decode step of one layer, nothing computed: blocks, plan, write, attend.

    Of contexts of 1024 tokens that go on by a block. What each further layer takes is
    `host.Build`. A change is the package's Python; times of a noisy machine, see `Instructions`.
    """

    unit = "us"

    def track_host(self, sequences):
        self.mean(_seconds)
        return statistics.median(self.mean(_seconds) for _ in range(7)) * 1e6


class Instructions(_OnTheHost):
    """Bytecode instructions of the package's own files in the same step.

    The same on every machine of one Python version and kind of device, and in every run: a change
    of 1% is a change of the code. What NumPy and MLX do inside a call counts for nothing.
    """

    unit = "instructions"

    def track_instructions(self, sequences):
        self.mean(instructions)
        return self.mean(instructions)


class Allocated(_OnTheHost):
    """Bytes of Python's and NumPy's memory that the same step holds at once, see `counted`."""

    unit = "bytes"

    def track_allocated(self, sequences):
        self.mean(allocated)
        return self.mean(allocated)


class Retired(_OnTheHost):
    """Instructions that the processor executes in the same step, see `counted`."""

    unit = "instructions"

    def setup(self, sequences):
        require_retired()
        super().setup(sequences)

    def track_retired(self, sequences):
        self.mean(retired)
        return self.mean(retired)


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
