"""All of it together: a small model generates through the scheduler what it does with dense K/V."""

import mlx.core as mx
import numpy as np
import pytest

from examples.generate import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    VOCABULARY,
    Model,
    compute,
    compute_lazily,
    generate,
    generate_ahead,
)
from pagedkv import BlockPool, PagedKVCache, PagedKVError, Scheduler

SIZES = {"block_size": 4, "num_blocks": 16}

pytestmark = pytest.mark.usefixtures("storage")


def new_cache():
    return PagedKVCache(
        num_layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=mx.float32, **SIZES
    )


def attend_dense(layer, q, k, v, *, scale):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def generate_dense(model, prompt, count, attend=attend_dense):
    tokens = list(prompt)
    for _ in range(count):
        logits = model(mx.array([tokens]), attend)
        tokens.append(mx.argmax(logits[0, -1]).item())
    return tokens[len(prompt) :]


def test_what_the_model_says_depends_on_all_that_it_attends_to():
    """Or the other tests could not fail: tokens that repeat themselves need no K and V."""

    def without_the_first(layer, q, k, v, *, scale):
        return attend_dense(layer, q, k.at[:, :, 0].multiply(0), v, scale=scale)

    model, rng, equal = Model(), np.random.default_rng(23), 0
    for _ in range(20):
        prompt = rng.integers(0, VOCABULARY, 12).tolist()
        right = generate_dense(model, prompt, 12)
        equal += right == generate_dense(model, prompt, 12, without_the_first)
    assert equal <= 6


def requests_that_share():
    rng = np.random.default_rng(22)
    shared = rng.integers(0, VOCABULARY, 14).tolist()
    requests = {}
    for number in range(14):
        own = rng.integers(0, VOCABULARY, rng.integers(1, 12)).tolist()
        requests[number] = (shared + own if number % 3 else own), int(rng.integers(1, 16))
    return requests


def under_pressure(requests, **options):
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size, max_running=6, watermark=0, **options)
    for number, (prompt, count) in requests.items():
        scheduler.add(number, prompt, count)
    return cache, scheduler


@pytest.mark.parametrize("run", [generate, generate_ahead])
@pytest.mark.parametrize("max_tokens", [7, 64])
def test_generation_under_pressure_equals_dense(max_tokens, run):
    model, requests = Model(), requests_that_share()
    cache, scheduler = under_pressure(requests, max_tokens=max_tokens)
    generated = run(model, cache, scheduler, requests)
    for number, (prompt, count) in requests.items():
        assert generated[number] == generate_dense(model, prompt, count), number
    stats = scheduler.stats()
    assert stats.preemptions > 0
    assert stats.hit_tokens > 0
    assert stats.evicted_blocks > 0
    assert stats.blocks_live == 0
    assert len({token for tokens in generated.values() for token in tokens}) > 10
    assert cache.pool.num_free + stats.blocks_cached == SIZES["num_blocks"]


