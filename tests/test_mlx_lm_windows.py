"""Models whose layers are in groups: what leaves a window is given back, and nothing changes."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, speculative_generate_step
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from small_models import small_model
from test_mlx_lm_admission import run
from test_mlx_lm_tokens import COUNT, answer

from pagedkv import OutOfBlocksError
from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.layer import PagedLayer
from pagedkv.mlx_lm.server import PromptCaches

WINDOW, SIZE = 8, 4
FAMILIES = ["gemma3_text", "gpt_oss", "cohere2", "olmo3", "exaone4"]
LONG = list(range(1, 80))  # ten windows


def store_of(model, **options):
    return PagedStore(model, **{"num_blocks": 64, "block_size": SIZE, **options})


def logits(model, tokens, cache):
    """Logits of all tokens, in chunks of 7."""
    parts = [tokens[start : start + 7] for start in range(0, len(tokens), 7)]
    outputs = [model(mx.array([part]), cache=cache) for part in parts]
    return mx.concatenate(outputs, axis=1)


def close(out, right):
    return mx.abs(out - right).max().item() < 5e-4 * mx.abs(right).max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_in_groups_and_give_back(family):
    model = small_model(family)
    expected = logits(model, LONG, make_prompt_cache(model))
    with store_of(model) as store:
        pool = store.memory.kv.pool
        cache = store.cache()
        assert close(logits(model, LONG, cache), expected)
        [table] = cache.sequences.tables
        pool.drop_windows()
        for (window, held), ids in zip(store.stats().groups, table.blocks, strict=True):
            most = -(-(WINDOW + 16) // SIZE) + 1  # with what a draft model may have had wrong
            assert held == (ids >= 0).sum()
            assert held == len(ids) if window is None else held <= most


@pytest.mark.parametrize("family", FAMILIES)
def test_more_fits_than_in_one_table(family):
    """A budget of 40 blocks in all layers holds two sequences of 23 blocks."""
    model = small_model(family)
    expected = [answer(model, prompt) for prompt in (LONG, LONG[::-1])]
    with store_of(model, num_blocks=40) as store:
        caches = [store.cache(), store.cache()]
        assert answer(model, LONG, caches[0]) == expected[0]
        assert answer(model, LONG[::-1], caches[1]) == expected[1]
        assert sum(len(cache.sequences.tables[0].block_ids) for cache in caches) == 2 * 23


def batch(model, prompts, count):
    """Tokens of each prompt, and how many of these were computed at once at most."""
    generator = BatchGenerator(model, max_tokens=count, prefill_step_size=7, prefill_batch_size=1)
    uids = generator.insert(prompts)
    found, most = run(generator)
    return [found[uid] for uid in uids], most


def test_a_batch_is_admitted_by_what_its_sequences_will_hold():
    """35 blocks each where all is seen, 8 in each of two groups, 9 while a prompt is computed."""
    model = small_model("gemma3_text")
    prompts = [[*LONG, number] for number in range(90, 94)]
    expected, most = batch(model, prompts, 60)
    assert most == 4
    with store_of(model, num_blocks=52) as store:  # 156 in all groups: for 51 + 51 + 53
        assert batch(model, prompts, 60) == (expected, 3)
        assert store.stats().peak_blocks <= 156


def test_a_hit_needs_the_last_window_alone_and_is_shorter_without():
    model = small_model("gemma3_text")
    prompts = [[*LONG, 90], [*LONG, 91]]
    expected = [answer(model, prompt) for prompt in prompts]
    with store_of(model) as store:
        assert answer(model, prompts[0], store.cache(prompts[0])) == expected[0]
        assert store.cache(prompts[1]).cached == 76
        # Inside of a run, what left a window goes first: prompts have parted at its end.
        store.memory.collect()
        full, *others = store.memory.kv.pool.blocks_by_group
        assert store.memory.tree.evict(20) >= 20
        assert store.memory.kv.pool.blocks_by_group[0] == full
        assert sum(store.memory.kv.pool.blocks_by_group) < full + sum(others) / 2
        assert store.cache(prompts[1]).cached == 76
        assert answer(model, prompts[1], store.cache(prompts[1])) == expected[1]
        again = store.cache([*LONG[:50], 92])
        assert again.cached == 0
        assert answer(model, [*LONG[:50], 92], again) == answer(model, [*LONG[:50], 92])
        assert store.cache([*LONG[:50], 93]).cached == 48  # what it sees was computed again


@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_past_several_windows(family):
    model, draft = small_model(family), small_model("llama", seed=1)
    expected = answer(model, LONG)
    with store_of(model) as store, store_of(draft) as drafts:
        steps = speculative_generate_step(
            mx.array(LONG),
            model,
            draft,
            num_draft_tokens=8,
            max_tokens=COUNT,
            prompt_cache=[*store.cache(), *drafts.cache()],
        )
        assert [int(token) for token, *_ in steps] == expected


def test_more_than_the_margin_is_not_taken_back():
    model = small_model("gemma3_text")
    with store_of(model) as store:
        cache = store.cache()
        logits(model, LONG, cache)
        store.memory.kv.pool.drop_windows()
        before = [table.blocks.tolist() for table in cache.sequences.tables]
        with pytest.raises(ValueError, match="expected to trim 16 tokens at most, got 40"):
            trim_prompt_cache(cache, 40)
        assert [table.blocks.tolist() for table in cache.sequences.tables] == before
        assert trim_prompt_cache(cache, 16) == 16
        own = make_prompt_cache(model)
        expected = logits(model, [*LONG[:-16], 3, 4, 5], own)[:, -3:]
        assert close(logits(model, [3, 4, 5], cache), expected)


def test_a_servers_caches_are_trimmed_where_all_is_there():
    model = small_model("gemma3_text")
    expected = answer(model, [*LONG[:60], 95])
    for caches in (PromptCaches(), LRUPromptCache()):
        with store_of(model) as store:
            cache = store.cache()
            answer(model, LONG, cache)
            held = cache.sequences.tables[0].num_tokens
            caches.insert_cache("m", [*LONG, *range(held - len(LONG))], copy.copy(cache))
            store.memory.kv.pool.drop_windows()
            if isinstance(caches, PromptCaches):
                found, rest = caches.fetch_nearest_cache("m", [*LONG[:60], 95])
                assert (found, len(rest)) == (None, 61)
                assert answer(model, rest, store.cache()) == expected
            else:
                with pytest.raises(ValueError, match="expected to trim"):
                    caches.fetch_nearest_cache("m", [*LONG[:60], 95])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_cache_is_mlx_lms_own_and_loaded_again(family, tmp_path):
    model, path = small_model(family), str(tmp_path / "cache.safetensors")
    own = make_prompt_cache(model)
    logits(model, LONG, own)
    save_prompt_cache(str(tmp_path / "own.safetensors"), own)
    expected = logits(model, [3, 4, 5], own)
    with store_of(model) as store:
        cache = store.cache()
        logits(model, LONG, cache)
        save_prompt_cache(path, cache)
    saved = load_prompt_cache(path)
    assert {type(layer) for layer in saved} == {KVCache, RotatingKVCache}
    assert close(logits(model, [3, 4, 5], saved), expected)
    for file in (path, str(tmp_path / "own.safetensors")):
        with store_of(model) as store:
            loaded = store.load(file)
            assert close(logits(model, [3, 4, 5], loaded), expected)
            # It lacks what it would see then.
            with pytest.raises(ValueError, match="expected to trim"):
                trim_prompt_cache(loaded, 8)
            assert store.keep(loaded, [*LONG, 3, 4, 5]) == 0


def test_a_file_that_lacks_what_is_seen_is_refused(tmp_path):
    model, path = small_model("gemma3_text"), str(tmp_path / "short.safetensors")
    own = make_prompt_cache(model)
    logits(model, LONG, own)
    for layer in own:
        if isinstance(layer, RotatingKVCache):
            layer.keys, layer.values = (x[..., -4:, :] for x in (layer.keys, layer.values))
            layer._idx = 4
    save_prompt_cache(path, own)
    with store_of(model) as store:
        with pytest.raises(ValueError, match="expected all tokens in every layer"):
            store.load(path)
        assert store.stats().free_blocks == store.stats().num_blocks


def test_layers_of_other_shapes_stay_in_one_table():
    """Gemma 4's layers with a window have other heads than those without."""
    with store_of(small_model("gemma4_text")) as store:
        assert store.memory.kv.groups.windows == (None,)
        assert np.array_equal(store.stats().groups, [(None, 0)])


