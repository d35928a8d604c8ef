"""An engine for the scheduler that remembers what every slot holds."""

import itertools

import pytest

from pagedkv import BlockPool, Scheduler


class Engine:
    """Computes steps: a slot holds the namespace and all tokens up to its own, as K and V do."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.slots = {}
        self.tokens = {}  # by request: all that are known
        self.limits, self.namespaces, self.finished = {}, {}, []
        self.next_token = itertools.count(100)

    def add(self, request_id, prompt, max_new_tokens, **options):
        self.scheduler.add(request_id, prompt, max_new_tokens, **options)
        self.tokens[request_id] = list(prompt)
        self.limits[request_id] = len(prompt) + max_new_tokens
        self.namespaces[request_id] = options.get("namespace")

    def compute(self, step):
        """Write and read as the model would; return the tokens sampled."""
        block_size = self.scheduler.block_size
        for source, target in step.copies:
            for offset in range(block_size):
                held = self.slots.get(source * block_size + offset)
                self.slots[target * block_size + offset] = held
        new = iter(step.tokens.tolist())
        written = []
        for request_id, table, count in zip(
            step.request_ids, step.tables, step.counts, strict=True
        ):
            tokens, end = self.tokens[request_id], table.num_tokens
            for position, slot in zip(
                range(end - count, end), table.slots(end - count).tolist(), strict=True
            ):
                assert next(new) == tokens[position]
                self.slots[slot] = (self.namespaces[request_id], *tokens[: position + 1])
                written.append(slot)
        assert len(set(written)) == len(step.tokens) == sum(step.counts)
        for request_id, table in zip(step.request_ids, step.tables, strict=True):
            for position, slot in enumerate(table.slots().tolist()):
                expected = (self.namespaces[request_id], *self.tokens[request_id][: position + 1])
                assert self.slots[slot] == expected
        return {request_id: next(self.next_token) for request_id in step.samples}

    def update(self, sampled):
        for request_id, token in sampled.items():
            self.tokens[request_id].append(token)
        finished = self.scheduler.update(sampled)
        for request_id in finished:
            assert len(self.tokens[request_id]) == self.limits[request_id]
        self.finished += finished

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


def engine(num_blocks=16, block_size=4, **options):
    return Engine(Scheduler(BlockPool(num_blocks), block_size, **options))
