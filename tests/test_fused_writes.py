import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from cases import OPTIONS, Case, poison, score_options
from launching import TUNING, WHOLE, assert_close, make_plan, on_a_cpu

from pagedkv import kernels


def take_new(case):
    """Return K and V of the query tokens, [B, Hkv, Q, D]; in the pools there is NaN instead."""
    block_size, query_len = case.block_size, case.queries.shape[2]
    slots = np.array(
        [
            [table[t // block_size] * block_size + t % block_size for t in range(n - query_len, n)]
            for table, n in zip(case.tables, case.lens, strict=True)
        ]
    )
    new = []
    for name in ("keys", "values"):
        pool = getattr(case, name)
        rows = pool.reshape(-1, *pool.shape[2:])
        new.append(mx.contiguous(rows[mx.array(slots)].swapaxes(1, 2)))
        rows[mx.array(slots.ravel())] = mx.array(math.nan, dtype=pool.dtype)
        setattr(case, name, rows.reshape(pool.shape))
    mx.eval(new, case.keys, case.values)
    return tuple(new)


def equal(one, other):
    return mx.array_equal(one, other, equal_nan=True).item()


WRITES = [
    # query tokens, head dim, heads, block size, dtype
    (1, 128, (8, 2), 32, mx.float16),
    (1, 64, (16, 1), 8, mx.bfloat16),
    (1, 80, (3, 3), 24, mx.float32),
    (3, 96, (6, 1), 16, mx.float16),  # three groups write the same tokens
    (8, 128, (2, 2), 8, mx.bfloat16),  # new tokens in several blocks and items
    (8, 256, (4, 1), 128, mx.float32),
]


@pytest.mark.parametrize("tuning", [TUNING, WHOLE], ids=["joined", "whole"])
@pytest.mark.parametrize(("query_len", "head_dim", "heads", "block_size", "dtype"), WRITES)
def test_new_tokens_are_written_and_attended_over(
    attend, query_len, head_dim, heads, block_size, dtype, tuning
):
    """Contexts that begin with the new tokens, end just after an item, or in the middle of it."""
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    case = Case([8, 33, 65, 100], query_len=query_len, **shape)
    poison(case)
    whole = mx.array(case.keys), mx.array(case.values)
    expected = case.expected()
    new = take_new(case)
    assert not equal(case.keys, whole[0])
    plan = make_plan(case, tuning)
    pools = case.keys, case.values
    out = plan.attend(case.queries, *pools, score_options({}), mx.zeros(8, dtype), new)
    mx.eval(out)
    case.keys, case.values = whole
    assert_close(out, case)
    assert np.array_equal(expected, case.expected())
    for pool, wanted in zip(pools, whole, strict=True):
        assert equal(pool, wanted)  # nothing else was written


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_attention_that_writes(attend, name):
    case = Case([9, 33, 100], heads=(8, 2), query_len=2)
    poison(case, OPTIONS[name].get("window"))
    whole = mx.array(case.keys), mx.array(case.values)
    new = take_new(case)
    scores = score_options(OPTIONS[name])
    plan = make_plan(case, **OPTIONS[name])
    out = plan.attend(case.queries, case.keys, case.values, scores, None, new)
    mx.eval(out)
    case.keys, case.values = whole
    assert_close(out, case, **OPTIONS[name])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("query_len", [1, 2])
def test_a_plan_goes_on_with_longer_contexts(attend, query_len, window):
    """Token by token with one cut of the work, until it is better to cut anew."""
    options = {} if window is None else {"window": window}
    lens = [9, 33, 64]
    more = Case([n + 64 for n in lens], heads=(8, 2), query_len=query_len)
    poison(more)
    more.lens = lens
    batch = more.batch()
    plan = make_plan(more, **options)
    steps = 0
    tables = mx.array(np.array([[*t, *t[:1] * (8 - len(t))] for t in more.tables], np.int32))
    while True:
        batch = replace(batch, block_tables=tables, lens=batch.lens + query_len)
        plan = plan.advanced(batch, query_len)
        if plan is None:
            break
        steps += query_len
        more.lens = [n + steps for n in lens]
        assert batch.lens.tolist() == more.lens
        if window is not None:  # others may have what left it while the plan went on
            firsts = [max(0, n - query_len + 1 - window) // more.block_size for n in more.lens]
            left = [b for ids, first in zip(more.tables, firsts, strict=True) for b in ids[:first]]
            more.keys[mx.array(left, mx.int32)] = mx.array(math.nan)
            more.values[mx.array(left, mx.int32)] = mx.array(math.nan)
        out = plan.attend(more.queries, more.keys, more.values, score_options(options))
        assert_close(out, more, **options)
    assert steps == {1: 16, 2: 8}[query_len]  # what a group of two warps reads in a trip


@on_a_cpu
def test_a_missing_barrier_after_writing_shows(attend, monkeypatch):
    source = kernels.source

    def without_barrier(body, *others):
        header, text = source(body, *others)
        return header, text.replace("pool_barrier();", ";")

    monkeypatch.setattr(kernels, "source", without_barrier)
    case = Case([5], heads=(4, 2))  # else they have met at another place before they read
    whole = mx.array(case.keys), mx.array(case.values)
    new = take_new(case)
    out = make_plan(case, WHOLE).attend(
        case.queries, case.keys, case.values, score_options({}), None, new
    )
    case.keys, case.values = whole
    with pytest.raises(AssertionError):
        assert_close(out, case)
