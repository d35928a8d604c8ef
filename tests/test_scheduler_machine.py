"""The scheduler under everything at once."""

import itertools
import os
import random
from collections import Counter

import pytest
from engine import engine
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedkv import BlockPool, Scheduler

SOAK = int(os.environ.get("PAGEDKV_SOAK", "10000"))  # requests


class InjectedError(Exception):
    pass


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts, forks, failures anywhere, one or two in flight, in the smallest budgets."""

    PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
    BUDGET, WINDOWS = 5, (None,)

    def __init__(self):
        super().__init__()
        sizes = {"num_blocks": self.BUDGET, "block_size": 2, "windows": self.WINDOWS}
        self.run = engine(**sizes, max_tokens=4, max_running=3)
        self.ids = itertools.count()
        self.alive = set()
        self.scheduled = None  # and not computed yet

    @property
    def in_flight(self):
        return self.run.scheduler.in_flight

    @property
    def idle(self):
        return not self.in_flight

    def schedule_next(self):
        self.compute()  # in order
        schedule = self.run.scheduler.schedule()
        if schedule.request_ids:
            self.scheduled = schedule
            assert self.in_flight[-1] is schedule
            assert not schedule.unknown or len(self.in_flight) == 2

    @precondition(lambda self: len(self.alive) < 6)
    @rule(
        prompt=PROMPTS,
        new=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 2]),
        namespace=st.sampled_from([None, None, "n"]),
        use_cache=st.sampled_from([True, True, False]),
    )
    def add(self, prompt, new, priority, namespace, use_cache):
        request_id = next(self.ids)
        blocks = (len(prompt) + new) // 2
        if self.run.scheduler.pool.blocks_held(blocks, 3) > self.BUDGET:
            with pytest.raises(ValueError, match=f"at most {self.BUDGET} "):
                self.run.add(request_id, prompt, new)
            return
        options = {"priority": priority, "namespace": namespace, "use_cache": use_cache}
        self.run.add(request_id, prompt, new, **options)
        self.alive.add(request_id)

    @precondition(lambda self: self.idle)
    @rule(count=st.integers(1, 3))
    def steps(self, count):
        for _ in range(count):
            self.run.step()
        self.alive -= set(self.run.finished)

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def schedule(self):
        self.schedule_next()

    @rule()
    def compute(self):
        """The newest; what is updated and ends before that changes nothing of it."""
        if self.scheduled:
            self.run.compute(self.scheduled)
            self.scheduled = None

    @precondition(lambda self: not self.idle)
    @rule()
    def update(self):
        if self.in_flight == [self.scheduled]:
            self.compute()
        sampled = self.run.results[self.in_flight[0]]
        self.run.update({i: token for i, token in sampled.items() if i in self.alive})
        self.alive -= set(self.run.finished)

    @precondition(lambda self: not self.idle)
    @rule()
    def retract(self):
        self.scheduled = None
        self.run.scheduler.retract()

    @rule()
    def reset_cache(self):
        self.run.scheduler.reset_cache()
        assert self.run.scheduler.stats().blocks_cached == 0

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.run.scheduler.abort(request_id)
        self.alive.remove(request_id)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def finish(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.run.scheduler.finish(request_id)
        self.alive.remove(request_id)

    @precondition(lambda self: self.idle and self.alive)
    @rule(data=st.data())
    def fork(self, data):
        request_id, new_id = data.draw(st.sampled_from(sorted(self.alive))), next(self.ids)
        run = self.run
        try:
            run.scheduler.fork(request_id, new_id, 7)
        except ValueError:
            return
        run.tokens[new_id] = [*run.tokens[request_id][:-1], 7]
        run.limits[new_id] = run.limits[request_id]
        run.namespaces[new_id] = run.namespaces[request_id]
        self.alive.add(new_id)

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule(
        name=st.sampled_from(["allocate", "adopt", "match_prefix", "extend", "evict"]),
        after=st.integers(0, 3),
    )
    def fail(self, name, after):
        """The `after`-th call of something that schedule() uses raises."""
        scheduler = self.run.scheduler
        owner = scheduler.pool if hasattr(scheduler.pool, name) else scheduler.tree
        original, calls = getattr(owner, name), itertools.count()

        def broken(*arguments):
            if next(calls) == after:
                raise InjectedError
            return original(*arguments)

        setattr(owner, name, broken)
        try:
            self.schedule_next()
        except InjectedError:
            pass
        finally:
            delattr(owner, name)

    @invariant()
    def agrees(self):
        self.run.scheduler.check_invariants()
        stats = self.run.scheduler.stats()
        assert stats.waiting + stats.running == len(self.alive)
        for request_id in self.alive:
            self.run.check_cached(request_id)

    def teardown(self):
        while not self.idle:
            self.run.scheduler.retract()
        self.run.drain_ahead(1000)
        scheduler = self.run.scheduler
        scheduler.check_invariants()
        stats = scheduler.stats()
        assert (stats.waiting, stats.running, stats.blocks_live) == (0, 0, 0)
        assert stats.blocks_cached + stats.blocks_free == self.BUDGET
        scheduler.tree.evict(self.BUDGET)
        assert scheduler.pool.num_free == self.BUDGET


class GroupsMachine(SchedulerMachine):
    """The same with layers in two groups."""

    BUDGET, WINDOWS = 12, (None, 3)


class MoreGroupsMachine(SchedulerMachine):
    """The same with layers in three groups, of three windows."""

    BUDGET, WINDOWS = 20, (None, 2, 5)


for machine in (SchedulerMachine, GroupsMachine, MoreGroupsMachine):
    machine.TestCase.settings = settings(
        max_examples=80, stateful_step_count=40, deadline=None, phases=[Phase.generate]
    )


TestScheduler = SchedulerMachine.TestCase
TestGroups = GroupsMachine.TestCase
TestMoreGroups = MoreGroupsMachine.TestCase


def test_soak():
    """A tight budget: no request is lost or finishes twice, and all blocks are free at the end.

    `make soak` runs 100,000 requests.
    """
    rng = random.Random(3)
    scheduler = Scheduler(BlockPool(48), 4, max_tokens=64, max_running=16, watermark=1)
    systems = [[rng.randrange(1000) for _ in range(12)] for _ in range(5)]
    added, ended, tokens = 0, Counter(), 0
    alive = set()
    while added < SOAK or alive:
        while added < SOAK and len(alive) < 32:
            prompt = [
                *rng.choice(systems),
                *(rng.randrange(1000) for _ in range(rng.randrange(30))),
            ]
            scheduler.add(added, prompt, rng.randrange(1, 12), namespace=rng.randrange(2))
            alive.add(added)
            added += 1
        in_flight = scheduler.in_flight
        ahead = len(in_flight) == 1 and rng.random() < 0.5
        step = scheduler.schedule() if ahead or not in_flight else None
        if alive and rng.random() < 0.01:
            request_id = rng.choice(sorted(alive))
            rng.choice([scheduler.abort, scheduler.finish])(request_id)
            alive.remove(request_id)
            ended[request_id] += 1
        if in_flight := scheduler.in_flight:
            if ahead and step.request_ids:
                continue
            sampled = {i: rng.randrange(1000) for i in in_flight[0].samples if i in alive}
            tokens += sum(in_flight[0].counts)
            finished = scheduler.update(sampled)
            ended.update(finished)
            alive -= set(finished)
        assert in_flight or not alive
    scheduler.check_invariants()
    assert len(ended) == SOAK
    assert set(ended.values()) == {1}
    stats = scheduler.stats()
    assert stats.preemptions > SOAK // 100
    assert stats.evicted_blocks > SOAK // 10
    assert 0.1 < stats.hit_rate < 0.9
    assert (stats.blocks_live, stats.waiting, stats.running) == (0, 0, 0)
    scheduler.tree.evict(48)
    assert scheduler.pool.num_free == 48
