"""The suite's contiguous cache does what mlx-lm's does."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.caches import ContiguousLayer

HEADS, DIM = 2, 4
# Tokens to append, or how many to drop: about as often beyond the room of 256 as within.
CHANGES = st.lists(
    st.tuples(st.sampled_from(["append", "drop"]), st.integers(1, 600)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(CHANGES, st.integers(0, 2**32 - 1))
def test_the_contiguous_cache_is_mlx_lms(changes, seed):
    mlx_lm = pytest.importorskip("mlx_lm.models.cache")  # not on Python 3.10
    mx.random.seed(seed)
    ours, theirs = ContiguousLayer(), mlx_lm.KVCache()
    for change, count in changes:
        if change == "drop":
            ours.offset -= theirs.trim(count)
            continue
        keys, values = (mx.random.uniform(shape=(1, HEADS, count, DIM)) for _ in "kv")
        got, expected = (cache.update_and_fetch(keys, values) for cache in (ours, theirs))
        assert ours.offset == theirs.offset
        assert ours.keys.shape == theirs.keys.shape  # the capacity
        assert all(mx.array_equal(one, other) for one, other in zip(got, expected, strict=True))
        assert mx.array_equal(ours.keys, theirs.keys)
        assert mx.array_equal(ours.values, theirs.values)


def test_the_contiguous_cache_grows_by_256_tokens():
    cache = ContiguousLayer()
    for count, capacity in [(250, 256), (6, 256), (1, 512), (300, 769)]:
        token = mx.ones((1, HEADS, count, DIM))
        cache.update_and_fetch(token, token)
        assert cache.keys.shape[2] == cache.values.shape[2] == capacity
