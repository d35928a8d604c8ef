"""mlx-lm's models over pools of codes: a store that keeps K and V in few bits."""

import copy
import functools
import gc

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from launching import BACKEND
from mlx_lm.generate import (
    BatchGenerator,
    generate_step,
    speculative_generate_step,
)
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from small_models import small_model
from test_mlx_lm_scheduled import requests_that_share
from test_mlx_lm_store import bindings

from pagedkv import PagedKVError, Scheduler
from pagedkv.attention import codes
from pagedkv.errors import UnsupportedModelError
from pagedkv.mlx_lm import PagedStore, ScheduledModel

FORMATS = [8, 4, (8, 4)]
FAMILIES = ["llama", "gemma3_text", "gpt_oss"]  # plain, layers in groups, and with sinks besides
PROMPTS = [list(range(1, 40)), [5, 7, 11, 2, 3], [9]]
WHOLE = list(range(1, 41))  # ten blocks
ANSWER = [(17 * number + 5) % 97 for number in range(12)]  # past a window of 8
MOST = {8: 0.2, (8, 4): 0.6, 4: 0.9}  # that logits are off, of how far they lie apart
SIZE = 4

every_format = pytest.mark.parametrize("bits", FORMATS, ids=str)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_pair = pytest.mark.parametrize(
    ("family", "bits", "storage"),
    [
        (family, bits, "donated" if BACKEND == "cpu" and (i + j) % 2 else "in place")
        for i, family in enumerate(FAMILIES)
        for j, bits in enumerate(FORMATS)
    ],
    indirect=["storage"],
    ids=str,
)
every_storage = pytest.mark.usefixtures("storage")
model_of = functools.cache(small_model)


def store_of(model, bits, **options):
    return PagedStore(model, **{"num_blocks": 64, "block_size": SIZE, "kv_bits": bits, **options})


def coded(keys, values, bits):
    """What codes of K and of V stand for."""
    both = bits if isinstance(bits, tuple) else (bits, bits)
    found = []
    for rows, each, is_keys in zip((keys, values), both, (True, False), strict=True):
        rotate = is_keys and each == codes.ROTATED
        made = codes.encode(rows, each, rotate=rotate)
        found.append(codes.decode(*made, each, rows.dtype, rotate=rotate))
    return found


class Coded:
    """A cache of mlx-lm's own that keeps what codes stand for."""

    format = None

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*coded(keys, values, self.format))


class CodedKVCache(Coded, KVCache):
    pass


class CodedRotatingKVCache(Coded, RotatingKVCache):
    pass


def with_codes(caches, bits):
    """Have mlx-lm's own caches keep what codes stand for."""
    for cache in caches:
        cache.__class__ = {KVCache: CodedKVCache, RotatingKVCache: CodedRotatingKVCache}[
            type(cache)
        ]
        cache.format = bits
    return caches


def saying(answer):
    """A sampler that says an answer, whatever the logits are."""
    script = iter(answer)
    return lambda _: mx.array([next(script, 0)])


def logprobs(model, prompt, cache, answer=ANSWER):
    """Those that each token of an answer is drawn from; the prompt is computed in chunks of 7."""
    options = {"max_tokens": len(answer), "prefill_step_size": 7, "sampler": saying(answer)}
    return mx.stack(
        [x for _, x in generate_step(mx.array(prompt), model, prompt_cache=cache, **options)]
    )


@functools.cache
def right(family, number, bits=None):
    """Logprobs of a prompt's answer over mlx-lm's own caches, of numbers or of codes."""
    model = model_of(family)
    caches = make_prompt_cache(model)
    return logprobs(model, PROMPTS[number], with_codes(caches, bits) if bits else caches)


def off(found, expected):
    """How far logits are from others, of how far apart these are."""
    spread = expected - expected.mean(axis=-1, keepdims=True)
    return (mx.linalg.norm(found - expected) / mx.linalg.norm(spread)).item()


