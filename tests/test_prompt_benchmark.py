"""What `benchmarks/prompt.py` measures is the same on both sides: tokens, logits, attention."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache, RotatingKVCache
from small_models import small_model

from benchmarks import cold, common, generate, prompt


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generate, "llama", lambda: small_model("llama"))
    monkeypatch.setattr(prompt, "gemma", lambda: small_model("gemma3_text"))


@pytest.fixture
def set_up():
    """Set up a benchmark; what it opens is closed at the end."""
    made = []

    def prepare(kind, *cell):
        made.append((kind(), cell))
        made[-1][0].setup(*cell)
        return made[-1][0]

    yield prepare
    for measured, cell in made:
        measured.teardown(*cell)


@pytest.fixture
def caches(monkeypatch):
    """The caches that a first token was asked for with."""
    found, first_token = [], prompt.first_token

    def seen(model, tokens, cache):
        found.append(cache)
        return first_token(model, tokens, cache)

    monkeypatch.setattr(prompt, "first_token", seen)
    return found


@pytest.mark.parametrize(
    ("kind", "own"), [(prompt.FirstToken, {KVCache}), (prompt.Windows, {KVCache, RotatingKVCache})]
)
def test_both_sides_say_the_same_first_token_of_an_uncached_prompt(kind, own, set_up, caches):
    measured = set_up(kind, 100)
    plain, paged = measured.ratio_speed(100)
    for _ in range(5):  # the store has room for two
        caches.clear()
        assert plain() == paged()
        measured.between()
        assert {type(layer) for layer in caches[0]} == own
        assert all(hasattr(layer, "sequences") for layer in caches[1])
    assert measured.store.stats().cached_tokens == 0
    assert measured.store.stats().asked_tokens == 5 * 100


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (prompt.FirstToken, (40,)),
        (prompt.Bits, (40,)),
        (prompt.Windows, (40,)),
        (prompt.Cached, (32, 5)),
    ],
)
def test_the_hosts_share_is_that_of_the_store(kind, cell, set_up, caches):
    measured = set_up(kind, *cell)
    caches.clear()
    assert 0 < measured.track_host_share(*cell) < 1.5
    assert len(caches) == 4
    assert all(hasattr(cache[0], "sequences") for cache in caches)


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (prompt.FirstToken, (40,)),
        (prompt.Cached, (32, 5)),
        (prompt.Chunk, ("9 after 40",)),
        (prompt.Attention, (64, 64)),
    ],
)
def test_all_streams_are_waited_for_between_calls(kind, cell, monkeypatch):
    measured, waited, wait = kind(), [], mx.synchronize
    measured.setup(*cell)
    monkeypatch.setattr(
        mx, "synchronize", lambda *streams: waited.append(streams) or wait(*streams)
    )
    measured.between()
    assert waited == [(), (generation_stream,)]


def test_different_prompts_have_different_first_tokens(set_up):
    """Else the tests here would see nothing."""
    measured = set_up(prompt.FirstToken, 100)
    before = measured.plain()
    measured.prompt = mx.roll(measured.prompt, 1)
    assert measured.plain() != before


def test_a_prompt_that_hits_is_noticed(set_up):
    measured = set_up(prompt.FirstToken, 100)
    measured.paged()
    measured.namespaces = iter([0])
    with pytest.raises(AssertionError):
        measured.paged()


def test_the_null_arm_is_mlx_lm_over_itself(set_up, caches):
    measured = set_up(prompt.FirstToken, 40)
    said = [call() for call in measured.ratio_null(40)]
    assert said[0] == said[1]
    assert [{type(layer) for layer in cache} for cache in caches] == [{KVCache}] * 2
    assert caches[0] is not caches[1]


def test_bits_are_those_of_the_store_alone(set_up, caches):
    measured = set_up(prompt.Bits, 40)
    assert measured.store.stats().kv_bits == (8, 8)
    measured.ratio_speed(40)[0]()
    assert {type(layer) for layer in caches[0]} == {KVCache}


def test_a_store_without_bits_is_not_applicable(monkeypatch):
    class Old:
        def __init__(self, model, *, num_blocks, block_size):
            raise AssertionError("expected to be looked at only")

    monkeypatch.setattr(generate.import_mlx_lm(), "PagedStore", Old)
    with pytest.raises(NotImplementedError, match="PagedStore has no kv_bits at this commit"):
        prompt.Bits().setup(40)


@pytest.mark.parametrize("new", [5, 40])
def test_only_what_is_new_is_computed_after_a_cached_prefix(new, set_up, monkeypatch):
    measured = set_up(prompt.Cached, 64, new)
    computed, call = [], type(measured.model).__call__

    def counted(self, tokens, *rest, **options):
        computed.append(tokens.size)
        return call(self, tokens, *rest, **options)

    monkeypatch.setattr(type(measured.model), "__call__", counted)
    paged, plain = measured.ratio_time(64, new)
    prompts = set()
    for _ in range(4):
        said, counts = [], []
        for side in (paged, plain):
            said.append(side())
            counts.append(sum(computed))
            computed.clear()
        assert said[0] == said[1]
        assert counts == [new + 1] * 2  # and the second token, which mlx-lm begins
        assert [layer.offset for layer in measured.own] == [64] * len(measured.own)
        prompts.add(tuple(measured.tokens[64:]))
        measured.between()
    assert len(prompts) == 4
    expected = generate.first_token(measured.model, measured.prompt, measured.store.own_caches())
    assert paged() == expected


def test_a_store_keeps_the_prefix_for_as_many_calls_as_asv_may_ask_for(set_up):
    measured = set_up(prompt.Cached, 32, 40)
    for _ in range(3 * measured.repeat[1]):
        measured.paged()
        measured.between()
    assert prompt.Cached.room > 3 * measured.repeat[1]


def test_a_prefix_that_is_gone_is_noticed(set_up):
    measured = set_up(prompt.Cached, 64, 5)
    measured.store.forget()
    with pytest.raises(AssertionError, match="expected 64 tokens cached, got 0"):
        measured.paged()


def test_a_chunk_has_the_same_logits_and_is_forgotten(set_up):
    measured = set_up(prompt.Chunk, "9 after 70")
    [paged] = {id(layer.sequences): layer.sequences for layer in measured.cache}.values()
    for _ in range(3):
        plain = measured.compute(measured.own)
        assert np.allclose(plain, measured.compute(measured.cache), 1e-3, 1e-3)
        assert {layer.offset for layer in measured.own} == {70}
        assert [table.num_tokens for table in paged.tables] == [70]
    for call, computed in zip(
        measured.ratio_speed("9 after 70"), (measured.own, measured.cache), strict=True
    ):
        asked = []
        measured.compute = asked.append
        call()
        assert asked[0] is computed


@pytest.mark.parametrize("kind", [prompt.Attention, prompt.AttentionBits])
def test_attention_over_blocks_is_that_over_contiguous_tokens(kind):
    measured = kind()
    measured.setup(64, 64)
    paged, contiguous = (call() for call in measured.ratio_time(64, 64))
    assert paged.shape == (1, common.QUERY_HEADS, 32, 64)
    assert mx.linalg.norm(paged - contiguous) < 0.1 * mx.linalg.norm(contiguous)
    assert mx.linalg.norm(paged) > 0
    one = measured.run(measured.contiguous_layer, 1)
    assert mx.linalg.norm(one - contiguous) > 0.1 * mx.linalg.norm(one)


@pytest.mark.parametrize("kind", [prompt.Attention, prompt.AttentionBits])
def test_attention_that_is_off_is_noticed(kind, monkeypatch):
    own = kind.contiguous_layer

    def off(self, layer, queries):
        return mx.roll(own(self, layer, queries), 1, axis=2)

    monkeypatch.setattr(kind, "contiguous_layer", off)
    with pytest.raises(AssertionError, match="off from SDPA"):
        kind().setup(64, 64)


@pytest.mark.parametrize("kind", [prompt.Attention, prompt.AttentionBits])
def test_blocks_lie_scattered(kind, monkeypatch):
    tables = []
    batch, made = common.pagedkv.PagedKVCache.batch, common.pagedkv.DecodeBatch.from_tables

    def batch_of(self, given):
        tables.append(given[0].block_ids)
        return batch(self, given)

    def from_tables(given, *rest, **options):
        tables.append(given[0])
        return made(given, *rest, **options)

    monkeypatch.setattr(common.pagedkv.PagedKVCache, "batch", batch_of)
    monkeypatch.setattr(common.pagedkv.DecodeBatch, "from_tables", from_tables)
    kind().setup(512, 64)
    assert np.abs(np.diff(tables[0])).mean() > 5


def test_peak_memory_is_of_each_side_alone(monkeypatch):
    measured = prompt.Memory()
    measured.setup(512)
    held = []

    def take(mebibytes):
        held.append(mx.zeros((mebibytes, 2**18)))
        mx.eval(held)
        held.clear()

    before = prompt.peak(lambda: take(1)) / 2**20 - 1
    monkeypatch.setattr(measured, "plain", lambda: take(100))
    monkeypatch.setattr(measured, "paged", lambda: take(50))
    assert measured.track_peak(512) == pytest.approx((before + 50) / (before + 100), rel=0.01)


def test_memory_is_measured_of_the_same_tokens(caches, monkeypatch):
    said, first_token = [], prompt.first_token
    monkeypatch.setattr(prompt, "first_token", lambda *given: said.append(first_token(*given)))
    measured = prompt.Memory()
    measured.setup(96)
    assert 0.5 < measured.track_peak(96) < 5
    assert said[0] == said[1]
    assert {type(layer) for layer in caches[0]} == {KVCache}
    [sequences] = {id(layer.sequences): layer.sequences for layer in caches[1]}.values()
    assert sequences.memory.peak == 4  # of 32 tokens: the prompt, and the token after it


def test_a_process_answers_the_same_over_both_sides():
    found = [cold.answers_of(side, 12, [5, 9], [3, 4]) for side in ("mlx-lm", "store")]
    plain, paged = (one["tokens"] for one in found)
    assert [len(tokens) for tokens in plain] == [1, 3, 4]
    assert plain == paged
    assert all(0 < one["first_token"] < one["answers"] for one in found)


def test_kernels_count_that_are_made_and_called(monkeypatch):
    called = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **named: lambda *given: called.append(named))
    counted = {}
    exec(cold.COUNTING, counted)
    first, second, _ = (mx.fast.cuda_kernel(name=name) for name in "abc")
    for kernel in (first, second, first):
        kernel(1)
    assert [named["name"] for named in called] == ["a", "b", "a"]
    assert len(counted["called"]) == 2


@pytest.mark.skipif(common.on_gpu(), reason="there is a GPU here")
def test_nothing_is_compiled_on_a_cpu():
    assert prompt.Cold().setup_cache() == {}
    with pytest.raises(NotImplementedError, match="measured on a GPU"):
        prompt.Cold().setup({}, "store")


@pytest.mark.skipif(common.on_gpu(), reason="a GPU computes them in seconds")
@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (prompt.FirstToken, (2048,)),
        (prompt.Chunk, ("9 after 8000",)),
        (prompt.Attention, (4096, 64)),
        (prompt.Cached, (448, 256)),
    ],
)
def test_long_prompts_are_not_applicable_on_a_cpu(kind, cell):
    with pytest.raises(NotImplementedError, match="take a CPU minutes") as error:
        kind().setup(*cell)
    assert error.value.why == "too slow"
