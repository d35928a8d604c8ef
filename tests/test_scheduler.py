"""The scheduler against an engine that remembers what every slot holds."""

import itertools
import os
import random
import sys
import threading
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from interrupts import instructions

from pagedkv import BlockPool, PagedKVError, Scheduler, render_prometheus

SOAK = int(os.environ.get("PAGEDKV_SOAK", "10000"))  # requests


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


def test_prompts_in_chunks_beside_decodes():
    run = engine(max_tokens=6)
    run.add("a", range(4), 8)
    step = run.step()
    assert (step.request_ids, step.counts, step.samples) == (["a"], [4], ["a"])
    assert step.tokens.tolist() == [0, 1, 2, 3]
    assert step.tables[0].slots().tolist() == [0, 1, 2, 3]
    run.add("b", range(10, 22), 2)
    for counts, samples in [([1, 5], ["a"]), ([1, 5], ["a"]), ([1, 2], ["a", "b"])]:
        step = run.step()
        assert (step.request_ids, step.counts, step.samples) == (["a", "b"], counts, samples)
    assert step.tables[1].block_ids.tolist() == [2, 3, 4]
    step = run.step()
    assert (step.counts, run.finished) == ([1, 1], ["b"])
    assert run.step().request_ids == ["a"]


def test_an_empty_scheduler_has_nothing_to_do():
    step = engine().scheduler.schedule()
    assert (step.request_ids, step.tokens.tolist(), step.tables) == ([], [], [])
    assert engine().scheduler.schedule().preempted == []


def test_what_is_finished_is_found_again():
    run = engine()
    run.add("a", [1, 2, 3, 4, 5, 6, 7, 8], 2)
    run.drain()
    run.add("b", [1, 2, 3, 4, 5, 6, 7, 8], 2)
    step = run.scheduler.schedule()
    # The second block holds the last token, which is computed for what follows it.
    assert (step.counts, step.tables[0].block_ids.tolist()) == ([4], [0, 2])
    run.update(run.compute(step))
    assert step.tables[0].block_ids.tolist() == [0, 1]  # the cached one, its own is free again
    run.drain()
    stats = run.scheduler.stats()
    assert (stats.prompt_tokens, stats.hit_tokens, stats.hit_rate) == (16, 4, 0.25)
    assert (stats.blocks_live, stats.blocks_cached) == (0, 2)


def test_eight_requests_that_arrive_together_compute_their_prefix_once():
    run = engine(num_blocks=1024, block_size=16, max_tokens=2048)
    prefix = list(range(4096))
    for number in range(8):
        run.add(number, [*prefix, 5000 + number, 1, 2], 3)
    assert run.step().request_ids == [0]
    assert run.step().request_ids == [0]
    step = run.step()  # what is left of the first, and all others from the prefix on
    assert step.request_ids == [0, 1, 2, 3, 4, 5, 6, 7]
    assert step.counts == [3] * 8
    assert run.scheduler.stats().blocks_live == 256 + 8
    run.drain()
    assert run.scheduler.stats().hit_tokens == 7 * 4096


def test_namespaces_compute_their_own():
    run = engine()
    run.add("a", range(8), 1, namespace="x")
    run.drain()
    run.add("b", range(8), 1, namespace="y")
    assert run.step().counts == [8]
    assert run.scheduler.stats().hit_tokens == 0


def test_cold_prefixes_go_before_anyone_is_preempted():
    run = engine(num_blocks=6)
    run.add("old", range(8), 1)
    run.drain()
    run.add("a", range(100, 110), 11)
    run.drain()
    stats = run.scheduler.stats()
    assert (stats.preemptions, stats.evicted_blocks) == (0, 1)
    run.scheduler.check_invariants()


def test_the_youngest_is_preempted_and_goes_on_where_it_was():
    run = engine(num_blocks=4)
    run.add("a", range(4), 8)
    run.add("b", range(10, 14), 8)
    assert run.step().request_ids == ["a", "b"]
    for _ in range(4):
        assert run.step().preempted == []
    step = run.step()
    assert (step.request_ids, step.preempted) == (["a"], ["b"])
    before = list(run.tokens["b"])
    while not run.finished:
        run.scheduler.check_invariants()
        assert run.step().request_ids == ["a"]
    step = run.step()
    assert step.request_ids == ["b"]
    assert run.tokens["b"][: len(before)] == before
    run.drain()
    assert run.finished == ["a", "b"]
    assert run.scheduler.stats().preemptions == 1


