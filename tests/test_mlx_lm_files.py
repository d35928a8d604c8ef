"""Caches of another model are refused, and so are files of one, or damaged ones."""

import copy
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from small_models import small_model

from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.files import fingerprint

TOKENS = list(range(30))


@pytest.fixture(scope="module")
def models():
    return small_model("llama", 0), small_model("llama", 9)


def store_of(model):
    return PagedStore(model, num_blocks=64, block_size=4)


def answer(model, **options):
    return [int(x) for x, _ in generate_step(mx.array(TOKENS), model, max_tokens=4, **options)]


def state(store):
    stats = store.stats()
    return stats.free_blocks, stats.cached_blocks


REFUSED = "expected a prompt cache of this model, got one of another model's store"


class Wrapper(nn.Module):
    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def __call__(self, *arguments, **options):
        return self.language_model(*arguments, **options)


class TestOtherModels:
    def test_a_cache_of_another_models_store_is_refused(self, models):
        first, second = models
        expected = answer(second)
        with store_of(first), store_of(second) as other:
            before = state(other)
            with pytest.raises(ValueError, match=REFUSED):
                answer(first, prompt_cache=other.cache(TOKENS))
            assert state(other) == before
            assert answer(second, prompt_cache=other.cache(TOKENS)) == expected

    @pytest.mark.parametrize("form", [list, lambda cache: cache])
    def test_so_it_is_where_the_model_has_no_store(self, models, form):
        first, second = models
        with store_of(second) as other, pytest.raises(ValueError, match=REFUSED):
            answer(first, prompt_cache=form(other.cache(TOKENS)))

    def test_in_a_batch(self, models):
        first, second = models
        with store_of(first), store_of(second) as other:
            generator = BatchGenerator(first, max_tokens=2)
            with pytest.raises(ValueError, match=REFUSED):
                generator.insert([[1, 2]], caches=[other.cache([1, 2])])
            assert not generator._unprocessed_sequences
            generator.close()

    def test_with_a_draft_model(self, models):
        first, second = models
        third = small_model("llama", 4)
        with store_of(first) as store, store_of(third) as other:
            for caches in (
                [*other.cache(), *make_prompt_cache(second)],
                [*store.cache(), *other.cache()],
            ):
                with pytest.raises(ValueError, match=REFUSED):
                    speculative_generate_step(
                        mx.array(TOKENS), first, second, prompt_cache=caches, max_tokens=2
                    )
            caches = [*store.cache(), *make_prompt_cache(second)]
            steps = speculative_generate_step(
                mx.array(TOKENS), first, second, prompt_cache=caches, max_tokens=2
            )
            assert len(list(steps)) == 2

    def test_copies_and_what_contains_the_model_are_taken(self, models):
        model, _ = models
        expected = answer(model)
        with store_of(model) as store:
            for same in (copy.deepcopy(model), Wrapper(model), Wrapper(model).__call__):
                assert answer(same, prompt_cache=store.cache(TOKENS)) == expected
                store.forget()


@pytest.fixture
def saved(models, tmp_path):
    """A file of the first model's cache, and what to call it by."""
    model, _ = models
    path = str(tmp_path / "cache.safetensors")
    with store_of(model) as store:
        cache = store.cache()
        model(mx.array([TOKENS]), cache=cache)
        save_prompt_cache(path, cache, {"mine": "kept"})
    return path


class TestWeights:
    def test_are_told_apart_by_names_shapes_dtypes_and_numbers(self, models):
        model, other = models
        own = fingerprint(model)
        assert own == fingerprint(copy.deepcopy(model)) == fingerprint(small_model("llama", 0))
        assert own != fingerprint(other)
        changed = copy.deepcopy(model)
        changed.set_dtype(mx.float16)
        assert fingerprint(changed) != own
        quantized = copy.deepcopy(model)
        nn.quantize(quantized, group_size=32)
        assert fingerprint(quantized) != own
        tuned = copy.deepcopy(model)
        weight = tuned.model.layers[1].self_attn.k_proj.weight
        tuned.model.layers[1].self_attn.k_proj.weight = weight * 1.01
        assert fingerprint(tuned) != own

    def test_of_another_model_with_the_same_shapes_are_refused(self, models, saved):
        first, second = models
        with store_of(second) as store:
            before = state(store)
            with pytest.raises(ValueError, match=r"expected a prompt cache of weights .* got one"):
                store.load(saved)
            assert state(store) == before
        with store_of(first) as store:
            assert store.load(saved)[0].offset == len(TOKENS)

    def test_of_a_file_that_does_not_say_are_not_looked_at(self, models, tmp_path):
        first, second = models
        own = make_prompt_cache(first)
        first(mx.array([TOKENS]), cache=own)
        path = str(tmp_path / "own.safetensors")
        save_prompt_cache(path, own)
        with store_of(second) as store:
            assert store.load(path)[0].offset == len(TOKENS)
            save_prompt_cache(path, own)  # while a store is open
            assert load_prompt_cache(path, return_metadata=True)[1] == {}


