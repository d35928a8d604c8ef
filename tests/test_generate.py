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
    generate,
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


@pytest.mark.parametrize("max_tokens", [7, 64])
def test_generation_under_pressure_equals_dense(max_tokens):
    model = Model()
    rng = np.random.default_rng(22)
    shared = rng.integers(0, VOCABULARY, 14).tolist()
    requests = {}
    for number in range(14):
        own = rng.integers(0, VOCABULARY, rng.integers(1, 12)).tolist()
        requests[number] = (shared + own if number % 3 else own), int(rng.integers(1, 16))
    cache = new_cache()
    scheduler = Scheduler(
        cache.pool, cache.block_size, max_tokens=max_tokens, max_running=6, watermark=0
    )
    for number, (prompt, count) in requests.items():
        scheduler.add(number, prompt, count)
    generated = generate(model, cache, scheduler, requests)
    for number, (prompt, count) in requests.items():
        assert generated[number] == generate_dense(model, prompt, count), number
    stats = scheduler.stats()
    assert stats.preemptions > 0
    assert stats.hit_tokens > 0
    assert stats.evicted_blocks > 0
    assert stats.blocks_live == 0
    assert len({token for tokens in generated.values() for token in tokens}) > 10
    assert cache.pool.num_free + stats.blocks_cached == SIZES["num_blocks"]


def test_steps_are_the_sequences_that_compute_equally_many_tokens():
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size, max_tokens=8)
    scheduler.add("a", [7], 3)
    scheduler.add("b", [1, 2, 3], 3)
    scheduler.add("c", range(10, 19), 3)
    first = cache.steps(scheduler.schedule())
    assert [step.request_ids for step in first] == [["c"], ["b"], ["a"]]
    assert [step.tokens.tolist() for step in first] == [[[10, 11, 12, 13]], [[1, 2, 3]], [[7]]]
    assert [step.sample_rows for step in first] == [[], [0], [0]]
    scheduler.update({"a": 40, "b": 41})
    second = cache.steps(scheduler.schedule())
    assert [step.request_ids for step in second] == [["c"], ["a", "b"]]
    assert [step.tokens.tolist() for step in second] == [[[14, 15, 16, 17, 18]], [[40], [41]]]
    assert [step.sample_rows for step in second] == [[0], [0, 1]]
    assert all(step.tokens.dtype == mx.int32 for step in second)
    assert second[1].batch.context_lens.tolist() == [2, 4]
    assert second[1].slots.slots.tolist() == [1, 7]


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


def test_a_schedule_of_another_pool_is_refused():
    cache = new_cache()
    scheduler = Scheduler(BlockPool(16), 4)
    assert cache.steps(scheduler.schedule()) == []
    scheduler.add("a", [7], 3)
    with pytest.raises(ValueError, match="expected tables of this cache"):
        cache.steps(scheduler.schedule())


@pytest.mark.parametrize("end", ["update", "retract"])
def test_steps_of_a_schedule_that_is_over_write_nothing(end):
    """Its slots may be somebody else's by then."""
    cache = new_cache()
    scheduler = Scheduler(cache.pool, cache.block_size)
    scheduler.add("a", [1, 2, 3], 3)
    schedule = scheduler.schedule()
    [step] = cache.steps(schedule)
    with pytest.raises(PagedKVError, match="a new schedule, this one is stepped"):
        cache.steps(schedule)
    scheduler.retract() if end == "retract" else scheduler.update({"a": 1})
    before = np.array(cache.keys[0])
    new = [mx.ones((1, heads, 3, HEAD_DIM)) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
    with pytest.raises(PagedKVError, match="the schedule of this one is over"):
        step.attend(0, *new, scale=1.0)
    with pytest.raises(PagedKVError, match="a new schedule, this one is over"):
        cache.steps(schedule)
    assert np.array_equal(np.array(cache.keys[0]), before)
