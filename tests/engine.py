"""An engine for the scheduler that remembers what every slot holds."""

import zlib
from array import array
from itertools import takewhile

import pytest

from pagedkv import BlockPool, Scheduler


class Engine:
    """Computes schedules: a slot holds the namespace and all tokens up to its own, as K and V do.

    So it does in every group of layers; a group sees a window of tokens, or all. What is sampled
    follows from these alone.
    """

    def __init__(self, scheduler, windows=(None,)):
        self.scheduler, self.windows = scheduler, windows
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
        for copy in step.copies:
            for offset in range(block_size):
                source, target = (block * block_size + offset for block in copy)
                self.slots[target] = self.slots.get(source)
        new = iter(enumerate(step.tokens.tolist()))
        written, sampled = [], {}
        for request_id, table, count in zip(
            step.request_ids, step.tables, step.counts, strict=True
        ):
            tokens, end = self.device_tokens(request_id, step), table.num_tokens
            groups, start = self.places(table.blocks), end - count
            for position in range(start, end):
                index, token = next(new)
                if index in step.unknown:
                    assert token == 0
                    assert step.samples_before[step.unknown[index]] == request_id
                    assert position == len(tokens) - 1
                else:
                    assert token == tokens[position]
                for group, place in enumerate(groups):
                    slot = place(position)
                    self.slots[slot] = group, self.namespaces[request_id], tokens[: position + 1]
                    written.append(slot)
            self.check_seen(table.blocks, start, end, self.namespaces[request_id], tokens)
            if request_id in step.samples:
                assert end == len(tokens)
                sampled[request_id] = 100 + zlib.crc32(array("i", tokens).tobytes()) % 10**6
        assert len(step.tokens) == sum(step.counts)
        assert len(set(written)) == len(step.tokens) * len(self.windows)
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
        match = self.scheduler.tree.match_prefix(tokens, namespace)
        count = match.num_blocks * size
        self.check_seen(match.ids, count, count, namespace, tokens)

    def places(self, blocks):
        """For each group, what tells the slot of a position."""
        size = self.scheduler.block_size
        return [
            lambda position, own=own: own[position // size] * size + position % size
            for own in blocks.tolist()
        ]

    def check_seen(self, blocks, start, stop, namespace, tokens):
        """What the token at `start` and those after it see up to `stop` is theirs."""
        for group, place in enumerate(self.places(blocks)):
            window = self.windows[group]
            first = 0 if window is None else max(0, start + 1 - window)
            for position in range(first, stop):
                expected = group, namespace, tokens[: position + 1]
                assert self.slots[place(position)] == expected

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


def engine(num_blocks=16, block_size=4, windows=(None,), **options):
    """With windows, blocks of all groups of layers count."""
    return Engine(Scheduler(BlockPool(num_blocks, windows), block_size, **options), windows)