class TestDamage:
    def test_is_not_there_at_first(self, models, saved):
        caches, metadata = load_prompt_cache(saved, return_metadata=True)
        assert [cache.offset for cache in caches] == [len(TOKENS)] * 3
        assert metadata == {"mine": "kept"}
        assert fingerprint(models[0]).encode() in Path(saved).read_bytes()

    def test_of_any_byte_is_refused(self, models, saved):
        data = Path(saved).read_bytes()
        size = int.from_bytes(data[:8], "little")
        with store_of(models[0]) as store:
            before = state(store)
            for place in (*range(8 + size), *range(8 + size, len(data), 97)):
                changed = bytearray(data)
                changed[place] ^= 4
                Path(saved).write_bytes(changed)
                with pytest.raises(ValueError, match=r"expected .*got") as refused:
                    store.load(saved)
                assert saved in str(refused.value)
            assert state(store) == before
            Path(saved).write_bytes(data)
            assert store.load(saved)[0].offset == len(TOKENS)

    @pytest.mark.parametrize("kept", [0, 4, 100, 400, -100, -1])
    @pytest.mark.parametrize("is_own", [False, True])
    def test_of_a_file_that_was_cut_off_is_refused(self, models, saved, kept, is_own):
        model = models[0]
        if is_own:
            own = make_prompt_cache(model)
            model(mx.array([TOKENS]), cache=own)
            save_prompt_cache(saved, own)
        with open(saved, "r+b") as file:
            data = file.read()
            file.truncate(len(data[:kept]))
        with store_of(model) as store, pytest.raises(ValueError, match="expected a prompt cache"):
            store.load(saved)

    @pytest.mark.parametrize("name", ["none.safetensors", "none", "", "other.safetensors", "x.npz"])
    def test_of_what_is_no_such_file_has_a_reason(self, models, tmp_path, name):
        mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.ones(3)})
        path = str(tmp_path / name)
        with store_of(models[0]) as store, pytest.raises(ValueError, match="prompt cache in"):
            store.load(path)

    def test_of_shapes_and_offsets_is_refused(self, models, tmp_path):
        model, _ = models
        path = str(tmp_path / "own.safetensors")

        def keys(tokens=5, batch=1, heads=2, dim=16):
            return mx.zeros((batch, heads, tokens, dim))

        for new in (
            (keys(), keys(), 7),
            (keys(), keys(4), 5),
            (keys(), keys(), -1),
            (keys(batch=2), keys(batch=2), 5),
            (keys(heads=1), keys(heads=1), 5),
            (keys()[0], keys()[0], 5),
            (keys(dim=8), keys(dim=8), 5),
        ):
            caches = [KVCache() for _ in range(3)]
            for cache in caches:
                cache.keys, cache.values, cache.offset = new
            save_prompt_cache(path, caches)
            with store_of(model) as store:
                before = state(store)
                with pytest.raises(ValueError, match=r"expected .* got .* in "):
                    store.load(path)
                assert state(store) == before

    def test_what_mlx_lm_has_quantized_is_named(self, models, tmp_path):
        model = small_model("llama", head_dim=64)
        own = make_prompt_cache(model)
        model(mx.array([TOKENS]), cache=own)
        path = str(tmp_path / "own.safetensors")
        save_prompt_cache(path, [cache.to_quantized(bits=4) for cache in own])
        with store_of(model) as store, pytest.raises(ValueError, match="mlx-lm's kv_bits=4 in"):
            store.load(path)

    def test_saving_adds_the_files_ending_as_mlx_lm_does(self, models, tmp_path):
        model, _ = models
        with store_of(model) as store:
            cache = store.cache()
            model(mx.array([TOKENS]), cache=cache)
            save_prompt_cache(str(tmp_path / "x"), cache)
            assert store.load(str(tmp_path / "x.safetensors"))[0].offset == len(TOKENS)