def check(found, exact, expected, bits):
    """Logits are those of codes, and not far from those of numbers."""
    lost = off(exact, expected)
    assert off(found, expected) < 0.25 * lost
    assert off(found, exact) < MOST[bits]


def kept(kv, blocks):
    """{(layer, place in the table): contents of a block}, of blocks that have not left a window."""
    found, keys, values = {}, kv.keys, kv.values
    for layer in range(kv.num_layers):
        ids = blocks[kv.group_of(layer)]
        held = [np.array(pools[layer][mx.array(np.maximum(ids, 0))]) for pools in (keys, values)]
        for place in np.flatnonzero(ids >= 0).tolist():
            found[layer, place] = [pool[place] for pool in held]
    return found


def same(found, expected):
    """Blocks are bit for bit the same wherever both have them; return how many."""
    both = found.keys() & expected.keys()
    for key in both:
        assert all(map(np.array_equal, found[key], expected[key])), key
        assert all(pool.any() for pool in found[key])
    return len(both)


def table_of(cache):
    [table] = cache.sequences.tables
    return table


def numbers(cache, count):
    """K and V that the last tokens stand for, by layer."""
    caches = [layer.unpaged() for layer in cache]
    return [np.array(x[..., -count:, :]) for each in caches for x in (each.keys, each.values)]


@every_pair
@every_storage
def test_single_sequences(family, bits):
    exact, expected = right(family, 0), right(family, 0, bits)
    model = model_of(family)
    with store_of(model, bits) as store:
        check(logprobs(model, PROMPTS[0], store.cache(PROMPTS[0])), exact, expected, bits)


@every_format
@every_family
def test_a_batch_of_ragged_prompts(family, bits):
    several = range(len(PROMPTS))
    exact, expected = ([right(family, n, each) for n in several] for each in (None, bits))
    model = model_of(family)
    with store_of(model, bits):
        generator = BatchGenerator(model, max_tokens=len(ANSWER), prefill_step_size=7)
        uids = generator.insert(PROMPTS, samplers=[saying(ANSWER) for _ in PROMPTS])
        found, most = {uid: [] for uid in uids}, 0
        while responses := generator.next_generated():
            most = max(most, len(responses))
            for response in responses:
                found[response.uid].append(response.logprobs)
        assert most == len(PROMPTS)
        for uid, *others in zip(uids, exact, expected, strict=True):
            check(mx.stack(found[uid]), *others, bits)


@every_pair
@every_storage
def test_a_cached_prefix_is_read_as_it_was_written(family, bits):
    prompts = [[*PROMPTS[0][:30], *more] for more in ((60, 61, 62), (70, 71))]
    model = model_of(family)
    exact = logprobs(model, prompts[1], make_prompt_cache(model))
    with store_of(model, bits) as store:
        first = store.cache(prompts[0])
        logprobs(model, prompts[0], first)
        ids, kv = table_of(first).blocks[:, :7], store.memory.kv
        written = kept(kv, ids)
        second = store.cache(prompts[1])
        assert second.cached == 28
        assert table_of(second).block_ids.tolist() == ids[0].tolist()
        found = logprobs(model, prompts[1], second)
        assert table_of(second).block_ids[:7].tolist() == ids[0].tolist()
        full = sum(window is None for window, _ in store.stats().groups)
        assert same(kept(kv, ids), written) >= 7 * full
    assert off(found, exact) < MOST[bits]


