"""Scheduling while a step is in flight: what is not known yet, and what ends in between."""

import random

import pytest
from engine import engine

from pagedkv import PagedKVError


def begin(run):
    """Schedule and compute; `update` ends it."""
    step = run.scheduler.schedule()
    run.compute(step)
    run.scheduler.check_invariants()
    return step


def end(run, step, without=()):
    """Update with what a schedule, the oldest in flight, has sampled."""
    run.update({key: token for key, token in run.results[step].items() if key not in without})
    run.scheduler.check_invariants()


def described(run):
    """Blocks by holders, and those of each sequence in flight."""
    pool = run.scheduler.pool
    counts = [pool.reference_count(block) for block in range(pool.num_blocks)]
    return counts, run.scheduler.stats()


def test_a_sequence_goes_on_by_a_token_that_is_not_known_yet():
    run = engine()
    run.add("a", range(3, 7), 3)
    first = begin(run)
    assert (first.unknown, first.samples_before) == ({}, [])
    second = begin(run)
    assert (second.request_ids, second.counts, second.samples) == (["a"], [1], ["a"])
    assert (second.tokens.tolist(), second.unknown, second.samples_before) == ([0], {0: 0}, ["a"])
    assert second.tables[0].slots().tolist() == [0, 1, 2, 3, 4]
    assert run.scheduler.in_flight == [first, second]
    with pytest.raises(PagedKVError, match="update or retract of one of two schedules in flight"):
        run.scheduler.schedule()
    end(run, first)
    assert (first.state, run.scheduler.in_flight) == ("over", [second])
    third = begin(run)
    assert third.tables[0].slots().tolist() == [0, 1, 2, 3, 4, 5]
    end(run, second)
    assert begin(run).request_ids == []  # three tokens are sampled, though one is not known
    assert run.scheduler.in_flight == [third]
    end(run, third)
    assert run.finished == ["a"]


def test_prompts_go_on_in_chunks_and_requests_are_admitted():
    run = engine(max_tokens=6)
    run.add("a", range(2), 9)
    run.add("b", range(10, 12), 2)
    begin(run)
    run.add("c", range(20, 29), 2)
    second = begin(run)
    assert (second.request_ids, second.counts) == (["a", "b", "c"], [1, 1, 4])
    assert second.tokens.tolist() == [0, 0, 20, 21, 22, 23]
    assert (second.unknown, second.samples) == ({0: 0, 1: 1}, ["a", "b"])
    end(run, run.scheduler.in_flight[0])
    third = begin(run)  # b has its two tokens
    assert (third.request_ids, third.counts) == (["a", "c"], [1, 5])
    assert (third.unknown, third.samples_before) == ({0: 0}, ["a", "b"])
    assert third.tokens.tolist() == [0, *range(24, 29)]
    end(run, second)
    assert run.finished == ["b"]
    fourth = begin(run)
    assert (fourth.unknown, fourth.samples_before) == ({0: 0, 1: 1}, ["a", "c"])
    run.drain_ahead()
    assert run.finished == ["b", "c", "a"]


def test_what_was_sampled_before_the_schedule_in_flight_is_known():
    run = engine(max_tokens=2)
    for name in "abc":
        run.add(name, [ord(name)], 4)
    first = begin(run)
    assert (first.request_ids, begin(run).request_ids) == (["a", "b"], ["a", "b"])
    run.scheduler.abort("b")
    end(run, first)
    third = begin(run)
    assert (third.request_ids, third.unknown) == (["a", "c"], {0: 0})
    assert third.tokens.tolist() == [0, ord("c")]