def test_a_preempted_sequence_keeps_its_cached_prefix_while_it_makes_room():
    """Its prefix is the coldest in the tree when it comes back, and every block is in use."""
    run = engine(num_blocks=8)
    run.add("a", range(8), 24)
    run.add("b", range(50, 58), 16)
    assert ["b"] in (run.step().preempted for _ in range(12))
    while run.scheduler.stats().blocks_free:
        run.step()
    run.scheduler.finish("a")
    before = run.scheduler.stats()
    step = run.step()
    after = run.scheduler.stats()
    assert step.request_ids == ["b"]
    assert after.evicted_blocks > before.evicted_blocks
    assert after.hit_tokens - before.hit_tokens == 12
    run.drain()
    assert run.finished == ["b"]


def test_priority_is_how_many_earlier_ones_may_be_overtaken():
    run = engine(num_blocks=100, max_running=1)
    for number in range(6):
        run.add(number, [number], 1, priority=4 if number == 5 else 0)
    run.drain()
    assert run.finished == [0, 5, 1, 2, 3, 4] or run.finished == [0, 1, 5, 2, 3, 4]


def test_the_oldest_finishes_however_many_come_after_it():
    run = engine(num_blocks=6, max_tokens=8)
    run.add("old", range(8), 15)
    for number in itertools.count():
        run.add(number, [number, 1, 2], 9, priority=3)
        run.step()
        run.scheduler.check_invariants()
        if "old" in run.finished:
            break
        assert number < 40
    assert run.scheduler.stats().preemptions > 0


def test_a_request_waits_behind_one_that_does_not_fit_yet():
    run = engine(num_blocks=4)
    run.add("a", range(4), 5)
    run.step()
    run.add("big", range(20, 36), 1)
    run.add("small", [9], 1)
    assert run.step().request_ids == ["a"]
    run.drain()
    assert run.finished == ["a", "big", "small"]


def test_the_watermark_is_left_to_those_that_run():
    for watermark, ids in [(0, ["a", "b"]), (1, ["a"])]:
        run = engine(num_blocks=4, watermark=watermark)
        run.add("a", range(8), 2)
        run.step()
        run.add("b", range(50, 54), 2)
        assert run.step().request_ids == ids
        run.drain()
        assert run.finished == ["a", "b"]


def test_forks_share_until_they_write():
    run = engine()
    run.add("a", range(5), 4)
    run.step()
    for number in range(3):
        run.scheduler.fork("a", number, 70 + number)
        run.tokens[number] = [*run.tokens["a"][:-1], 70 + number]
        run.limits[number], run.namespaces[number] = run.limits["a"], None
    assert run.scheduler.stats().blocks_live == 2
    step = run.step()
    assert step.request_ids == ["a", 0, 1, 2]
    assert step.copies == [(1, 2), (1, 3), (1, 4), (1, 5)]
    run.scheduler.check_invariants()
    run.drain()
    assert sorted(map(str, run.finished)) == ["0", "1", "2", "a"]
    assert run.scheduler.stats().blocks_live == 0


def test_abort_gives_back_everything():
    run = engine(max_running=1)
    run.add("a", range(6), 4)
    run.add("b", range(20, 26), 4)
    run.step()
    run.scheduler.abort("b")
    step = run.scheduler.schedule()
    sampled = run.compute(step)
    run.scheduler.abort("a")  # in flight
    assert sampled.keys() == {"a"}
    run.update({})
    run.scheduler.check_invariants()
    assert run.scheduler.stats().blocks_live == 0
    assert run.step().request_ids == []
    run.add("a", range(30, 36), 1)  # the id is free again
    run.drain()
    assert run.finished == ["a"]


