"""A step is committed when every layer has K and V; slots and windows are the cache's own."""

import gc

import mlx.core as mx
import numpy as np
import pytest

from pagedkv import PagedKVCache, PagedKVError, Scheduler, ScoreOptions, SlotMapping

pytestmark = pytest.mark.usefixtures("storage")
SIZES = {"num_blocks": 16, "block_size": 4, "kv_heads": 1, "head_dim": 8, "dtype": mx.float32}


def cache_of(num_layers=3, **options):
    return PagedKVCache(num_layers=num_layers, **SIZES, **options)


def new(count=1, batch=1):
    return mx.random.normal((3, batch, 1, count, 8))


def attend(step, layer, count=1, **options):
    return step.attend(layer, *new(count), scale=1.0, **options)


def state(cache, table):
    pools = [np.array(pool) for pool in (*cache.keys, *cache.values)]
    return table.block_ids.tolist(), table.num_tokens, cache.pool.num_free, pools


@pytest.mark.parametrize("layers", [[], [0], [2], [0, 2]])
@pytest.mark.parametrize("write", [False, True])
def test_a_step_that_left_a_layer_out_is_not_committed(layers, write):
    cache = cache_of()
    table = cache.new_table()
    before = cache.pool.num_free
    step = cache.extend([table], [5])
    for layer in layers:
        if write:
            cache.write(layer, *new(5)[:2], step.slots)
        else:
            attend(step, layer, 5)
    missing = [layer for layer in range(3) if layer not in layers]
    with pytest.raises(PagedKVError) as refused:
        step.commit()
    assert str(refused.value) == (
        f"expected K and V in each of 3 layers before commit, got none in layers {missing}"
    )
    assert step.is_open
    assert table.num_tokens == 5
    for layer in missing:
        attend(step, layer, 5)
    step.commit()
    table.truncate(0)
    assert cache.pool.num_free == before


def test_it_can_be_rolled_back_and_a_with_statement_does_so():
    cache = cache_of()
    table = cache.new_table()
    for leave in (False, True):
        step = cache.extend([table], [5])
        attend(step, 0, 5)
        if leave:
            with pytest.raises(PagedKVError, match=r"layers \[1, 2\]"), step:
                pass
        else:
            with pytest.raises(PagedKVError, match=r"layers \[1, 2\]"):
                step.commit()
            step.rollback()
        assert (table.num_tokens, cache.pool.num_free) == (0, 16)
    cache.pool.check_invariants()


def test_uneven_steps_and_writes_in_parts_count():
    cache = cache_of(2)
    tables = [cache.new_table(), cache.new_table()]
    with cache.extend(tables, [1, 2]) as step:
        queries, keys, values = mx.random.normal((3, 3, 1, 1, 8))
        step.attend(0, queries, keys, values, scale=1.0)
        cache.write(1, keys, values, step.slots_of(1))
    assert [table.num_tokens for table in tables] == [1, 2]


def test_a_refused_call_does_not_count():
    cache = cache_of(1)
    step = cache.extend([cache.new_table()], [1])
    with pytest.raises(ValueError, match="expected"):
        attend(step, 0, 2)
    with pytest.raises(ValueError, match="expected"):
        cache.write(0, *new(2)[:2], step.slots)
    with pytest.raises(PagedKVError, match=r"layers \[0\]"):
        step.commit()


def test_a_layer_may_be_left_out_on_purpose():
    cache = cache_of(2)
    with cache.extend([cache.new_table()], [1]) as step:
        attend(step, 0)
        step.skip(np.int64(1))
        with pytest.raises(ValueError, match="a layer in"):
            step.skip(2)