@pytest.mark.parametrize("count", [47, 48])
def test_what_a_saved_cache_may_lack_is_not_seen_when_it_is_loaded(count, tmp_path):
    """A file has a token more of a window than the next one sees: it may have left the store."""
    model, path = small_model("gemma3_text"), str(tmp_path / "cache.safetensors")
    with store_of(model) as store:
        cache = store.cache()
        logits(model, LONG[:count], cache)
        trim_prompt_cache(cache, 16)
        store.memory.kv.pool.drop_windows()
        logits(model, [5] * 100, store.cache())  # in the blocks of what has left
        save_prompt_cache(path, cache)
    own = make_prompt_cache(model)
    expected = logits(model, [*LONG[: count - 16], 3], own)[:, -1:]
    with store_of(model) as store:
        loaded = store.load(path)
        with pytest.raises(ValueError, match="expected to trim"):
            trim_prompt_cache(loaded, 1)
        assert close(logits(model, [3], loaded), expected)


def test_a_file_is_loaded_where_its_sequence_fits_when_it_is_computed(tmp_path):
    """Of 2,176 tokens, 68 blocks in three groups: all at once they would take 204 blocks."""
    model, path = small_model("gemma3_text"), str(tmp_path / "cache.safetensors")
    prompt = [*LONG] * 27 + LONG[:43]
    own = make_prompt_cache(model)
    for start in range(0, len(prompt), 512):
        model(mx.array([prompt[start : start + 512]]), cache=own)
    save_prompt_cache(path, own)
    expected = logits(model, [3, 4, 5], own)
    with store_of(model, num_blocks=67, block_size=32) as store:
        loaded = store.load(path)
        assert loaded.sequences.tables[0].num_tokens == len(prompt) == 2176
        assert close(logits(model, [3, 4, 5], loaded), expected)
    with store_of(model, num_blocks=24, block_size=32) as store:
        with pytest.raises(OutOfBlocksError):
            store.load(path)
        assert store.stats().free_blocks == store.stats().num_blocks


def test_what_a_loaded_cache_lacks_concerns_no_other_sequence_of_its_batch(tmp_path):
    model, path = small_model("gemma3_text"), str(tmp_path / "cache.safetensors")
    own = make_prompt_cache(model)
    logits(model, LONG, own)
    save_prompt_cache(path, own)
    with store_of(model) as store:
        loaded, other = store.load(path), store.cache()
        logits(model, LONG[:20], other)
        batch = [PagedLayer.merge(layers) for layers in zip(loaded, other, strict=True)]
        first, second = ([layer.extract(row) for layer in batch] for row in range(2))
        assert store.keep(first, LONG) == 0
        assert store.keep(second, LONG[:20]) == 20
        for layer in batch:
            layer.filter([1])
        assert trim_prompt_cache(batch, 20) == 20