def test_what_was_not_computed_is_retracted():
    run = engine()
    run.add("a", range(6), 4)
    run.step()
    run.add("b", range(6), 4)
    before = run.scheduler.stats().blocks_live
    step = run.scheduler.schedule()
    assert step.request_ids == ["a", "b"]
    assert run.scheduler.stats().blocks_live == before + 1
    run.scheduler.retract()
    run.scheduler.check_invariants()
    assert run.scheduler.stats().blocks_live == before
    again = run.scheduler.schedule()
    assert (again.request_ids, again.counts) == (step.request_ids, step.counts)
    run.update(run.compute(again))
    run.drain()
    assert run.finished == ["a", "b"]


def test_a_retracted_schedule_computes_nothing_again():
    run = engine(num_blocks=400)
    run.add("a", range(6), 900)
    for _ in range(600):
        run.step()
    assert run.scheduler.schedule().counts == [1]
    run.scheduler.retract()
    assert run.step().counts == [1]


def test_schedule_and_update_take_turns():
    run = engine()
    run.add("a", range(6), 4)
    for call in (lambda: run.scheduler.update({}), run.scheduler.retract):
        with pytest.raises(PagedKVError, match=r"expected a schedule to .*, got none"):
            call()
    run.scheduler.schedule()
    for call in (
        run.scheduler.schedule,
        lambda: run.scheduler.finish("a"),
        lambda: run.scheduler.fork("a", "b", 1),
    ):
        with pytest.raises(PagedKVError, match="expected update or retract"):
            call()
    for tokens in ({}, {"b": 1}, {"a": 1, "b": 2}):
        with pytest.raises(ValueError, match=r"expected tokens of \{'a'\}, got"):
            run.scheduler.update(tokens)
    with pytest.raises(ValueError, match=r"32-bit token ids, got \[1\.5\]"):
        run.scheduler.update({"a": 1.5})
    assert run.scheduler.update({"a": 1}) == []
    run.scheduler.check_invariants()


def test_a_fork_that_outlives_its_parent_keeps_what_they_share():
    """The parent's blocks were cached unlocked: they counted as free for admission and were not."""
    run = engine(num_blocks=12)
    run.add("a", range(9), 3)
    run.step()
    run.scheduler.fork("a", "b", 70)
    run.tokens["b"], run.limits["b"] = [*run.tokens["a"][:-1], 70], 12
    run.namespaces["b"] = None
    run.step()
    run.scheduler.finish("a")
    run.scheduler.check_invariants()
    stats = run.scheduler.stats()
    assert (stats.blocks_live, stats.blocks_cached, stats.blocks_free) == (3, 0, 9)
    run.add("c", range(100, 140), 1)  # ten blocks: there is no room, and nothing to evict
    assert run.step().request_ids == ["b"]
    assert run.scheduler.stats().evicted_blocks == 0
    run.drain()
    assert run.finished == ["b", "c"]


def test_what_is_generated_is_cached_while_it_runs():
    run = engine()
    run.add("a", range(6), 20)
    for _ in range(8):
        run.step()
    prompt = run.tokens["a"][:12]
    run.add("b", [*prompt, 500], 1)
    step = run.step()
    assert (step.request_ids, step.counts) == (["a", "b"], [1, 1])
    assert run.scheduler.stats().hit_tokens == 12
    run.scheduler.check_invariants()


def test_a_request_that_does_not_use_the_cache():
    run = engine()
    run.add("a", range(8), 5, use_cache=False)
    run.step()
    run.add("b", range(8), 5)
    run.add("c", range(8), 5, use_cache=False)
    assert run.step().counts == [1, 8, 8]
    run.drain()
    stats = run.scheduler.stats()
    assert (stats.hit_tokens, stats.blocks_cached) == (0, 3)  # those of b: 12 tokens


def test_a_reset_cache_is_found_by_nobody_and_runs_on():
    run = engine()
    run.add("old", range(50, 58), 1)
    run.drain()
    run.add("a", range(8), 9)
    run.step()
    assert run.scheduler.reset_cache() == 2
    run.scheduler.check_invariants()
    run.add("b", range(8), 2)
    assert run.step().counts == [1, 8]
    run.scheduler.check_invariants()
    run.drain()
    assert run.finished == ["old", "b", "a"]
    stats = run.scheduler.stats()
    assert (stats.blocks_live, stats.hit_tokens) == (0, 0)
    assert run.scheduler.tree.evict(16) == stats.blocks_cached
    assert run.scheduler.pool.num_free == 16