@every_storage
@every_format
def test_a_fork_and_what_is_trimmed_leave_the_others_codes(bits):
    model = model_of("gemma3_text")
    with store_of(model, bits) as store:
        cache, kv = store.cache(), store.memory.kv
        model(mx.array([PROMPTS[0]]), cache=cache)  # 39 tokens: three in the last block
        written, last = kept(kv, table_of(cache).blocks), numbers(cache, 7)
        fork = copy.deepcopy(cache)
        assert all(map(np.array_equal, numbers(fork, 7), last))
        model(mx.array([[50, 51]]), cache=fork)
        assert table_of(fork).block_ids[9] != table_of(cache).block_ids[9]  # it was copied
        assert same(kept(kv, table_of(cache).blocks), written) >= 10
        trim_prompt_cache(fork, 2)
        assert all(map(np.array_equal, numbers(fork, 7), last))
        trim_prompt_cache(fork, 5)
        model(mx.array([[52, 53, 54]]), cache=fork)
        assert same(kept(kv, table_of(cache).blocks), written) >= 10
        assert same(kept(kv, table_of(fork).blocks[:, :8]), written) >= 8


@every_storage
@every_format
def test_what_is_evicted_leaves_the_others_codes(bits):
    model, prompts = model_of("llama"), [[start, *range(40, 59)] for start in (1, 0)]
    with store_of(model, bits, num_blocks=22) as store:
        for prompt in prompts[::-1]:
            cache = store.cache(prompt)
            model(mx.array([prompt]), cache=cache)
            assert store.keep(cache, prompt) == 20
        kv, ids = store.memory.kv, table_of(cache).blocks
        written = kept(kv, ids)
        del cache
        live = store.cache([*prompts[0], 7])
        assert live.cached == 20
        other = store.cache()
        model(mx.array([list(range(60))]), cache=other)
        assert store.cache([*prompts[1], 7]).cached < 20  # some of it was evicted
        assert same(kept(kv, ids), written) == 3 * 5
        del other
        gc.collect()
        again = store.cache(prompts[1])
        model(mx.array([again.rest]), cache=again)
        store.keep(again, prompts[1])
        assert store.cache([*prompts[1], 7]).cached == 20
        assert same(kept(kv, ids), written) == 3 * 5


