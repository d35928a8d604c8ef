"""What a prompt cache believes to hold after failures, trims, and passes of others."""

import copy
import gc

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from launching import BACKEND
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from small_models import small_model

from pagedkv import OutOfBlocksError, PagedKVError
from pagedkv.mlx_lm import PagedStore

PROMPT = list(range(1, 40))


def answer(model, prompt, cache=None, count=12, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


def test_logits_processors_see_the_tokens_that_were_cached(model):
    def processors():
        return make_logits_processors(repetition_penalty=1.8, repetition_context_size=100)

    expected = answer(model, PROMPT, logits_processors=processors())
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        for _ in range(2):
            assert answer(model, PROMPT, logits_processors=processors()) == expected
        assert store.stats().cached_tokens == 36


def passes_of(model, monkeypatch):
    """Return a list that grows by the tokens and the rows of logits of each pass of a model."""
    passes, own = [], type(model).__call__

    def noting(self, tokens, **options):
        logits = own(self, tokens, **options)
        passes.append((tokens.shape[1], logits.shape[1]))
        return logits

    monkeypatch.setattr(type(model), "__call__", noting)
    return passes


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("length", "chunks"),
    [(1, [1]), (2, [2]), (8, [8]), (9, [8, 1]), (17, [8, 8, 1]), (21, [8, 8, 5]), (24, [8, 8, 8])],
)
def test_a_prompts_last_token_comes_with_its_last_chunk(model, monkeypatch, length, chunks):
    """mlx-lm has a pass for it alone. The output layer sees one token all the same."""
    prompt = PROMPT[:length]
    *whole, last = chunks
    expected = answer(model, prompt, prefill_step_size=8)
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        passes = passes_of(model, monkeypatch)
        assert answer(model, prompt, store.cache(prompt), prefill_step_size=8) == expected
        assert passes[: len(chunks)] == [*((chunk, chunk) for chunk in whole), (last, 1)]
        assert all(new == (1, 1) for new in passes[len(chunks) :])
        cache = store.cache([*prompt, 90, 91])
        passes.clear()
        answer(model, [*prompt, 90, 91], cache, count=1, prefill_step_size=8)
        assert passes[0] == (length + 2 - cache.cached, 1)


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU computes both in one pass")
def test_a_cpu_computes_a_prompts_last_token_alone(model, monkeypatch):
    """So that the last layer's output for the tokens before it is never needed."""
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        passes = passes_of(model, monkeypatch)
        answer(model, PROMPT[:19], store.cache(PROMPT[:19]), count=1, prefill_step_size=8)
        assert [new for new, _ in passes][:4] == [8, 8, 2, 1]


@pytest.mark.usefixtures("joined")
def test_progress_is_of_tokens_that_are_in_the_cache(model):
    """mlx-lm reports 8, 16 and 18 of 19 before the last token: the last chunk comes with it."""
    prompt, seen = PROMPT[:19], []
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        cache = store.cache(prompt)

        def report(processed, total):
            assert total == 19
            seen.append((processed, cache[0].offset))

        expected = answer(model, prompt, count=6)
        found = answer(
            model, prompt, cache, 6, prefill_step_size=8, prompt_progress_callback=report
        )
        assert found == expected
        # The first pass after a prompt is under way when its last token is reported.
        assert seen == [(0, 0), (8, 8), (16, 16), (19, 20)]


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("after", [8, 16])
def test_a_generation_that_progress_ends_goes_on_where_it_said(model, after):
    def report(processed, total):
        if processed == after:
            raise RuntimeError("stop")

    prompt = PROMPT[:19]
    expected = answer(model, prompt)
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        cache = store.cache(prompt)
        with pytest.raises(RuntimeError, match="stop"):
            answer(model, prompt, cache, prefill_step_size=8, prompt_progress_callback=report)
        fork = copy.deepcopy(cache)
        assert answer(model, prompt[after:], cache) == expected
        assert answer(model, prompt[after:], fork) == expected