def test_cached_blocks_are_told_to_a_listener():
    events = []
    run = engine(on_event=events.append)
    run.add("a", range(8), 2)
    run.drain()
    assert [(event.kind, event.blocks) for event in events] == [("stored", (0, 1))]


def test_a_preempted_request_is_forked_and_both_wait():
    run = engine(num_blocks=4)
    run.add("a", range(4), 8)
    run.add("b", range(10, 14), 8)
    assert ["b"] in (run.step().preempted for _ in range(9))
    run.scheduler.fork("b", "c", 77)
    run.tokens["c"], run.limits["c"] = [*run.tokens["b"][:-1], 77], run.limits["b"]
    run.namespaces["c"] = None
    run.scheduler.check_invariants()
    assert run.scheduler.stats().waiting == 2
    run.drain()
    assert sorted(run.finished) == ["a", "b", "c"]


@pytest.mark.parametrize("most", [float("inf"), float("nan"), 1.5, "3"])
def test_a_number_of_tokens_is_an_integer(most):
    """An infinite one would have blocked the queue for ever."""
    run = engine()
    with pytest.raises(ValueError, match="max_new_tokens to be an integer"):
        run.scheduler.add("a", [1], most)
    assert run.scheduler.stats().waiting == 0


def test_numpy_integers_are_integers_like_others():
    run = engine(num_blocks=100, max_running=1, max_tokens=np.uint8(200))
    run.add("a", [0], np.uint8(250))  # ended after one token
    run.add("b", [1], 1)
    run.add("c", [2], 1, priority=np.uint32(3))  # sorted last: 2 - 3 is 2**32 - 1
    run.step()
    run.drain()
    assert len(run.tokens["a"]) == 251
    assert run.finished == ["c", "a", "b"]
    run.add("d", [3], 2)
    step = run.scheduler.schedule()
    run.compute(step)
    run.scheduler.update({"d": np.int64(5)})
    assert run.scheduler.schedule().tokens.tolist() == [5]


@pytest.mark.parametrize("cache", [16, None])
def test_a_scheduler_has_a_pool(cache):
    with pytest.raises(ValueError, match="expected a BlockPool, got"):
        Scheduler(cache, 16)


def test_an_update_is_a_mapping():
    run = engine()
    run.add("a", [1], 2)
    step = run.scheduler.schedule()
    with pytest.raises(ValueError, match=r"expected tokens of \{'a'\}, got \[5\]"):
        run.scheduler.update([5])
    run.update(run.compute(step))
    run.drain()
    assert run.finished == ["a"]


def steps_to_abort(waiting):
    """Bytecode instructions for which a thousand of so many waiting requests are aborted."""
    run = engine()
    for number in range(waiting):
        run.scheduler.add(number, [number], 1)
    order = np.random.default_rng(0).permutation(waiting)[:1000].tolist()
    return instructions(lambda: [run.scheduler.abort(number) for number in order])


def test_aborting_takes_the_same_time_however_many_wait():
    assert steps_to_abort(16_000) < 1.2 * steps_to_abort(2_000)


def test_aborted_requests_do_not_pile_up():
    run = engine()
    run.add("a", [1], 1)
    for number in range(10_000):
        run.scheduler.add(number, [number], 1)
        run.scheduler.abort(number)
    tracemalloc.start()
    for number in range(10_000):
        run.scheduler.add(number, [number], 1)
        run.scheduler.abort(number)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 200_000
    run.drain()
    assert run.finished == ["a"]


def test_bookkeeping_of_a_long_prompt_is_linear():
    """Each chunk cached the whole prefix again: 7 s for a million tokens, 0.1 s of them needed."""
    run = engine(num_blocks=70_000, block_size=16, max_tokens=512)
    run.scheduler.add("a", np.arange(1_000_000), 1)
    start = time.perf_counter()
    while not (step := run.scheduler.schedule()).samples:
        assert step.counts == [512]
        run.scheduler.update({})
    seconds = time.perf_counter() - start
    assert seconds < 2