def test_the_newest_is_retracted_then_the_one_before():
    run = engine()
    run.add("a", range(7), 9)
    run.step()
    run.scheduler.fork("a", "b", 70)
    run.tokens["b"], run.limits["b"] = [*run.tokens["a"][:-1], 70], run.limits["a"]
    run.namespaces["b"] = None
    first = begin(run)
    before = [
        table.num_tokens - count for table, count in zip(first.tables, first.counts, strict=True)
    ]
    assert first.copies == [(1, 2), (1, 3)]
    between = described(run)
    second = begin(run)
    tables = [table.block_ids.tolist() for table in second.tables]
    assert tables == [[0, 2, 4], [0, 3, 5]]
    run.scheduler.retract()
    assert (second.state, run.scheduler.in_flight) == ("over", [first])
    assert described(run) == between
    again = begin(run)
    assert (again.unknown, again.samples_before) == ({0: 0, 1: 1}, ["a", "b"])
    run.scheduler.retract()
    run.scheduler.retract()
    run.scheduler.check_invariants()
    assert [table.num_tokens for table in first.tables] == before
    with pytest.raises(PagedKVError, match="got none"):
        run.scheduler.retract()
    run.drain_ahead()
    assert sorted(run.finished) == ["a", "b"]


def test_a_step_is_retracted_after_its_sequence_was_given_cached_blocks():
    """The undo brought back the sequence's own block, which was free by then."""
    run = engine()
    run.add("a", range(8), 2)
    run.drain()
    run.add("b", range(8), 4)
    first = begin(run)
    assert first.tables[0].block_ids.tolist() == [0, 2]
    second = begin(run)
    assert second.tables[0].block_ids.tolist() == [0, 2, 3]
    end(run, first)
    assert second.tables[0].block_ids.tolist() == [0, 1, 3]  # the cached one, its own is free
    run.scheduler.retract()
    run.scheduler.check_invariants()
    assert second.tables[0].block_ids.tolist() == [0, 1]
    run.drain_ahead()
    assert run.finished == ["a", "b"]


def test_what_is_generated_is_cached_without_what_is_in_flight():
    run = engine()
    run.add("a", range(6), 20)
    first = begin(run)
    second = begin(run)
    end(run, first)
    third = begin(run)  # fills the second block
    run.add("b", [*run.tokens["a"], 1, 2], 1)
    end(run, second)
    fourth = begin(run)
    assert (fourth.request_ids, fourth.counts) == (["a", "b"], [1, 5])
    assert run.scheduler.stats().blocks_cached == 0
    assert run.scheduler.stats().hit_tokens == 4
    end(run, third)
    end(run, fourth)
    assert run.finished == ["b"]
    run.add("c", [*run.tokens["a"], 1, 2], 1)
    begin(run)
    assert run.scheduler.stats().hit_tokens == 4 + 8


def test_a_prefix_is_waited_for_while_it_is_in_flight():
    run = engine(max_tokens=4)
    run.add("a", range(8), 3)
    first, second = begin(run), begin(run)
    assert (first.counts, second.counts, second.samples) == ([4], [4], ["a"])
    run.add("b", [*range(8), 9], 3)
    end(run, first)
    assert begin(run).request_ids == ["a"]
    end(run, second)
    step = begin(run)
    assert (step.request_ids, step.counts) == (["a", "b"], [1, 1])
    assert run.scheduler.stats().hit_tokens == 8


def test_aborted_requests_keep_their_blocks_until_nothing_in_flight_computes_them():
    run = engine()
    run.add("a", range(6), 9, use_cache=False)
    first, second = begin(run), begin(run)
    run.scheduler.abort("a")
    run.scheduler.check_invariants()
    end(run, first, without=["a"])
    assert run.scheduler.stats().blocks_live == 2
    run.add("a", range(30, 33), 2)  # the id is free
    third = begin(run)
    assert (third.tables[0].block_ids.tolist(), third.unknown) == ([2], {})
    end(run, second, without=["a"])
    assert run.scheduler.stats().blocks_live == 1
    end(run, third)
    assert run.scheduler.in_flight == []
    run.drain_ahead()
    assert run.finished == ["a"]


@pytest.mark.parametrize("undone", [1, 2])
def test_aborted_requests_are_free_also_when_steps_are_retracted(undone):
    run = engine()
    run.add("a", range(6), 9, use_cache=False)
    first, _ = begin(run), begin(run)
    run.scheduler.abort("a")
    run.scheduler.retract()
    run.scheduler.check_invariants()
    assert run.scheduler.stats().blocks_live == 2
    run.scheduler.retract() if undone == 2 else end(run, first, without=["a"])
    run.scheduler.check_invariants()
    assert run.scheduler.pool.num_free == 16