@pytest.mark.usefixtures("joined")
def test_a_prompt_that_failed_goes_on_where_it_was(model):
    expected = answer(model, PROMPT)

    def fails(*_):
        raise RuntimeError("callback")

    with PagedStore(model, num_blocks=64, block_size=4) as store:
        answer(model, PROMPT)
        cache = store.cache(PROMPT)
        with pytest.raises(RuntimeError, match="callback"):
            answer(model, PROMPT, cache, prompt_progress_callback=fails)
        assert cache[0].offset == cache.cached == 36
        assert answer(model, PROMPT, cache) == expected


@pytest.mark.parametrize("when", ["after", "between"])
def test_tokens_that_others_put_there_are_not_cached_under_our_names(model, when):
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        cache = store.cache(PROMPT)
        if when == "after":
            found = answer(model, PROMPT, cache)
            trim_prompt_cache(cache, 12)
            model(mx.array([[50] * 12]), cache=cache)
            answer(model, [3], cache, count=4)
            full = [*PROMPT, *found, 3, 5, 6, 7]
        else:
            steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prompt_cache=cache)
            found = [int(next(steps)[0]) for _ in range(6)]
            trim_prompt_cache(cache, 4)
            found += [int(token) for token, _ in steps]
            full = [*PROMPT, *found, 5, 6, 7]
        got = answer(model, full)
    assert got == answer(model, full)


def test_out_of_blocks_leaves_what_is_not_in_the_pools(monkeypatch):
    model = small_model("qwen3_next")
    own = make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=own)
    expected = model(mx.array([[3, 4, 5, 6, 7, 8]]), cache=own)
    with PagedStore(model, num_blocks=12, block_size=4) as store:
        cache, other = store.cache(), store.cache()
        model(mx.array([PROMPT]), cache=cache)
        model(mx.array([[1, 2, 3, 4]]), cache=other)
        model(mx.array([[1, 2, 3, 4]]), cache=other)
        with pytest.raises(OutOfBlocksError):
            model(mx.array([[3, 4, 5, 6, 7, 8]]), cache=cache)
        del other
        found = model(mx.array([[3, 4, 5, 6, 7, 8]]), cache=cache)
    assert mx.allclose(found, expected, atol=1e-3)


def test_a_copy_of_a_model_shares_its_store_and_outlives_it(model):
    expected = answer(model, PROMPT)
    store = PagedStore(model, num_blocks=64, block_size=4)
    other = copy.deepcopy(model)
    assert answer(other, PROMPT) == expected
    assert store.stats().asked_tokens == len(PROMPT)
    store.close()
    assert answer(other, PROMPT) == expected
    PagedStore(other, num_blocks=4).close()


def test_prefixes_of_old_weights_can_be_forgotten():
    model, other = small_model("llama"), small_model("llama", seed=5)
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        answer(model, PROMPT)
        model.update(other.parameters())
        store.forget()
        found = answer(model, PROMPT)
        assert store.stats().cached_tokens == 0
    assert found == answer(other, PROMPT)


def test_a_file_of_another_model_is_refused(model, store, tmp_path):
    path = str(tmp_path / "cache.safetensors")
    smaller = small_model("llama", head_dim=8)
    own = make_prompt_cache(smaller)
    smaller(mx.array([PROMPT]), cache=own)
    save_prompt_cache(path, own)
    with pytest.raises(ValueError, match=r"expected K and V .*\(2, 16, .* got .*\(2, 8, "):
        store.load(path)
    assert store.stats().free_blocks == 64


def test_a_file_with_other_caches_of_unpaged_layers_is_refused(tmp_path):
    path = str(tmp_path / "cache.safetensors")
    hybrid = small_model("qwen3_next")
    own = make_prompt_cache(hybrid)
    hybrid(mx.array([PROMPT]), cache=own)
    paged = next(cache for cache in own if isinstance(cache, KVCache))
    save_prompt_cache(path, [paged] * len(own))
    with PagedStore(hybrid, num_blocks=64, block_size=4) as store:
        with pytest.raises(ValueError, match="expected ArraysCache in layer 0, got KVCache"):
            store.load(path)
        assert store.stats().free_blocks == 64