class TestSlots:
    def test_of_another_cache_are_refused(self):
        cache, other = cache_of(1), cache_of(1)
        step = other.extend([other.new_table()], [2])
        table = cache.new_table()
        before = state(cache, table)
        with pytest.raises(ValueError, match="expected slots of this cache"):
            cache.write(0, *new(2)[:2], step.slots)
        assert all(
            np.array_equal(x, y) for x, y in zip(state(cache, table)[3], before[3], strict=True)
        )
        with pytest.raises(PagedKVError, match=r"layers \[0\]"):
            step.commit()

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    def test_of_a_step_that_is_over_are_refused(self, end):
        cache = cache_of(1)
        step = cache.extend([cache.new_table()], [2])
        slots = step.slots
        cache.write(0, *new(2)[:2], slots)
        getattr(step, end)()
        with pytest.raises(PagedKVError, match="expected a step under way"):
            cache.write(0, *new(2)[:2], slots)

    def test_of_a_step_that_was_dropped_are_refused(self):
        cache = cache_of(1)
        step = cache.extend([cache.new_table()], [2])
        slots = step.slots
        del step
        gc.collect()
        with pytest.raises(PagedKVError, match="this one was dropped"):
            cache.write(0, *new(2)[:2], slots)

    def test_of_a_schedule_that_is_over_are_refused(self):
        cache = cache_of(1)
        scheduler = Scheduler(cache.pool, cache.block_size)
        scheduler.add("a", [1, 2, 3], 4)
        schedule = scheduler.schedule()
        step = cache.step(schedule)
        cache.write(0, *new(3)[:2], step.slots)
        scheduler.update({"a": 5})
        with pytest.raises(PagedKVError, match="the schedule of this one is over"):
            cache.write(0, *new(3)[:2], step.slots)

    def test_from_slots_belong_to_no_step(self):
        cache = cache_of(1)
        slots = SlotMapping.from_slots([0, 1], block_size=4, num_blocks=16)
        cache.write(0, *new(2)[:2], slots)


class TestWindows:
    def outputs(self, told, **options):
        """Of a long decode in a layer with a window; the context that left it is garbage."""
        mx.random.seed(0)
        cache = cache_of(2, windows=[8, None])
        table, outs = cache.new_table(), []
        for _ in range(30):
            with cache.extend([table], [1]) as step:
                scores = ScoreOptions(window=8 if told else None, **options)
                outs.append(attend(step, 0, scores=scores))
                attend(step, 1)
        outs.append(cache.attend(0, new()[0], cache.batch([table]), scale=1.0, scores=scores))
        outs.append(step.attend_again(0, new()[0], scale=1.0, scores=scores))
        return np.array(mx.concatenate(outs))

    @pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": mx.array([0.5])}], ids=str)
    def test_need_not_be_told_twice(self, options):
        assert np.array_equal(self.outputs(False, **options), self.outputs(True, **options))

    @pytest.mark.parametrize("windows", [[8, None], [8, 8], [None, 8]])
    @pytest.mark.parametrize("window", [7, 9])
    def test_that_disagree_are_refused(self, windows, window):
        cache = cache_of(2, windows=windows)
        table = cache.new_table()
        scores = ScoreOptions(window=window)
        with cache.extend([table], [1]) as step:
            attend(step, 0)
            attend(step, 1)
        before = state(cache, table)
        step = cache.extend([table], [1])
        for layer in range(2):
            message = f"expected window={windows[layer]} in layer {layer}, as the cache was made"
            with pytest.raises(ValueError, match=message):
                attend(step, layer, scores=scores)
            with pytest.raises(ValueError, match=message):
                step.attend_again(layer, new()[0], scale=1.0, scores=scores)
            with pytest.raises(ValueError, match=message):
                cache.attend(layer, new()[0], cache.batch([table]), scale=1.0, scores=scores)
        step.rollback()
        after = state(cache, table)
        assert before[:3] == after[:3]
        assert all(np.array_equal(x, y) for x, y in zip(before[3], after[3], strict=True))

    def test_of_a_cache_that_knows_none_are_those_of_each_call(self):
        cache = cache_of(1)
        table = cache.new_table()
        for window in (None, 2, 3):
            with cache.extend([table], [1]) as step:
                attend(step, 0, scores=ScoreOptions(window=window))

    @pytest.mark.parametrize("layer", [2, -1, 0.5, "0"])
    def test_a_layer_that_is_not_there_is_refused(self, layer):
        cache = cache_of(2, windows=[8, None])
        step = cache.extend([cache.new_table()], [1])
        with pytest.raises(ValueError, match="expected a layer in"):
            attend(step, layer)


def test_sampled_tokens_may_be_what_argmax_returns():
    cache = cache_of(1)
    scheduler = Scheduler(cache.pool, cache.block_size)
    scheduler.add("a", [1, 2, 3], 4)
    scheduler.schedule()
    cache.step(scheduler.in_flight[0])
    ahead = scheduler.schedule()
    assert ahead.unknown
    logits = mx.zeros((1, 9)) + (mx.arange(9) == 7)
    for kind in (mx.int64, mx.float32, mx.int16):
        with pytest.raises(ValueError, match="uint32 or as an int32 array"):
            cache.step(ahead, mx.argmax(logits, axis=-1).astype(kind))
    sampled = mx.argmax(logits, axis=-1)
    assert sampled.dtype == mx.uint32
    step = cache.step(ahead, sampled)
    assert step.tokens.dtype == mx.int32
    assert step.tokens.tolist() == [[7]]
