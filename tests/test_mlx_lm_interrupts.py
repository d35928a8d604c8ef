"""A pass of a paged model that is interrupted leaves all of its tokens or none."""

import copy

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from interrupts import interrupted
from mlx_lm.models.cache import make_prompt_cache
from small_models import small_model

from pagedkv.mlx_lm import PagedStore


def test_the_next_pass_is_right():
    model = small_model("llama")
    own = make_prompt_cache(model)
    for tokens in ([1, 2, 3, 4, 5, 6, 7], [8]):
        expected = model(mx.array([tokens]), cache=own)[0, -1]
    with PagedStore(model, num_blocks=4096, block_size=4) as store:
        cache = store.cache()
        model(mx.array([[1, 2, 3, 4, 5, 6]]), cache=cache)
        passes = interrupted(
            lambda: copy.deepcopy(cache), lambda fork: model(mx.array([[7]]), cache=fork)
        )
        for fork, _ in passes:
            if fork[0].offset == 6:
                model(mx.array([[7]]), cache=fork)
            assert [layer.offset for layer in fork] == [7] * len(fork)
            found = model(mx.array([[8]]), cache=fork)[0, -1]
            assert mx.allclose(found, expected, atol=1e-4)
