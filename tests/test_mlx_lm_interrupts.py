"""A pass of a paged model that is interrupted leaves all of its tokens or none.

What is interrupted otherwise is finished by the next call, and no block is lost.
"""

import copy
import gc

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from interrupts import interrupted
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as caches_module
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from small_models import small_model

from pagedkv import PagedKVError
from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.scheduled import ScheduledModel


@pytest.fixture(scope="module")
def model():
    """A model of two layers: a line is interrupted in each."""
    return small_model("llama", num_hidden_layers=2)


def test_the_next_pass_is_right(model):
    own = make_prompt_cache(model)
    for tokens in ([1, 2, 3, 4, 5, 6, 7], [8]):
        expected = model(mx.array([tokens]), cache=own)[0, -1]
    with PagedStore(model, num_blocks=64, block_size=4) as store:
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


def assert_nothing_is_lost(store):
    """Blocks are free or cached when no cache is left."""
    gc.collect()
    pool, cached = store.memory.kv.pool, store.stats().cached_blocks
    pool.check_invariants()
    store.memory.tree.check_invariants()
    assert sum(pool.reference_count(block) > 0 for block in range(pool.num_blocks)) == cached


def batch_of(model, store, *prompts):
    """Layers of a batch of prompts, as mlx-lm merges them."""
    caches = []
    for prompt in prompts:
        caches.append(store.cache())
        model(mx.array([prompt]), cache=caches[-1])
    return [type(layers[0]).merge(layers) for layers in zip(*caches, strict=True)]


PROMPTS = [1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]


def test_a_filter_is_done_or_not(model, store):
    def keep_two(layers):
        if len(layers[0].offset) == 3:
            for layer in layers:
                layer.filter(mx.array([0, 2]))

    for layers, done in interrupted(lambda: batch_of(model, store, *PROMPTS), keep_two):
        if not done:
            offsets = [layer.offset.tolist() for layer in layers]
            assert offsets in ([[5, 2, 9]] * 2, [[5, 9]] * 2)
            keep_two(layers)
        assert [layer.offset.tolist() for layer in layers] == [[5, 9]] * 2
        tables = layers[0].sequences.tables
        assert store.stats().free_blocks == 64 - sum(len(table.block_ids) for table in tables)
    del layers, tables
    assert_nothing_is_lost(store)


def test_an_extension_is_done_or_not(model, store):
    def start():
        return batch_of(model, store, *PROMPTS[:2]), batch_of(model, store, PROMPTS[2])

    def join(pair):
        layers, others = pair
        if len(layers[0].offset) == 2:
            for layer, other in zip(layers, others, strict=True):
                layer.extend(other)

    for (layers, others), done in interrupted(start, join):
        if not done:
            lengths = [layers[0].offset.tolist(), [*others[0].sequences.num_tokens(0)]]
            assert lengths in ([[5, 2], [9]], [[5, 2, 9], []])
            join((layers, others))
        assert layers[0].offset.tolist() == [5, 2, 9]
        assert others[0].sequences.tables == []
        assert layers[0].sequences.begins == [0, 0, 0]
        assert others[0].sequences.begins == []
    del layers, others
    assert_nothing_is_lost(store)


def test_a_trim_is_done_or_not(model, store):
    def trim(layers):
        if layers[0].offset.tolist() == [5, 2, 9]:
            for layer in layers:
                layer.trim(2)

    for layers, done in interrupted(lambda: batch_of(model, store, *PROMPTS), trim):
        if not done:
            assert [layer.offset.tolist() for layer in layers] in ([[5, 2, 9]] * 2, [[3, 0, 7]] * 2)
            trim(layers)
        assert [layer.offset.tolist() for layer in layers] == [[3, 0, 7]] * 2
        model(mx.array([[20], [21], [22]]), cache=layers)
        assert layers[0].offset.tolist() == [4, 1, 8]
    del layers
    assert_nothing_is_lost(store)


