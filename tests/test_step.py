"""A step: one verb a layer, and how it ends."""

import mlx.core as mx
import numpy as np
import pytest
from reference import paged_attention as reference_attention
from test_kv_cache import cache, extend, state, stored, tokens

from pagedkv import PagedKVError, ScoreOptions

SCALE = 8**-0.5


def inputs(rng, batch, count):
    """Queries of 4 heads, K and V of 2, of as many tokens."""
    return [tokens(rng, batch, count, heads) for heads in (4, 2, 2)]


@pytest.mark.parametrize("count", [1, 3])
def test_attend_writes_and_attends_causally(count):
    rng = np.random.default_rng(31)
    paged = cache(num_blocks=12)
    tables = [paged.new_table() for _ in range(3)]
    extend(paged, rng, tables, [2, 5, 9])
    queries, keys, values = inputs(rng, 3, count)
    with paged.extend(tables, [count] * 3) as step:
        out = step.attend(1, queries, keys, values, scale=SCALE, scores=ScoreOptions(window=4))
    for b, table in enumerate(tables):
        for new, pool in zip((keys, values), stored(paged, table), strict=True):
            assert np.array_equal(np.array(new[b]).swapaxes(0, 1), pool[-count:])
    expected = reference_attention(
        queries,
        paged.keys[1],
        paged.values[1],
        [table.block_ids.tolist() for table in tables],
        [table.num_tokens for table in tables],
        SCALE,
        window=4,
    )
    assert np.allclose(np.array(out), expected, rtol=1e-4, atol=1e-6)


BAD = {
    "layer": ({"layer": 2}, r"layer in \[0, 2\), got 2"),
    "fractional layer": ({"layer": 0.5}, r"layer in \[0, 2\), got 0.5"),
    "queries of one token": (
        {"queries": mx.ones((2, 4, 1, 8))},
        r"queries of shape \[2, H, 3, D\], got \(2, 4, 1, 8\)",
    ),
    "sequences side by side": (
        {"keys": mx.ones((1, 2, 6, 8)), "values": mx.ones((1, 2, 6, 8))},
        r"keys of shape \[2, H, 3, D\], got \(1, 2, 6, 8\)",
    ),
    "query heads": ({"queries": mx.ones((2, 3, 3, 8))}, "multiple of 2 KV heads, got 3"),
    "values": ({"values": mx.ones((2, 2, 3, 4))}, "values of shape"),
    "dtype of keys": ({"keys": mx.ones((2, 2, 3, 8), mx.float16)}, "float32, got keys of .*16"),
    "dtype of queries": ({"queries": mx.ones((2, 4, 3, 8), mx.float16)}, "expected one dtype"),
    "scale": ({"scale": float("nan")}, "finite scale, got nan"),
    "path": ({"path": "gather"}, "path to be one of"),
    "path of another layout": ({"path": "gather_head_major"}, "head_major layout"),
    "sinks": ({"scores": ScoreOptions(sinks=mx.ones(3))}, r"sinks of shape \(4,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refused_layer_changes_nothing(name):
    changes, message = BAD[name]
    rng = np.random.default_rng(32)
    paged = cache()
    tables = [paged.new_table(), paged.new_table()]
    extend(paged, rng, tables, [1, 2])
    queries, keys, values = inputs(rng, 2, 3)
    good = {"layer": 1, "queries": queries, "keys": keys, "values": values, "scale": SCALE}
    with paged.extend(tables, [3, 3]) as step:
        before = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        with pytest.raises(ValueError, match=message):
            step.attend(**{**good, **changes})
        after = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
        step.attend(**good)


def test_sequences_with_different_counts_are_not_attended_together():
    rng = np.random.default_rng(33)
    paged = cache()
    with paged.extend([paged.new_table(), paged.new_table()], [3, 2]) as step:
        with pytest.raises(ValueError, match=r"as many new tokens of each .* counts \[2, 3\]"):
            step.attend(0, *inputs(rng, 2, 3), scale=SCALE)
        paged.write(0, tokens(rng, 1, 5), tokens(rng, 1, 5), step.slots)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_numpy_counts_and_layers(dtype):
    rng = np.random.default_rng(34)
    paged = cache()
    table = paged.new_table()
    with paged.extend([table], np.array([3], dtype)) as step:
        step.attend(dtype(1), *inputs(rng, 1, 3), scale=np.float32(SCALE))
    assert table.num_tokens == 3


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_step_without_a_with_statement(end):
    rng = np.random.default_rng(35)
    paged = cache()
    parent = paged.new_table()
    extend(paged, rng, [parent], [6])
    child = parent.fork()
    before = state(paged, [parent, child])
    step = paged.extend([child], [1])
    out = step.attend(0, *inputs(rng, 1, 1), scale=SCALE)
    getattr(step, end)()
    mx.eval(out)
    if end == "rollback":
        assert state(paged, [parent, child]) == before
    else:
        assert child.num_tokens == 7
        assert paged.pool.reference_count(1) == 1
    over = {"commit": "committed", "rollback": "rolled back"}[end]
    after = state(paged, [parent, child])
    for again in (
        step.commit,
        step.rollback,
        step.__enter__,
        lambda: step.attend(0, *inputs(rng, 1, 1), scale=SCALE),
    ):
        with pytest.raises(PagedKVError, match=f"expected a step under way, this one was {over}"):
            again()
    assert state(paged, [parent, child]) == after
    paged.pool.check_invariants()


def test_a_step_may_end_inside_its_with_statement():
    paged = cache()
    table = paged.new_table()
    with paged.extend([table], [3]) as step:
        step.commit()
    assert table.num_tokens == 3
    with paged.extend([table], [3]) as step:
        step.rollback()
    assert table.num_tokens == 3
