"""Requests: what is computed of them and in which order, what ends them, what is refused."""

import random
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from engine import engine

from pagedkv import PagedKVError, Scheduler, render_prometheus


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
    for tokens in ({}, {"b": 1}, {"a": 1, "b": 2}):
        with pytest.raises(ValueError, match=r"expected tokens of \{'a'\}, got"):
            run.scheduler.update(tokens)
    with pytest.raises(ValueError, match=r"32-bit token ids, got \[1\.5\]"):
        run.scheduler.update({"a": 1.5})
    assert run.scheduler.update({"a": 1}) == []
    run.scheduler.check_invariants()


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
    run.add(0, [1], 2)
    step = run.scheduler.schedule()
    for tokens in ([5], np.array([5])):
        with pytest.raises(ValueError, match=r"expected tokens of \{0\}, got"):
            run.scheduler.update(tokens)
    run.update(run.compute(step))
    run.drain()
    assert run.finished == [0]


def test_whether_a_request_uses_the_cache_is_known_when_it_is_added():
    run = engine()
    with pytest.raises(ValueError, match="truth value"):
        run.scheduler.add("a", [1], 2, use_cache=np.array([True, False]))
    assert run.scheduler.stats().waiting == 0


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