def test_a_generation_that_the_collector_ends_is_kept_later(model, store):
    cache = store.cache(PROMPT)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prompt_cache=cache)
    next(steps)
    circle = [steps]
    circle.append(circle)
    before = store.memory.tree.num_blocks, store.memory.kv.pool.num_free
    del steps, circle
    gc.collect()
    assert (store.memory.tree.num_blocks, store.memory.kv.pool.num_free) == before
    assert store.stats().cached_blocks == 10  # 39 tokens of the prompt and one that was said
    assert len(cache.held) == 40


def test_a_cache_knows_what_it_holds_when_its_generation_has_ended(model, store):
    """mlx-lm's `stream_generate` lets go of the generator before its end."""
    cache = store.cache(PROMPT)
    steps = generate_step(mx.array(PROMPT), model, prompt_cache=cache)
    said = [int(next(steps)[0]) for _ in range(4)]
    assert cache.held is None  # under way
    del steps
    fork = copy.deepcopy(cache)
    assert cache.held == fork.held == PROMPT + said
    model(mx.array([[1]]), cache=cache)
    assert cache.held is None  # others computed with it
    assert fork.held == PROMPT + said


def test_caches_in_a_circle_are_found_when_blocks_are_needed(model):
    gc.collect()
    gc.disable()
    try:
        with PagedStore(model, num_blocks=10, block_size=4) as store:
            circle = [store.cache()]
            model(mx.array([PROMPT]), cache=circle[0])
            circle.append(circle)
            del circle
            cache = store.cache()
            model(mx.array([[1, 2]]), cache=cache)
            assert cache[0].offset == 2
    finally:
        gc.enable()


def test_a_generation_may_end_after_its_store(model):
    store = PagedStore(model, num_blocks=64, block_size=4)
    cache = store.cache(PROMPT)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prompt_cache=cache)
    next(steps)
    store.close()
    steps.close()
    with pytest.raises(PagedKVError, match="expected an open store"):
        cache[0].nbytes  # noqa: B018


def test_one_generation_at_a_time(model, store):
    cache = store.cache(PROMPT)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prompt_cache=cache)
    next(steps)
    with pytest.raises(PagedKVError, match="no other generation with this prompt cache"):
        answer(model, [1], cache)
    steps.close()
    answer(model, [1], cache)


class Tenant:
    """A namespace that is equal to itself alone."""


def test_namespaces(model, store):
    with pytest.raises(TypeError, match="unhashable"):
        store.cache(PROMPT, namespace=[1])
    tenant = Tenant()
    cache = store.cache(PROMPT, namespace=tenant)
    fork = copy.deepcopy(cache)
    assert fork.namespace is tenant
    answer(model, PROMPT, fork)
    assert store.cache(PROMPT, namespace=tenant).cached == 36


def test_keep_takes_integers_of_one_sequence(model, store):
    cache = store.cache()
    model(mx.array([PROMPT]), cache=cache)
    with pytest.raises(ValueError, match="tokens to hold integers"):
        store.keep(cache, [token + 0.5 for token in PROMPT])
    batch = store.cache()
    model(mx.array([PROMPT, PROMPT]), cache=batch)
    with pytest.raises(ValueError, match="cache of one sequence, got 2"):
        store.keep(batch, PROMPT)
    assert store.stats().cached_blocks == 0


def test_a_generator_in_a_cycle_that_was_collected_holds_nothing_of_others(model):
    """Its table has given its blocks back when it comes to end, and others may have them."""
    right = answer(model, PROMPT[::-1])
    with PagedStore(model, num_blocks=100, block_size=4) as store:
        other = store.cache()
        answer(model, PROMPT[:3], other)
        for _ in range(3):
            steps = generate_step(mx.array(PROMPT), model, max_tokens=8)
            next(steps)
            cycle = [steps]
            cycle.append(cycle)
            del steps, cycle
            gc.collect()
            copy.deepcopy(other)  # takes dropped blocks back
            assert answer(model, PROMPT[::-1]) == right
        del other
        gc.collect()
        stats = store.stats()
        assert stats.free_blocks + stats.cached_blocks == stats.num_blocks