@every_storage
@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("gemma3_text", (8, 4))], ids=str)
def test_preemption_and_hits_leave_codes(family, bits):
    """Requests in too few blocks: for as long as somebody has a block, its codes are the same."""
    model, requests = model_of(family), requests_that_share()
    tokens = {number: [*prompt, *ANSWER[:most]] for number, (prompt, most) in requests.items()}
    exact, expected = [], []
    for number, (prompt, _) in requests.items():
        for each, outputs in ((None, exact), (bits, expected)):
            caches = make_prompt_cache(model)
            caches = with_codes(caches, each) if each else caches
            logits = model(mx.array([tokens[number]]), cache=caches)[0]
            outputs.append(logits[len(prompt) - 1 : -1])
    found, seen, compared = {number: [] for number in requests}, {}, 0
    with ScheduledModel(model, num_blocks=24, block_size=SIZE, kv_bits=bits) as scheduled:
        cache = scheduled.cache
        scheduler = Scheduler(cache.pool, SIZE, max_running=6, max_tokens=11, watermark=0)
        for number, (prompt, most) in requests.items():
            scheduler.add(number, prompt, most)
        while (schedule := scheduler.schedule()).request_ids:
            logits = scheduled.logits(schedule)
            mx.eval(logits)
            for number, table in zip(schedule.request_ids, schedule.tables, strict=True):
                whole = table.blocks[:, : table.num_tokens // SIZE]
                now = kept(cache, whole)
                for place, block in enumerate(whole[0].tolist()):
                    holds = tokens[number][: (place + 1) * SIZE]
                    codes_of = {key: words for key, words in now.items() if key[1] == place}
                    if seen.get(block, (0,))[0] == holds:
                        compared += same(codes_of, seen[block][1])
                    seen[block] = holds, codes_of
            sampled = {}
            for row, number in enumerate(schedule.samples):
                sampled[number] = ANSWER[len(found[number])]
                found[number].append(logits[row])
            scheduler.update(sampled)
            seen = {block: x for block, x in seen.items() if cache.pool.reference_count(block)}
        stats = scheduler.stats()
    assert stats.preemptions > 0
    assert stats.hit_tokens > 0
    assert compared > 500
    found = [mx.stack(found[number]) for number in requests]
    check(*(mx.concatenate(each) for each in (found, exact, expected)), bits)


def test_stores_of_different_bits_share_nothing(tmp_path):
    model, path = small_model("llama"), str(tmp_path / "cache.safetensors")
    other, prompt = copy.deepcopy(model), PROMPTS[0]
    expected = numbers_of_codes(model, prompt, 4)
    with store_of(model, 8) as store, store_of(other, 4) as second:
        cache = store.cache(prompt)
        logprobs(model, prompt, cache)
        assert store.cache(prompt).cached == 36
        assert second.cache(prompt).cached == 0
        with pytest.raises(PagedKVError, match="caches of one store"):
            second.cache()[0].extend(cache[0])
        with pytest.raises(ValueError, match="cache of this store"):
            second.keep(cache, prompt)
        own = second.cache()
        other(mx.array([prompt]), cache=own)
        for found, numbers_in_first_layer in zip(numbers(own, 39)[:2], expected, strict=True):
            assert np.allclose(found, numbers_in_first_layer, atol=1e-5)
        trim_prompt_cache(cache, table_of(cache).num_tokens - 39)
        save_prompt_cache(path, cache)
        loaded = second.load(path)
        assert second.stats().kv_bits == (4, 4)
        [keys], [words] = (
            {x.shape[-1] for x in kv.keys} for kv in (second.memory.kv, store.memory.kv)
        )
        assert (keys, words) == (16 * 4 // 32 + 1, 16 * 8 // 32 + 1)
        eight, four = numbers(cache, 39), numbers(loaded, 39)
        for k, v, *both in zip(eight[::2], eight[1::2], four[::2], four[1::2], strict=True):
            for x, found in zip(coded(mx.array(k), mx.array(v), 4), both, strict=True):
                assert np.array_equal(x, found)
    with store_of(model, (8, 4)) as store:
        assert store.cache(prompt).cached == 0


def numbers_of_codes(model, prompt, bits):
    """K and V of the first layer in codes."""
    own = make_prompt_cache(model)
    model(mx.array([prompt]), cache=own)
    return [np.array(x) for x in coded(*own[0].keys_and_values(), bits)]


@every_storage
@every_format
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_saved_cache_has_what_its_codes_stand_for(family, bits, tmp_path):
    model, path = model_of(family), str(tmp_path / "cache.safetensors")
    more = mx.array([[3, 4, 5]])
    with store_of(model, bits) as store:
        cache = store.cache()
        for start in range(0, 40, 10):
            model(mx.array([WHOLE[start : start + 10]]), cache=cache)
        save_prompt_cache(path, cache)
        kv, last = store.memory.kv, numbers(cache, 7)
        written = {  # where layers see a window, the file has that alone
            (layer, place): words
            for (layer, place), words in kept(kv, table_of(cache).blocks).items()
            if place == 9 or kv.groups.windows[kv.group_of(layer)] is None
        }
        expected = model(more, cache=cache)
    saved = load_prompt_cache(path)
    for layer, both in zip(saved, zip(last[::2], last[1::2], strict=True), strict=True):
        assert type(layer) in (KVCache, RotatingKVCache)
        for x, again, found in zip(
            (layer.keys, layer.values), coded(layer.keys, layer.values, bits), both, strict=True
        ):
            assert x.dtype == mx.float32
            assert np.array_equal(x[..., -7:, :], found)
            assert np.allclose(x, again, atol=1e-5)
    assert off(model(more, cache=with_codes(saved, bits)), expected) < 1e-3
    with store_of(model, bits) as store:
        loaded = store.load(path)
        assert same(kept(store.memory.kv, table_of(loaded).blocks), written) == len(written) >= 12
        assert off(model(more, cache=loaded), expected) < 1e-3
    with store_of(model, None) as store:
        loaded = store.load(path)
        assert all(map(np.array_equal, numbers(loaded, 7), last))


@every_format
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_file_of_mlx_lms_own_is_encoded(family, bits, tmp_path):
    model, path = model_of(family), str(tmp_path / "cache.safetensors")
    own = make_prompt_cache(model)
    for start in range(0, 40, 10):
        model(mx.array([WHOLE[start : start + 10]]), cache=own)
    save_prompt_cache(path, own)
    with store_of(model, bits) as store:
        found = iter(numbers(store.load(path), 7))
        for layer in load_prompt_cache(path):
            for x in coded(*layer.keys_and_values(), bits):
                assert np.array_equal(x[..., -7:, :], next(found))


@pytest.mark.parametrize("opens", [PagedStore, ScheduledModel])
@pytest.mark.parametrize("bits", [3, 16, 0, True, "8", 8.0, (8,), (8, 4, 4), (8, 3), ("8", 4)])
def test_other_bits_are_refused_before_anything_changed(opens, bits):
    model, before = model_of("llama"), bindings()
    for budget in ({"memory": "1MB"}, {"num_blocks": 4}):
        with pytest.raises(ValueError, match="kv_bits"):
            opens(model, **budget, kv_bits=bits)
    assert bindings() == before
    assert "make_cache" not in vars(model)


@pytest.mark.parametrize("opens", [PagedStore, ScheduledModel])
def test_head_dims_that_codes_do_not_fit_are_refused(opens):
    model, before = small_model("llama", head_dim=12), bindings()
    for bits in (8, (None, 4)):
        with pytest.raises(UnsupportedModelError, match=r"head dims of 8, .* 256, got"):
            opens(model, num_blocks=4, kv_bits=bits)
    assert bindings() == before
    opens(model, num_blocks=4, kv_bits=(None, None)).close()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
@pytest.mark.parametrize("bits", [*FORMATS, (None, 4), None], ids=str)
def test_a_budget_in_bytes_counts_codes(family, bits):
    with store_of(model_of(family), bits, num_blocks=None, memory="200KB") as store:
        stats, kv = store.stats(), store.memory.kv
        pools = {id(pool): pool for pool in (*kv.keys, *kv.values)}.values()
        held = sum(pool.nbytes for pool in pools)
        assert held == stats.num_blocks * stats.block_bytes
        assert 200_000 - stats.block_bytes * len(stats.groups) < held <= 200_000
        assert stats.kv_bits == (bits if isinstance(bits, tuple) else (bits, bits))
        if family == "llama":  # three layers of two heads of 16, a word beside the codes
            words = sum(16 if each is None else 16 * each // 32 + 1 for each in stats.kv_bits)
            assert stats.block_bytes == 3 * 2 * SIZE * words * 4
    with ScheduledModel(model_of(family), memory="200KB", block_size=SIZE, kv_bits=bits) as one:
        usage = one.cache.memory_usage()
        assert (usage.allocated_blocks, usage.block_bytes) == (stats.num_blocks, stats.block_bytes)


def test_mlx_lms_own_kv_bits_are_refused_with_the_stores_named():
    model, draft = model_of("llama"), small_model("llama", seed=1)
    prompt = mx.array([1, 2, 3])
    for bits in (8, None):
        with store_of(model, bits) as store, store_of(draft, bits) as drafts:
            for cache in (None, store.cache()):
                with pytest.raises(ValueError, match=r"kv_bits=None .* got 4: .*PagedStore"):
                    generate_step(prompt, model, kv_bits=4, prompt_cache=cache)
            with pytest.raises(ValueError, match=r"kv_bits=None, got 4: .*PagedStore"):
                store.cache()[0].to_quantized(bits=4)
            both = [*store.cache(), *drafts.cache()]
            options = {"prompt_cache": both, "kv_bits": 4, "quantized_kv_start": 0}
            steps = speculative_generate_step(prompt, model, draft, **options)
            with pytest.raises(ValueError, match=r"kv_bits=None, got 4: .*PagedStore"):
                next(steps)
            assert not any(hasattr(layer, "bits") for layer in store.cache())
