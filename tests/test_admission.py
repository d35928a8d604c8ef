"""Who runs, who waits, who gives up its blocks."""

import itertools
import tracemalloc

import numpy as np
from engine import engine

from benchmarks.counted import instructions


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


def test_a_request_of_the_whole_budget_is_served():
    run = engine()
    run.add("small", range(100, 110), 30)
    run.add("a", range(60), 5)
    run.drain()
    assert run.finished == ["small", "a"]
