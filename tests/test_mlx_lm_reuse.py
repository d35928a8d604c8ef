"""Whole prompts with caches that hold their first part; batches that reuse and keep prefixes."""

import copy

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step
from mlx_lm.sample_utils import make_logits_processors
from small_models import small_model

from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.server import PromptCaches

SHARED = list(range(20, 50))  # seven blocks of four tokens, and two
PROMPTS = [[*SHARED, 60, 61, 62], [*SHARED, 70, 71]]
COUNT = 12


def answer(model, prompt, cache=None, count=COUNT, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


def run(generator, uids):
    """Run to the end; return the tokens of each sequence, and what its last response holds."""
    found, last = {uid: [] for uid in uids}, {}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
            last[response.uid] = response
    return [found[uid] for uid in uids], [last[uid] for uid in uids]


def answers(model, prompts, caches=None, **options):
    generator = BatchGenerator(model, max_tokens=COUNT, prefill_step_size=7)
    return run(generator, generator.insert(prompts, caches=caches, **options))[0]


class Tokenizer:
    """As much of a tokenizer as `batch_generate` needs; it never ends an answer."""

    eos_token_ids = ()

    @staticmethod
    def decode(tokens):
        return " ".join(map(str, tokens))


@pytest.fixture
def passes(model, monkeypatch):
    """A list that grows by the tokens of each pass of the model."""
    passes, own = [], type(model).__call__

    def noting(self, tokens, **options):
        passes.append(tokens.size)
        return own(self, tokens, **options)

    monkeypatch.setattr(type(model), "__call__", noting)
    return passes


@pytest.mark.parametrize("cut", [None, 5, 28, 30])
def test_a_batch_takes_whole_prompts_with_the_caches_made_for_them(model, passes, cut):
    """Also in segments, some of them cached whole."""
    expected = answers(model, PROMPTS)
    with PagedStore(model, num_blocks=128, block_size=4) as store:
        answer(model, [*SHARED, 1])
        caches = [store.cache(prompt) for prompt in PROMPTS]
        assert [cache.cached for cache in caches] == [28, 28]
        generator = BatchGenerator(model, max_tokens=COUNT)
        passes.clear()
        if cut is None:
            uids = generator.insert(PROMPTS, caches=caches)
        else:
            segments = [[prompt[:cut], prompt[cut:]] for prompt in PROMPTS]
            uids = generator.insert_segments(segments, caches=caches)
        found, last = run(generator, uids)
        assert found == expected
        # Tokens of the prompts but what was cached, then one more of each than is handed out.
        assert sum(passes) == 5 + 4 + 2 * COUNT
        assert [one.all_tokens for one in last] == [
            prompt + tokens for prompt, tokens in zip(PROMPTS, found, strict=True)
        ]
        assert [cache[0].offset for cache in caches] == [28, 28]


def test_a_batch_takes_the_rest_of_prompts_as_before(model):
    expected = answers(model, PROMPTS)
    with PagedStore(model, num_blocks=128, block_size=4) as store:
        answer(model, [*SHARED, 1])
        caches = [store.cache(prompt) for prompt in PROMPTS]
        assert answers(model, [cache.rest for cache in caches], caches) == expected
        known = [list(cache.tokens[: cache.cached]) for cache in caches]
        rest = [cache.rest for cache in caches]
        assert answers(model, rest, caches, all_tokens=known) == expected


def test_whole_prompts_are_counted_once(model):
    """33 tokens and 12 more fit into twelve blocks, with 28 of them in the cache."""
    with PagedStore(model, num_blocks=12, block_size=4) as store:
        answer(model, [*SHARED, 1], count=1)
        cache = store.cache(PROMPTS[0])
        assert len(answers(model, PROMPTS[:1], [cache])[0]) == COUNT


def test_processors_of_a_batch_see_the_tokens_that_were_cached(model):
    def penalty():
        return [make_logits_processors(repetition_penalty=1.8, repetition_context_size=100)]

    expected = answers(model, PROMPTS[:1], logits_processors=penalty())
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        answer(model, [*SHARED, 1])
        cache = store.cache(PROMPTS[0])
        assert answers(model, PROMPTS[:1], [cache], logits_processors=penalty()) == expected
        assert answers(model, PROMPTS[:1], logits_processors=penalty()) == expected


def generation(model, cache, prompt):
    return answer(model, prompt, cache)


def batch(model, cache, prompt):
    return answers(model, [prompt], [cache])[0]


both = pytest.mark.parametrize("ask", [generation, batch])


@both
def test_another_prompt_that_begins_with_what_is_held_is_refused(model, store, ask):
    """Whether it is whole or follows cannot be told, and the wrong guess would not be seen."""
    answer(model, [*SHARED, 1])
    cache = store.cache(PROMPTS[0])
    with pytest.raises(ValueError, match=r"what follows the 28 tokens .* store\.cache\(prompt\)"):
        ask(model, cache, PROMPTS[1])
    assert ask(model, cache, PROMPTS[0]) == ask(model, store.cache(), PROMPTS[0])


@both
@pytest.mark.parametrize("more", [[], [3, 4]])
def test_a_conversation_that_is_held_is_not_taken_once_more(model, store, ask, more):
    cache = store.cache(PROMPTS[0])
    said = answer(model, PROMPTS[0], cache)
    assert cache.held == PROMPTS[0] + said
    free = store.stats().free_blocks
    with pytest.raises(ValueError, match="what follows the 45 tokens that it holds"):
        ask(model, cache, PROMPTS[0] + said + more)
    assert (cache.held, store.stats().free_blocks) == (PROMPTS[0] + said, free)


@both
def test_what_follows_may_begin_as_the_cache_does(model, store, ask):
    cache = store.cache(PROMPTS[0])
    said = answer(model, PROMPTS[0], cache)
    follows = PROMPTS[0]  # the same question once more
    expected = answer(model, PROMPTS[0] + said + follows, store.cache())
    assert ask(model, cache, follows) == expected


@both
def test_tokens_that_repeat_are_what_follows_if_asked_for(model, store, ask):
    """A continuation may repeat the cached tokens, or be as long as the rest of the prompt."""
    prompt = [7] * 39
    answer(model, prompt[:9], count=1)
    cache = store.cache(prompt)
    assert len(cache.rest) > cache.cached > 0
    expected = answer(model, prompt, store.cache())
    assert ask(model, copy.deepcopy(cache), cache.rest) == expected
    forks = [copy.deepcopy(cache) for _ in range(2)]
    with pytest.raises(ValueError, match=r"cache\.appending\(\)"):
        ask(model, forks[0], prompt[:20])
    expected = answer(model, prompt[: cache.cached + 20], store.cache())
    assert ask(model, forks[0].appending(), prompt[:20]) == expected
    if ask is batch:
        known = [[*prompt[: cache.cached]]]
        assert answers(model, [prompt[:20]], [forks[1]], all_tokens=known) == [expected]


def test_the_servers_caches_of_repeating_tokens(model, store):
    """It hands out a fork and the rest, which here begins with all that the fork holds."""
    caches, prompt = PromptCaches(10), [7] * 8
    answer(model, prompt, cache := store.cache(prompt), count=0)
    assert cache.held == prompt
    caches.insert_cache("m", prompt, cache)
    nearest, rest = caches.fetch_nearest_cache("m", [7] * 20)
    assert rest == [7] * 12
    assert answer(model, rest, nearest) == answer(model, [7] * 20, store.cache())


def test_a_batch_reuses_and_keeps_as_a_generation_does(model, passes):
    expected = [answers(model, [prompt])[0] for prompt in PROMPTS]
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        assert answers(model, PROMPTS[:1]) == expected[:1]
        assert store.cache(PROMPTS[0] + expected[0] + [1]).cached == 44  # of 45
        before = store.stats()
        passes.clear()
        assert answers(model, PROMPTS[1:]) == expected[1:]
        assert sum(passes) == 4 + COUNT
        after = store.stats()
        assert after.asked_tokens - before.asked_tokens == 32
        assert after.cached_tokens - before.cached_tokens == 28
        assert after.free_blocks + after.cached_blocks == 64


def test_those_that_wait_find_what_those_before_them_kept(model, passes):
    expected = [answers(model, [prompt])[0] for prompt in PROMPTS]
    with PagedStore(model, num_blocks=64, block_size=4):
        generator = BatchGenerator(
            model, max_tokens=COUNT, completion_batch_size=1, prefill_batch_size=1
        )
        passes.clear()
        assert run(generator, generator.insert(PROMPTS))[0] == expected
        assert sum(passes) == 33 + COUNT + 4 + COUNT


def test_batch_generate_reuses_and_keeps(model, passes):
    expected = batch_generate(model, Tokenizer, PROMPTS, max_tokens=COUNT).texts
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        for _ in range(2):
            passes.clear()
            found = batch_generate(model, Tokenizer, PROMPTS, max_tokens=COUNT).texts
            assert found == expected
        assert sum(passes) == 1 + 4 + 2 * COUNT  # 32 tokens of the first are whole blocks
        stats = store.stats()
        assert stats.cached_tokens == 32 + 28
        assert stats.free_blocks + stats.cached_blocks == 64


def test_a_batch_keeps_in_the_namespaces_of_its_caches(model, store):
    cache = store.cache(PROMPTS[0], namespace="a")
    answers(model, PROMPTS[:1], [cache])
    assert store.cache(PROMPTS[0]).cached == 0
    assert store.cache(PROMPTS[0], namespace="a").cached == 32


def test_layers_that_are_not_paged_reuse_nothing(passes):
    hybrid = small_model("qwen3_next")
    expected = answers(hybrid, PROMPTS)
    with PagedStore(hybrid, num_blocks=64, block_size=4) as store:
        for _ in range(2):
            assert answers(hybrid, PROMPTS) == expected
        assert store.stats().cached_blocks == 0


def test_a_waiting_prefix_keeps_no_other_generator_from_its_blocks(model):
    others = list(range(60, 82))
    with PagedStore(model, num_blocks=16, block_size=4) as store:
        for prompt in (SHARED, others):
            answer(model, [*prompt, 1], count=1)
        waits, runs = BatchGenerator(model), BatchGenerator(model)
        waits.insert([[1] * 5, [*SHARED, 2, 3]], max_tokens=[4, 26])
        waits.insert([[1] * 5], max_tokens=[1])
        assert waits.next_generated()
        [uid] = runs.insert([[*others, 4]], max_tokens=[17])
        [tokens], _ = run(runs, [uid])
        assert len(tokens) == 17
        assert store.stats().free_blocks >= 0


def test_a_cache_taken_back_from_a_waiting_request_is_the_callers(model):
    """It was to look its prompt up; what the caller computes into it since stays."""

    def scenario():
        generator = BatchGenerator(model, max_tokens=6)
        [uid] = generator.insert([SHARED])
        cache, _ = generator.remove([uid], return_prompt_caches=True)[uid]
        before = answer(model, list(range(50, 70)), cache, count=4)
        return before, run(generator, generator.insert([[3, 4, 5]], caches=[cache]))[0]

    expected = scenario()
    with PagedStore(model, num_blocks=128, block_size=4):
        assert scenario() == expected


@pytest.mark.parametrize("wrong", [2**40, 1.5, "a"])
def test_a_prompt_that_is_not_of_tokens_is_refused_when_it_is_inserted(model, wrong):
    expected = answers(model, PROMPTS)
    with PagedStore(model, num_blocks=128, block_size=4):
        generator = BatchGenerator(model, max_tokens=COUNT, prefill_step_size=7)
        uids = generator.insert(PROMPTS)
        with pytest.raises((TypeError, ValueError), match=r"prompt|token"):
            generator.insert([[5, wrong, 6]])
        assert run(generator, uids)[0] == expected