def test_a_request_is_finished_while_a_token_past_its_end_is_in_flight():
    """The last token was the end of the text; the step in flight goes on from it."""
    run = engine()
    run.add("a", range(7), 9)
    run.add("b", range(20, 22), 9)
    first, second = begin(run), begin(run)
    assert second.tables[0].block_ids.tolist() == [0, 1]
    end(run, first)
    run.scheduler.finish("a")
    run.scheduler.check_invariants()
    stats = run.scheduler.stats()
    assert (stats.running, stats.blocks_live, stats.blocks_cached) == (1, 3, 0)
    third = begin(run)
    assert (third.request_ids, third.unknown) == (["b"], {0: 1})
    end(run, second, without=["a"])
    stats = run.scheduler.stats()
    # The second block is full now, but of a token that nobody asked for.
    assert (stats.blocks_live, stats.blocks_cached) == (1, 1)
    end(run, third)
    run.drain_ahead()
    assert run.finished == ["b"]


def test_a_request_is_finished_before_its_tokens_are_known():
    run = engine()
    run.add("a", range(10), 9)
    first, second = begin(run), begin(run)
    run.scheduler.finish("a")
    end(run, first)  # tokens of the finished are taken and forgotten
    end(run, second, without=["a"])
    stats = run.scheduler.stats()
    assert (stats.blocks_live, stats.blocks_cached) == (0, 0)  # nothing was computed for sure


def test_nothing_is_forked_while_a_step_is_in_flight():
    run = engine()
    run.add("a", range(7), 9)
    first, _ = begin(run), begin(run)
    for _ in range(2):
        with pytest.raises(PagedKVError, match="expected update or retract of what is in flight"):
            run.scheduler.fork("a", "b", 1)
        end(run, first)
        first = run.scheduler.in_flight[0] if run.scheduler.in_flight else None
    run.scheduler.fork("a", "b", 1)


def test_nobody_is_preempted_while_a_step_is_in_flight():
    run = engine(num_blocks=4)
    run.add("a", range(4), 8)
    run.add("b", range(10, 14), 8)
    steps = [begin(run)]
    for _ in range(4):
        steps.append(begin(run))
        assert steps[-1].request_ids == ["a", "b"]
        end(run, steps.pop(0))
    empty = begin(run)  # both need a third block
    assert (empty.request_ids, empty.preempted) == ([], [])
    assert run.scheduler.in_flight == steps
    end(run, steps.pop())
    step = begin(run)
    assert (step.request_ids, step.preempted, step.unknown) == (["a"], ["b"], {})
    run.drain_ahead()
    assert run.finished == ["a", "b"]
    assert run.scheduler.stats().preemptions == 1


def test_cold_prefixes_are_evicted_while_a_step_is_in_flight():
    run = engine(num_blocks=3)
    run.add("old", range(8), 1)
    run.drain()
    run.add("a", range(100, 104), 4)
    first = begin(run)
    second = begin(run)  # into the last block of the old one
    assert (first.tables[0].block_ids.tolist(), run.scheduler.stats().evicted_blocks) == ([2, 1], 1)
    assert second.request_ids == ["a"]
    run.drain_ahead()
    assert run.finished == ["old", "a"]


def drained(seed, ahead):
    """Generate in a budget as small as possible; return all tokens and what it took."""
    rng = random.Random(seed)
    run = engine(num_blocks=7, block_size=2, max_tokens=5, max_running=4, watermark=0)
    for number in range(12):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
        run.add(number, prompt, rng.randrange(1, 7), priority=rng.choice([0, 0, 2]))
    run.drain_ahead() if ahead else run.drain()
    assert sorted(run.finished) == [*range(12)]
    return run.tokens, run.scheduler.stats()


def test_a_step_in_flight_changes_no_token_and_everybody_comes_to_an_end():
    preemptions = evictions = 0
    for seed in range(40):
        (tokens, stats), (expected, _) = drained(seed, True), drained(seed, False)
        assert tokens == expected
        assert (stats.waiting, stats.running, stats.blocks_live) == (0, 0, 0)
        preemptions += stats.preemptions
        evictions += stats.evicted_blocks
    assert preemptions > 40
    assert evictions > 40
