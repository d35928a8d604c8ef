"""An engine for the scheduler that remembers what every slot holds."""

import zlib
from array import array
from itertools import takewhile

import pytest

from pagedkv import BlockPool, Scheduler


class Engine:
    """Computes schedules: a slot holds the namespace and all tokens up to its own, as K and V do.

    What is sampled follows from these alone.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.slots = {}
        self.tokens = {}  # by request: all that the host knows
        self.limits, self.namespaces, self.finished = {}, {}, []
        self.results = {}  # by schedule

    def add(self, request_id, prompt, max_new_tokens, **options):
        self.scheduler.add(request_id, prompt, max_new_tokens, **options)
        self.tokens[request_id] = list(prompt)
        self.limits[request_id] = len(prompt) + max_new_tokens
        self.namespaces[request_id] = options.get("namespace")
        for step in self.scheduler.in_flight:
            self.results.get(step, {}).pop(request_id, None)  # of another request of that name

    def device_tokens(self, request_id, step):
        """All tokens of a request that are sampled before a schedule is computed."""
        earlier = takewhile(lambda other: other is not step, self.scheduler.in_flight)
        sampled = [self.results[other] for other in earlier]
        return self.tokens[request_id] + [s[request_id] for s in sampled if request_id in s]

    def compute(self, step):
        """Write and read as the model would; return the tokens sampled. In order, each at once."""
        block_size = self.scheduler.block_size
        for source, target in step.copies:
            for offset in range(block_size):
                held = self.slots.get(source * block_size + offset)
                self.slots[target * block_size + offset] = held
        new = iter(enumerate(step.tokens.tolist()))
        written, sampled = [], {}
        for request_id, table, count in zip(
            step.request_ids, step.tables, step.counts, strict=True
        ):
            tokens, end = self.device_tokens(request_id, step), table.num_tokens
            for position, slot in zip(
                range(end - count, end), table.slots(end - count).tolist(), strict=True
            ):
                index, token = next(new)
                if index in step.unknown:
                    assert token == 0
                    assert step.samples_before[step.unknown[index]] == request_id
                    assert position == len(tokens) - 1
                else:
                    assert token == tokens[position]
                self.slots[slot] = (self.namespaces[request_id], *tokens[: position + 1])
                written.append(slot)
            for position, slot in enumerate(table.slots().tolist()):
                expected = (self.namespaces[request_id], *tokens[: position + 1])
                assert self.slots[slot] == expected
            if request_id in step.samples:
                assert end == len(tokens)
                sampled[request_id] = 100 + zlib.crc32(array("i", tokens).tobytes()) % 10**6
        assert len(set(written)) == len(step.tokens) == sum(step.counts)
        assert list(sampled) == step.samples
        self.results[step] = sampled
        return sampled

    def update(self, sampled):
        """End the oldest schedule in flight, of whose tokens `sampled` are still wanted."""
        for request_id, token in (self.results[self.scheduler.in_flight[0]] | sampled).items():
            self.tokens[request_id].append(token)
        finished = self.scheduler.update(sampled)
        for request_id in finished:
            assert len(self.tokens[request_id]) == self.limits[request_id]
        self.finished += finished

    def check_cached(self, request_id):
        """What is cached of a request holds its tokens."""
        tokens, namespace = self.tokens[request_id], self.namespaces[request_id]
        size = self.scheduler.block_size
        blocks = self.scheduler.tree.match_prefix(tokens, namespace).blocks
        for position in range(len(blocks) * size):
            slot = blocks[position // size] * size + position % size
            assert self.slots[slot] == (namespace, *tokens[: position + 1])

    def step(self):
        step = self.scheduler.schedule()
        if step.request_ids:
            self.update(self.compute(step))
        return step

    def drain(self, most=10_000):
        for _ in range(most):
            if not self.step().request_ids:
                return
        pytest.fail("it does not end")

    def drain_ahead(self, most=10_000):
        """As `drain`, with one step in flight while the next is scheduled."""
        for _ in range(most):
            in_flight = self.scheduler.in_flight
            if len(in_flight) < 2:
                step = self.scheduler.schedule()
                if step.request_ids:
                    self.compute(step)
                    continue
                if not in_flight:
                    return
            self.update(self.results[in_flight[0]])
        pytest.fail("it does not end")


def engine(num_blocks=16, block_size=4, **options):
    return Engine(Scheduler(BlockPool(num_blocks), block_size, **options))
