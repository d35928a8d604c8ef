"""mlx-lm's own generation over a paged store: the same tokens as over its own cache."""

import copy

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    LRUPromptCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from small_models import FAMILIES, small_model

from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.layer import PagedLayer

PROMPTS = [[5, 7, 11, 2, 3], list(range(1, 40)), [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
COUNT = 10  # tokens of an answer: past a window of 8 and two blocks of 4
_models = {}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return model_of(family)


def model_of(family):
    if family not in _models:
        _models[family] = small_model(family)
    return _models[family]


# The fewest layers and heads that a family's attention has.
LONG = {
    "llama": {"num_hidden_layers": 1},
    "gemma3_text": {"num_hidden_layers": 2, "sliding_window_pattern": 2},
    "gpt_oss": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


def store_of(model, **options):
    return PagedStore(model, **{"num_blocks": 128, "block_size": 4, **options})


def answer(model, prompt, cache=None, count=COUNT, **options):
    """Return generated tokens; prompts are computed in chunks of 7."""
    options = {"prefill_step_size": 7, **options}
    steps = generate_step(
        mx.array(prompt), model=model, max_tokens=count, prompt_cache=cache, **options
    )
    return [int(token) for token, _ in steps]


logprobs = []  # of each call of `answers`, by sequence


def answers(model, prompts, caches=None):
    generator = BatchGenerator(model, max_tokens=COUNT, prefill_step_size=7)
    uids = generator.insert(prompts, caches=caches)
    found = {uid: [] for uid in uids}
    sure = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
            sure[response.uid].append(response.logprobs)
    logprobs.append([mx.stack(sure[uid]) for uid in uids])
    return [found[uid] for uid in uids]


def computed(monkeypatch):
    """Return a list that grows by the tokens of each pass of the first layer."""
    passes = []
    update = PagedLayer.update_and_fetch

    def spy(self, keys, values):
        if self.layer == 0:
            passes.append(keys.shape[2])
        return update(self, keys, values)

    monkeypatch.setattr(PagedLayer, "update_and_fetch", spy)
    return passes


def test_logits(model):
    """Tokens alone say little of a model that is sure of itself."""
    prompt = PROMPTS[1]
    parts = [prompt[:9], prompt[9:30], prompt[30:], *([token] for token in range(50, 62))]
    own = make_prompt_cache(model)
    with store_of(model) as store:
        cache = store.cache()
        for part in parts:
            tokens = mx.array([part])
            expected, found = model(tokens, cache=own), model(tokens, cache=cache)
            assert mx.abs(found - expected).max() < 2e-4 * mx.abs(expected).max()


def test_single_sequences(model, monkeypatch):
    expected = [answer(model, prompt) for prompt in PROMPTS]
    passes = computed(monkeypatch)
    with store_of(model) as store:
        assert [answer(model, prompt, store.cache(prompt)) for prompt in PROMPTS] == expected
        # One pass for each token but the last, which nothing follows, and the prompt's own.
        assert sum(passes) >= sum(map(len, PROMPTS)) + len(PROMPTS) * (COUNT - 1) - 8


@pytest.mark.usefixtures("joined")
def test_prompts_that_end_about_a_blocks_end(model):
    """In one chunk, in chunks that end within a block, and in chunks that end with one."""
    for length, chunk in ((1, 100), (3, 100), (4, 100), (5, 100), (5, 3), (9, 4)):
        prompt, whole = list(range(40, 40 + length)), (length - 1) // 4 * 4
        expected = answer(model, prompt, count=3, prefill_step_size=100)
        with store_of(model) as store:
            for cached in (0, whole if store.memory.is_whole else 0):
                cache = store.cache(prompt)
                assert cache.cached == cached
                assert answer(model, prompt, cache, 3, prefill_step_size=chunk) == expected


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("family", LONG)
@pytest.mark.parametrize("length", [2047, 2048, 2049])
def test_prompts_that_end_about_a_chunks_end(family, length):
    model = small_model(family, num_attention_heads=2, num_key_value_heads=1, **LONG[family])
    prompt = np.random.default_rng(length).integers(0, 97, length).tolist()
    expected = answer(model, prompt, count=3, prefill_step_size=2048)
    with store_of(model, num_blocks=80, block_size=32) as store:
        for _ in "uncached", "cached":
            assert answer(model, prompt, store.cache(prompt), 3, prefill_step_size=2048) == expected
        assert store.stats().cached_tokens == (length - 1) // 32 * 32


def test_a_batch_of_ragged_prompts(model, monkeypatch):
    expected = answers(model, PROMPTS)
    passes = computed(monkeypatch)
    with store_of(model) as store:
        assert answers(model, PROMPTS) == expected
        for own, paged in zip(*logprobs[-2:], strict=True):
            assert mx.abs(own - paged).max() < 5e-4 * mx.abs(own).max()
        assert len(passes) >= COUNT
        store.forget()
        assert store.stats().free_blocks == store.stats().num_blocks
        # Prompts of 5, 39, 1 and 11 tokens and 24 more of each.
        blocks = sum(-(-(len(p) + COUNT) // 4) for p in PROMPTS)
        assert store.stats().peak_blocks <= blocks * len(store.stats().groups)


def test_a_chat_that_goes_on_and_one_that_forks(model):
    turns = [[5, 7, 11, 2, 3], [17, 18], [19]]
    with store_of(model) as store:
        cache = store.cache(turns[0])
        first = answer(model, turns[0], cache)
        fork = copy.deepcopy(cache)
        rest = [answer(model, turn, cache) for turn in turns[1:]]
        forked = [answer(model, turn, fork) for turn in turns[1:]]
    assert forked == rest
    plain = make_prompt_cache(model)
    assert [answer(model, turn, plain) for turn in turns] == [first, *rest]


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt_oss", "cohere2", "olmo3", "exaone4"], indirect=True
)
def test_a_cached_prefix_is_not_computed_again(model, monkeypatch):
    shared = list(range(20, 50))
    prompts = [[*shared, 60, 61, 62], [*shared, 70, 71]]
    expected = [answer(model, prompt) for prompt in prompts]
    passes = computed(monkeypatch)
    with store_of(model) as store:
        assert answer(model, prompts[0], store.cache(prompts[0])) == expected[0]
        passes.clear()
        cache = store.cache(prompts[1])
        assert cache.cached == 28
        assert cache.rest == [48, 49, 70, 71]
        assert answer(model, prompts[1], cache) == expected[1]
        assert sum(passes) == 4 + COUNT  # mlx-lm computes one step ahead
        passes.clear()
        cache = store.cache(prompts[1], namespace="another tenant")
        assert cache.cached == 0
        again = store.cache(prompts[1])
        assert answer(model, again.rest, again) == expected[1]
        assert sum(passes) == 4 + COUNT  # of its last block a token has to be computed
        assert store.stats().cached_tokens == 28 + 28


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"], indirect=True)
def test_speculation_takes_tokens_back(model):
    draft = small_model("llama", seed=1)
    [prompt] = [list(range(1, 30))]
    expected = answer(model, prompt)
    with store_of(model) as store, store_of(draft) as drafts:
        steps = speculative_generate_step(
            mx.array(prompt),
            model,
            draft,
            max_tokens=COUNT,
            prompt_cache=[*store.cache(), *drafts.cache()],
        )
        assert [int(token) for token, *_ in steps] == expected


def test_trim_returns_to_an_earlier_state():
    model = model_of("llama")
    with store_of(model) as store:
        cache = store.cache()
        model(mx.array([PROMPTS[1]]), cache=cache)
        before = model(mx.array([[3, 4]]), cache=cache)
        assert cache[1].offset == 41
        assert trim_prompt_cache(cache, 2) == 2
        assert [layer.offset for layer in cache] == [39, 39, 39]
        assert mx.allclose(model(mx.array([[3, 4]]), cache=cache), before, atol=1e-4)
        assert trim_prompt_cache(cache, 100) == 41
        assert cache[0].empty()


def test_mlx_lms_own_prefix_cache_keeps_forks():
    model = model_of("qwen3")
    shared = list(range(20, 45))
    expected = [answer(model, [*shared, 60]), answer(model, [*shared, 70])]
    with store_of(model) as store:
        lru = LRUPromptCache(max_size=2)
        cache = store.cache()
        assert answer(model, [*shared, 60], cache) == expected[0]
        lru.insert_cache("m", [*shared, 60, *expected[0]], cache)
        nearest, rest = lru.fetch_nearest_cache("m", [*shared, 70])
        assert rest == [70]
        held = store.stats().free_blocks
        assert answer(model, rest, nearest) == expected[1]
        assert held - store.stats().free_blocks <= -(-(1 + COUNT) // 4) + 1
        del lru, cache, nearest
        assert store.stats().free_blocks + store.stats().cached_blocks == 128


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"], indirect=True)
def test_a_saved_cache_is_loaded_by_another_store_and_by_mlx_lm(model, family, tmp_path):
    path = str(tmp_path / "cache.safetensors")
    prompt, more = list(range(1, 20)), [30, 31, 32]
    with store_of(model) as store:
        cache = store.cache(prompt)
        model(mx.array([prompt]), cache=cache)
        save_prompt_cache(path, cache, {"model": family})
        expected = answer(model, more, cache)
    with store_of(model, block_size=8) as store:
        loaded = store.load(path)
        assert next(x.offset for x in loaded if isinstance(x, PagedLayer)) == 19
        assert answer(model, more, loaded) == expected
    loaded, metadata = load_prompt_cache(path, return_metadata=True)
    assert metadata == {"model": family}
    assert answer(model, more, loaded) == expected
    # Two heads of 16, K and V, float32, 19 tokens; not the pools.
    if family == "llama":
        assert (tmp_path / "cache.safetensors").stat().st_size < 3 * 2 * 2 * 16 * 4 * 19 + 2000


def test_caches_of_a_batch_are_made_before_and_stay_as_they_are():
    model = model_of("llama")
    expected = answers(model, PROMPTS)
    with store_of(model) as store:
        caches = [store.cache() for _ in PROMPTS]
        for cache, prompt in zip(caches, PROMPTS, strict=True):
            if prompt[:-1]:
                model(mx.array([prompt[:-1]]), cache=cache)
        assert answers(model, [prompt[-1:] for prompt in PROMPTS], caches) == expected
        assert [cache[0].offset for cache in caches] == [len(p) - 1 for p in PROMPTS]
        del cache
        caches.clear()
        store.forget()
        assert store.stats().free_blocks == store.stats().num_blocks