def test_a_step_in_flight_that_is_retracted_aborted_or_past_the_end_changes_nothing():
    """Every third step fails on its way; requests end at a multiple of 5 or are aborted."""
    model, requests = Model(), requests_that_share()
    cache, scheduler = under_pressure(requests)
    generated = {number: [] for number in requests}
    running, sampled, unknown, ahead = set(requests), {}, 0, 0
    for turn in range(10_000):
        schedule = scheduler.schedule()
        before = scheduler.in_flight[0] if scheduler.in_flight else None
        if schedule.request_ids:
            sampled[schedule] = compute_lazily(model, cache, schedule, sampled.get(before))
            unknown += len(schedule.unknown)
            if turn % 3 == 0:
                scheduler.retract()
        if turn == 20:
            for number in (5, 6, 7):
                if number in running:
                    scheduler.abort(number)
                    running.remove(number)
        if not running:
            break
        if len(scheduler.in_flight) == 2 or (scheduler.in_flight and not schedule.request_ids):
            oldest = scheduler.in_flight[0]
            tokens = dict(zip(oldest.samples, sampled.pop(oldest).tolist(), strict=True))
            tokens = {number: tokens[number] for number in tokens if number in running}
            ahead += len(scheduler.in_flight) == 2
            running -= set(scheduler.update(tokens))
            for number, token in tokens.items():
                generated[number].append(token)
                if token % 5 == 0 and number in running:
                    scheduler.finish(number)
                    running.remove(number)
        scheduler.check_invariants()
    for number, (prompt, count) in requests.items():
        expected = generate_dense(model, prompt, count)
        ends = [at for at, token in enumerate(expected) if token % 5 == 0]
        expected = expected[: ends[0] + 1] if ends else expected
        if number in (5, 6, 7):
            expected = expected[: len(generated[number])]
        assert generated[number] == expected, number
    while scheduler.in_flight:
        scheduler.retract()
    assert (scheduler.stats().blocks_live, unknown > 10, ahead > 10) == (0, True, True)


def test_a_schedule_is_one_step_those_with_fewest_tokens_first():
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size, max_tokens=8)
    scheduler.add("a", [7], 3)
    scheduler.add("b", [1, 2, 3], 3)
    scheduler.add("c", range(10, 19), 3)
    first = cache.step(scheduler.schedule())
    assert first.request_ids == ["a", "b", "c"]
    assert first.tokens.tolist() == [[7], [1], [2], [3], [10], [11], [12], [13]]
    assert first.positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 3]
    assert first.sample_rows == [0, 3]
    scheduler.update({"a": 40, "b": 41})
    second = cache.step(scheduler.schedule())
    assert second.request_ids == ["a", "b", "c"]
    assert second.tokens.tolist() == [[40], [41], [14], [15], [16], [17], [18]]
    assert second.positions.tolist() == [1, 3, 4, 5, 6, 7, 8]
    assert second.sample_rows == [0, 1, 6]
    assert second.tokens.dtype == mx.int32
    assert second.batch.context_lens.tolist() == [2, 4, 9]
    assert second.slots.slots.tolist()[:2] == [1, 7]
    scheduler.update({"a": 42, "b": 43, "c": 44})
    third = cache.step(scheduler.schedule())
    assert (third.tokens.tolist(), third.sample_rows) == ([[42], [43], [44]], [0, 1, 2])


def test_sequences_with_as_many_tokens_lie_side_by_side():
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size)
    scheduler.add("a", [7, 8], 3)
    scheduler.add("b", [1, 2], 3)
    step = cache.step(scheduler.schedule())
    assert step.tokens.tolist() == [[7, 8], [1, 2]]
    assert (step.positions.tolist(), step.sample_rows) == ([0, 0], [0, 1])


def test_shared_blocks_are_copied_before_they_are_written():
    cache, model = new_cache(), Model()
    scheduler = Scheduler(cache.pool, cache.block_size)
    prompt = [3, 1, 4, 1, 5]
    scheduler.add("parent", prompt, 4)
    tokens = {"parent": [], "child": []}

    def run():
        schedule = scheduler.schedule()
        sampled = compute(model, cache, schedule)
        scheduler.update(sampled)
        for request_id, token in sampled.items():
            tokens[request_id].append(token)
        return schedule.copies

    run()
    scheduler.fork("parent", "child", 9)
    assert len(run()) == 2  # the step that both write in
    run()
    assert tokens["parent"] == generate_dense(model, prompt, 3)
    assert tokens["child"] == generate_dense(model, [*prompt, 9], 2)


