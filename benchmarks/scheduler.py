"""What a step costs on the host: choosing who runs and in which blocks; blocks of 32."""

import numpy as np

from .common import feature
from .counted import _Allocated, _Instructions, _Retired

BLOCK_SIZE = 32


def _scheduler(num_blocks, **options):
    return feature("Scheduler")(feature("BlockPool")(num_blocks), BLOCK_SIZE, **options)


def _step(scheduler):
    step = scheduler.schedule()
    if step.request_ids:
        scheduler.update(dict.fromkeys(step.samples, 1))
    return step


class _Decode:
    version = "1"
    params = [[16, 256], [0, 10_000]]
    param_names = ["running", "queued"]
    timeout = 600

    def setup(self, running, queued):
        scheduler = _scheduler(64 * running, max_tokens=8192, max_running=running)
        rng = np.random.default_rng(0)
        for number in range(running):
            scheduler.add(number, rng.integers(0, 32000, 1000), 500)
        while sum(_step(scheduler).counts) != running:
            pass
        for number in range(running, running + queued):
            scheduler.add(number, rng.integers(0, 32000, 10), 500)
        self.scheduler = scheduler

    def work(self):
        _step(self.scheduler)


class Decode(_Decode):
    """`schedule` and `update` of a decode step of all running sequences, with others queued.

    Contexts of about 1000 tokens. The goal at 256 sequences is 1 ms.
    """

    # A call moves every sequence on by a token: many calls would end them.
    number = 1
    warmup_time = 0
    repeat = (20, 200, 2.0)

    def setup(self, running, queued):
        if hasattr(self, "scheduler") and self.left > 0:
            self.left -= 1
            return
        self.left = 400
        super().setup(running, queued)

    def time_step(self, running, queued):
        self.work()


class Instructions(_Instructions, _Decode):
    """Bytecode of the same step, the mean of 16 in a row, half a block of each sequence."""


class Allocated(_Allocated, _Decode):
    """Bytes of Python's and NumPy's memory that the same step holds at once."""


class Retired(_Retired, _Decode):
    """Instructions that the processor executes in the same step."""


class Pressure:
    """1000 steps that run out of blocks again and again: evictions, preemptions, admissions.

    Prompts of up to 512 tokens, a quarter of them another's, in a pool for about 24 sequences.
    """

    version = "1"
    params = [[64]]
    param_names = ["max_running"]
    timeout = 600
    number = 1
    warmup_time = 0
    repeat = (3, 10, 10.0)
    steps = 1000

    def setup(self, max_running):
        self.scheduler = _scheduler(400, max_tokens=1024, max_running=max_running)
        rng = np.random.default_rng(0)
        shared = rng.integers(0, 32000, (8, 128))
        for number in range(2000):
            own = rng.integers(0, 32000, rng.integers(1, 384))
            prompt = np.concatenate([shared[number % 8], own])
            self.scheduler.add(number, prompt, int(rng.integers(50, 200)))

    def time_steps(self, max_running):
        for _ in range(self.steps):
            _step(self.scheduler)
        stats = self.scheduler.stats()
        if not (stats.preemptions and stats.evicted_blocks and stats.hit_tokens):
            raise AssertionError(f"no pressure: {stats}")


class TraceHits:
    """Percent of prompt tokens that need no prefill, on a seeded trace with shared prompts.

    400 requests, 8 system prompts of 512 tokens, 1 to 256 tokens of their own, up to 99 new ones,
    16 sequences at a time, by the blocks of the pool; the longest sequence takes 28.
    """

    version = "1"
    params = [[60, 120, 240, 480]]
    param_names = ["blocks"]
    unit = "%"
    better = "larger"

    def setup(self, blocks):
        feature("Scheduler")

    def track_avoided(self, blocks):
        scheduler = _scheduler(blocks, max_tokens=2048, max_running=16)
        rng = np.random.default_rng(0)
        shared = rng.integers(0, 32000, (8, 512))
        for number in range(400):
            own = rng.integers(0, 32000, rng.integers(1, 257))
            prompt = np.concatenate([shared[rng.integers(8)], own])
            scheduler.add(number, prompt, int(rng.integers(1, 100)))
        while _step(scheduler).request_ids:
            pass
        return 100 * scheduler.stats().hit_rate