def test_padded_prompts_go_on_after_an_interrupt(model, store):
    """Whether a chunk of them was computed is known afterwards."""

    def start():
        layers = batch_of(model, store, *PROMPTS)
        for layer in layers:
            layer.prepare(lengths=[3, 4, 1], right_padding=[1, 0, 3])
        return layers

    def compute(layers):
        model(mx.array([[1, 2], [3, 4], [5, 0]]), cache=layers)

    for layers, _ in interrupted(start, compute, "mlx_lm/sequences.py", "cache/step.py"):
        if layers[0].sequences.num_tokens(0) == [5, 2, 9]:
            compute(layers)
        model(mx.array([[1, 0], [3, 4], [0, 0]]), cache=layers)
        assert layers[0].sequences.num_tokens(0) == [8, 6, 10]
        assert layers[0].offset.tolist() == [8, 6, 10]
    del layers
    assert_nothing_is_lost(store)


def test_a_collection_goes_on_where_it_was_interrupted(model, store):
    def start():
        cache = store.cache([1, 2, 3, 4, 5, 6, 7, 8])
        answer = generate_step(mx.array(cache.tokens), model, prompt_cache=cache)
        for _ in range(3):
            next(answer)
        answer.close()
        batch_of(model, store, *PROMPTS)  # and dropped

    for _, done in interrupted(start, lambda _: store.memory.collect()):
        if not done:
            store.memory.collect()
        assert not store.memory.endings
        assert store.cache([1, 2, 3, 4, 5, 6, 7, 8, 9]).cached == 8
        assert_nothing_is_lost(store)
        store.forget()


def test_an_ending_that_fails_is_not_tried_again(store):
    failing = [PagedKVError("expected a step under way")]

    def ending():
        raise failing[0]

    store.memory.endings.append(ending)
    with pytest.raises(PagedKVError):
        store.memory.collect()
    store.memory.collect()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_keeping_is_repeated(family):
    model = small_model(family)
    tokens = list(range(30))
    with PagedStore(model, num_blocks=64, block_size=4) as store:

        def start():
            store.forget()
            lead = store.cache()
            model(mx.array([tokens]), cache=lead)
            store.keep(lead, tokens)
            caches = [store.cache()]
            model(mx.array([tokens]), cache=caches[0])
            return caches

        for caches, done in interrupted(start, lambda caches: store.keep(caches[0], tokens)):
            if not done:
                store.keep(caches[0], tokens)
            caches.clear()
            assert_nothing_is_lost(store)
            assert store.cache([*tokens, 30]).cached == 28


def test_a_cache_is_not_busy_after_an_interrupted_generation(model, store):
    prompt = [1, 2, 3, 4, 5, 6]
    expected = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=3)]

    def generate(cache):
        return [
            int(token)
            for token, _ in generate_step(mx.array(prompt), model, max_tokens=3, prompt_cache=cache)
        ]

    def start():
        store.forget()
        return [store.cache(prompt)]

    for caches, _ in interrupted(
        start, lambda caches: generate(caches[0]), "mlx_lm/prompt_cache.py"
    ):
        caches[0][0].trim(caches[0][0].offset)
        assert generate(caches[0]) == expected
        caches.clear()
        assert_nothing_is_lost(store)


def test_loading_leaves_nothing_when_it_is_interrupted(model, store, tmp_path):
    cache = store.cache()
    model(mx.array([list(range(30))]), cache=cache)
    file_name = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file_name, cache)
    del cache
    loaded = []

    def start():
        loaded.clear()

    def load(_):
        loaded.append(store.load(file_name))

    for _, done in interrupted(start, load, "mlx_lm/store.py", "cache/step.py"):
        assert done == bool(loaded)
        if done:
            assert loaded[0][0].offset == 30
        loaded.clear()
        assert_nothing_is_lost(store)


@pytest.mark.parametrize("kind", [PagedStore, ScheduledModel])
def test_closing_is_repeated(kind):
    model = small_model("llama")
    own = caches_module.make_prompt_cache

    def close(opened):
        opened.close()

    def start():
        return kind(model, num_blocks=4, block_size=4)

    for opened, _ in interrupted(
        start, close, "mlx_lm/store.py", "mlx_lm/scheduled.py", "mlx_lm/memory.py"
    ):
        opened.close()
        assert "make_cache" not in vars(model)
        assert not hasattr(getattr(opened, "memory", opened), "kv")
        assert caches_module.make_prompt_cache is own
        assert "cache" not in vars(opened)