def test_forks_go_on_with_a_step_in_flight():
    cache, model = new_cache(), Model()
    scheduler = Scheduler(cache.pool, cache.block_size)
    prompt = [3, 1, 4, 1, 5]
    scheduler.add("parent", prompt, 8)
    scheduler.update(compute(model, cache, scheduler.schedule()))
    scheduler.fork("parent", "child", 9)
    tokens = generate_ahead(model, cache, scheduler, ["parent", "child"])
    assert tokens["parent"] == generate_dense(model, prompt, 8)[1:]
    assert tokens["child"] == generate_dense(model, [*prompt, 9], 7)


def test_a_schedule_of_another_pool_is_refused():
    cache = new_cache()
    scheduler = Scheduler(BlockPool(16), 4)
    with pytest.raises(ValueError, match="a schedule of at least one request"):
        cache.step(scheduler.schedule())
    scheduler.add("a", [7], 3)
    with pytest.raises(ValueError, match="expected tables of this cache"):
        cache.step(scheduler.schedule())


@pytest.mark.parametrize("end", ["update", "retract"])
def test_steps_of_a_schedule_that_is_over_write_nothing(end):
    """Its slots may be somebody else's by then."""
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size)
    scheduler.add("a", [1, 2, 3], 3)
    schedule = scheduler.schedule()
    step = cache.step(schedule)
    with pytest.raises(PagedKVError, match="a new schedule, this one is stepped"):
        cache.step(schedule)
    scheduler.retract() if end == "retract" else scheduler.update({"a": 1})
    before = np.array(cache.keys[0])
    new = [mx.ones((1, heads, 3, HEAD_DIM)) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
    with pytest.raises(PagedKVError, match="the schedule of this one is over"):
        step.attend(0, *new, scale=1.0)
    with pytest.raises(PagedKVError, match="a new schedule, this one is over"):
        cache.step(schedule)
    assert np.array_equal(np.array(cache.keys[0]), before)


def test_tokens_that_only_the_device_knows_are_put_in_there():
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size, max_tokens=5)
    for name, prompt in (("a", [7]), ("b", [1, 2, 3]), ("c", [8, 9]), ("d", [4, 5, 6])):
        scheduler.add(name, prompt, 3)
    first = scheduler.schedule()
    assert first.samples == ["a", "b"]
    cache.step(first, mx.array(0.5))  # nothing is unknown yet
    scheduler.abort("a")
    second = scheduler.schedule()
    assert (second.request_ids, second.counts) == (["b", "c", "d"], [1, 1, 3])
    before = cache.memory_usage()
    for bad, message in [
        (None, "got None"),
        ([40, 41], r"got \[40, 41\]"),
        (mx.array([40, 41, 42]), r"got mlx.core.int32 of shape \(3,\)"),
        (mx.array([[40, 41]]), r"got mlx.core.int32 of shape \(1, 2\)"),
        (mx.array([40, 41], mx.int64), r"got mlx.core.int64 of shape \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=rf"as an int32 array of shape \(2,\), {message}"):
            cache.step(second, bad)
    assert (second.state, cache.memory_usage()) == ("new", before)
    step = cache.step(second, mx.array([40, 41]))
    assert step.request_ids == ["b", "c", "d"]
    assert step.tokens.tolist() == [[41], [9], [4], [5], [6]]
    assert step.tokens.dtype == mx.int32


@pytest.mark.own_process
def test_tokens_are_not_waited_for():
    """They cannot be computed, and nobody notices before they are looked at."""
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size)
    scheduler.add("a", [7], 3)
    cache.step(scheduler.schedule())
    singular = mx.linalg.inv(mx.zeros((1, 1)), stream=mx.cpu)
    step = cache.step(scheduler.schedule(), singular[0].astype(mx.int32))
    with pytest.raises(RuntimeError, match="LU factorization failed"):
        mx.eval(step.tokens)


def test_steps_are_made_of_a_schedule_before_the_next_is_chosen():
    """Its tables have room for the next one's tokens too afterwards."""
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size)
    scheduler.add("a", [7], 3)
    first, _ = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(PagedKVError, match="a new schedule, this one is late"):
        cache.step(first)