def test_requests_come_and_go_from_other_threads():
    run = engine(num_blocks=400, max_running=64)
    scheduler, counts, errors = run.scheduler, Counter(), []
    stop = threading.Event()

    def client(name):
        rng = random.Random(name)
        mine = []
        try:
            for number in range(1500):
                request = (name, number)
                scheduler.add(request, [number, name], rng.randrange(1, 5))
                counts["added"] += 1
                mine.append(request)
                if rng.random() < 0.5:
                    try:
                        scheduler.abort(mine.pop(rng.randrange(len(mine))))
                        counts["aborted"] += 1
                    except ValueError:  # it has finished
                        pass
                scheduler.stats()
        except Exception as error:
            errors.append(error)

    def serve():
        while not (stop.is_set() and not scheduler.stats().waiting + scheduler.stats().running):
            step = scheduler.schedule()
            if not step.request_ids:
                continue
            scheduler.update(dict.fromkeys(step.samples, 1))

    engine_thread = threading.Thread(target=serve)
    clients = [threading.Thread(target=client, args=(name,)) for name in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        engine_thread.start()
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    finally:
        stop.set()
        engine_thread.join()
        sys.setswitchinterval(interval)
    assert errors == []
    scheduler.check_invariants()
    stats = scheduler.stats()
    assert (stats.waiting, stats.running, stats.blocks_live) == (0, 0, 0)


BAD_REQUESTS = {
    "same id": (("a", [1], 1), {}, "new request id, got 'a' again"),
    "no prompt": (("b", [], 1), {}, "a prompt of at least one integer token"),
    "fractions": (("b", [0.5], 1), {}, "a prompt of at least one integer token"),
    "large ids": (("b", [2**31], 1), {}, "token ids to fit in 32 bits"),
    "no tokens wanted": (("b", [1], 0), {}, r"max_new_tokens in \[1, 2147483647\], got 0"),
    "priority": (("b", [1], 1), {"priority": -1}, "priority to be an integer >= 0, got -1"),
    "too large": (
        ("b", range(60), 6),
        {},
        "at most 16 blocks, got 60 prompt and 6 new tokens, which need 17",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_refused_request_is_not_queued(name):
    arguments, options, message = BAD_REQUESTS[name]
    run = engine()
    run.add("a", range(3), 1)
    with pytest.raises(ValueError, match=message):
        run.scheduler.add(*arguments, **options)
    assert run.scheduler.stats().waiting == 1
    run.drain()
    assert run.finished == ["a"]


def test_a_request_of_the_whole_budget_is_served():
    run = engine()
    run.add("small", range(100, 110), 30)
    run.add("a", range(60), 5)
    run.drain()
    assert run.finished == ["small", "a"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.finish("x"), "has not finished, got 'x'"),
        (lambda s: s.abort("x"), "has not finished, got 'x'"),
        (lambda s: s.fork("x", "y", 1), "has not finished, got 'x'"),
        (lambda s: s.fork("a", "a", 1), "new request id, got 'a' again"),
        (lambda s: s.fork("a", "y", "z"), "32-bit token ids, got \\['z'\\]"),
        (lambda s: s.fork("waiting", "y", 1), "has a token, 'waiting' has none"),
    ],
)
def test_requests_that_are_not_there(call, message):
    run = engine(max_running=2)
    run.add("a", range(3), 5)
    run.step()
    run.add("waiting", range(3), 5)
    with pytest.raises(ValueError, match=message):
        call(run.scheduler)
    run.scheduler.check_invariants()


def test_no_more_forks_than_may_run():
    run = engine(max_running=1)
    run.add("a", range(3), 5)
    run.step()
    with pytest.raises(ValueError, match="fewer than 1 running"):
        run.scheduler.fork("a", "b", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens in \[1, .*, got 0"),
        ({"max_running": 0}, r"max_running in \[1, .*, got 0"),
        ({"watermark": -1}, "watermark to be an integer >= 0, got -1"),
        ({"block_size": 0}, r"block_size in \[1, .*, got 0"),
    ],
)
def test_a_scheduler_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        engine(**options)


def test_finish_before_the_limit():
    run = engine()
    run.add("a", range(7), 50)
    run.step()
    run.step()
    run.scheduler.finish("a")
    stats = run.scheduler.stats()
    assert (stats.running, stats.blocks_live, stats.blocks_cached) == (0, 0, 2)
    run.scheduler.check_invariants()


def test_prometheus_text():
    run = engine(block_size=4, block_bytes=1024)
    run.add("a", range(9), 5)
    run.step()
    text = render_prometheus(run.scheduler.stats(), "kv")
    lines = text.splitlines()
    assert 'kv_blocks{state="live"} 3' in lines
    assert 'kv_blocks{state="free"} 13' in lines
    assert 'kv_block_bytes{state="allocated"} 16384' in lines
    assert 'kv_requests{state="running"} 1' in lines
    assert "kv_prompt_tokens_total 9" in lines
    assert "# TYPE kv_preemptions_total counter" in lines
    assert text.endswith("\n")
    assert all(line.startswith(("# HELP kv_", "# TYPE kv_", "kv_")) for line in lines)


class InjectedError(Exception):
    pass


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts, forks, failures anywhere, in budgets as small as possible."""

    PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)

    def __init__(self):
        super().__init__()
        self.run = engine(num_blocks=5, block_size=2, max_tokens=4, max_running=3)
        self.ids = itertools.count()
        self.alive = set()

    @property
    def idle(self):
        return self.run.scheduler._in_flight is None

    @precondition(lambda self: len(self.alive) < 6)
    @rule(
        prompt=PROMPTS,
        new=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 2]),
        namespace=st.sampled_from([None, None, "n"]),
    )
    def add(self, prompt, new, priority, namespace):
        request_id = next(self.ids)
        if len(prompt) + new - 1 > 10:
            with pytest.raises(ValueError, match="at most 5 blocks"):
                self.run.add(request_id, prompt, new)
            return
        self.run.add(request_id, prompt, new, priority=priority, namespace=namespace)
        self.alive.add(request_id)

    @precondition(lambda self: self.idle)
    @rule(count=st.integers(1, 3))
    def steps(self, count):
        for _ in range(count):
            self.run.step()
        self.alive -= set(self.run.finished)

    @precondition(lambda self: self.idle)
    @rule()
    def schedule(self):
        self.step = self.run.scheduler.schedule()

    @precondition(lambda self: not self.idle)
    @rule(computed=st.booleans())
    def end_of_step(self, computed):
        if not computed:
            self.run.scheduler.retract()
            return
        sampled = self.run.compute(self.step)
        self.run.update({i: token for i, token in sampled.items() if i in self.alive})
        self.alive -= set(self.run.finished)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.run.scheduler.abort(request_id)
        self.alive.remove(request_id)

    @precondition(lambda self: self.idle and self.alive)
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

    @precondition(lambda self: self.idle)
    @rule(
        name=st.sampled_from(
            ["allocate", "retain", "release", "match_prefix", "insert", "evict", "lock"]
        ),
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
            self.step = scheduler.schedule()
        except InjectedError:
            pass
        finally:
            delattr(owner, name)

    @invariant()
    def agrees(self):
        self.run.scheduler.check_invariants()
        assert set(self.run.scheduler._sequences) == self.alive

    def teardown(self):
        if not self.idle:
            self.run.scheduler.retract()
        self.run.drain(1000)
        scheduler = self.run.scheduler
        scheduler.check_invariants()
        stats = scheduler.stats()
        assert (stats.waiting, stats.running, stats.blocks_live) == (0, 0, 0)
        assert scheduler.tree.evict(5) == stats.blocks_cached
        assert scheduler.pool.num_free == 5


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestScheduler = SchedulerMachine.TestCase


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
        step = scheduler.schedule()
        if alive and rng.random() < 0.01:
            request_id = rng.choice(sorted(alive))
            scheduler.abort(request_id)
            alive.remove(request_id)
            ended[request_id] += 1
        if step.request_ids:
            sampled = {i: rng.randrange(1000) for i in step.samples if i in alive}
            finished = scheduler.update(sampled)
            ended.update(finished)
            alive -= set(finished)
            tokens += sum(step.counts)
        assert step.request_ids or not alive
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
