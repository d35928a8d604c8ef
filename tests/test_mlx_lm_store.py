"""The store itself: what it refuses, what it undoes, what a failure leaves."""

import copy
import gc
import importlib
import sys
import weakref
from contextlib import nullcontext
from importlib import metadata

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import base
from mlx_lm.models import cache as caches
from small_models import small_model

import pagedkv.mlx_lm
from pagedkv import OutOfBlocksError, PagedKVError
from pagedkv.errors import UnsupportedModelError
from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.layer import PagedLayer
from pagedkv.mlx_lm.sequences import Sequences
from pagedkv.mlx_lm.store import parse_bytes

ROUTED = {
    "scaled_dot_product_attention": base,
    "generate_step": sys.modules["mlx_lm.generate"],
    "make_prompt_cache": caches,
    "save_prompt_cache": caches,
}


@pytest.fixture
def store(model):
    with PagedStore(model, num_blocks=16, block_size=4) as store:
        yield store


def bindings():
    """What every module of mlx-lm has under the names that are routed."""
    return {
        (module.__name__, name): module.__dict__[name]
        for module in list(sys.modules.values())
        for name in ROUTED
        if getattr(module, "__name__", "").startswith("mlx_lm.") and name in vars(module)
    } | {name: vars(BatchGenerator)[name] for name in ("insert_segments", "_make_batch", "_next")}


def test_close_leaves_mlx_lm_as_it_was():
    model = small_model("qwen3")
    before = bindings()
    assert ("mlx_lm.models.qwen3", "scaled_dot_product_attention") in before
    store = PagedStore(model, num_blocks=4)
    assert all(bindings()[place] is not own for place, own in before.items())
    assert isinstance(caches.make_prompt_cache(model)[0], PagedLayer)
    store.close()
    store.close()
    assert bindings() == before
    assert type(caches.make_prompt_cache(model)[0]) is caches.KVCache


def test_a_store_that_nobody_closed_is_undone_with_its_model():
    model = small_model("qwen3")
    before = bindings()
    PagedStore(model, num_blocks=4)
    assert isinstance(model.make_cache()[0], PagedLayer)  # the model keeps it
    gc.collect()
    assert bindings() != before
    del model
    gc.collect()
    assert bindings() == before


def test_close_gives_back_a_models_own_make_cache():
    model = small_model("gemma3_text")
    with PagedStore(model, num_blocks=4):
        assert isinstance(model.make_cache()[0], PagedLayer)
    assert "make_cache" not in vars(model)
    assert type(model.make_cache()[0]) is caches.RotatingKVCache


def test_a_model_loaded_while_a_store_is_open_is_routed_and_undone(store):
    sys.modules.pop("mlx_lm.models.mimo", None)
    module = importlib.import_module("mlx_lm.models.mimo")
    own = base.scaled_dot_product_attention
    assert module.scaled_dot_product_attention is own
    other = small_model("mimo")
    with PagedStore(other, num_blocks=16, block_size=4) as second:
        cache = second.cache()
        other(mx.array([[1, 2, 3]]), cache=cache)
        assert cache[0].offset == 3
    assert module.scaled_dot_product_attention is own  # the first store is open
    store.close()
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention is not own


def test_other_caches_go_where_they_went(model, store):
    plain = [caches.KVCache() for _ in range(3)]
    cache = store.cache()
    tokens = mx.array([[3, 1, 4, 1, 5]])
    assert mx.allclose(model(tokens, cache=plain), model(tokens, cache=cache), atol=1e-4)
    assert mx.allclose(model(tokens, cache=plain), model(tokens, cache=cache), atol=1e-4)


def test_two_stores_do_not_meet(model, store):
    other = small_model("llama", seed=1)
    with PagedStore(other, num_blocks=16, block_size=4) as second:
        mine, theirs = store.cache(), second.cache()
        model(mx.array([[1, 2, 3]]), cache=mine)
        other(mx.array([[4, 5]]), cache=theirs)
        assert (mine[0].offset, theirs[0].offset) == (3, 2)
        with pytest.raises(PagedKVError, match="caches of one store"):
            mine[0].extend(theirs[0])
        with pytest.raises(ValueError, match="cache of this store"):
            store.keep(theirs, [4, 5])
    with pytest.raises(PagedKVError, match="without an open store"):
        PagedStore(model, num_blocks=4)


BUDGETS = {
    "none": ({}, "either memory or num_blocks"),
    "two": ({"memory": "1GB", "num_blocks": 4}, "either memory or num_blocks"),
    "words": ({"memory": "much"}, "expected memory in bytes or such as '8GB', got 'much'"),
    "little": ({"memory": "1KB"}, "memory for a block, 24576 bytes at least"),
    "no blocks": ({"num_blocks": 0}, "num_blocks"),
    "block size": ({"num_blocks": 4, "block_size": 0}, "block_size"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_refused_budgets_change_nothing(name, model):
    options, message = BUDGETS[name]
    before = bindings()
    with pytest.raises(ValueError, match=message):
        PagedStore(model, **options)
    assert bindings() == before
    assert "make_cache" not in vars(model)


def test_bytes():
    assert parse_bytes(1000) == 1000
    assert parse_bytes("8GB") == 8 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes("500mb") == 5 * 10**8


def test_a_budget_in_bytes(model):
    # 3 layers, K and V, 2 heads of 16 in float32, 32 tokens a block.
    with PagedStore(model, memory=3 * 2 * 2 * 16 * 4 * 32 * 5 + 100) as store:
        assert store.stats().num_blocks == 5
        assert store.stats().block_bytes == 3 * 2 * 2 * 16 * 4 * 32


UNSUPPORTED = {
    "mamba": "no layer of it keeps K and V: layer 0 keeps ArraysCache",
    "afm7": "layer 1 reads 'keys_and_values' of its cache, which a paged layer does not have",
    "gemma3n": "layer 2 reads 'keys_and_values' of its cache, which a paged layer does not have",
    "plamo": r"its pass failed in layer 0, ValueError: \[scaled_dot_product_attention\]",
    "gemma2": "layer 0 does not attend through mlx-lm's base",
    "deepseek_v3": "layer 0 attends over other K and V than its own",
    "stablelm": "layer 0 attends over other K and V than its own",
}
OPTIONS = {
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "gemma3n": {
        "text_config": {
            "model_type": "gemma3n_text",
            "hidden_size": 64,
            "num_hidden_layers": 6,
            "intermediate_size": [96] * 6,
            "num_attention_heads": 4,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": 97,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 97,
            "sliding_window": 8,
            "max_position_embeddings": 4096,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "activation_sparsity_pattern": [0.0] * 6,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "mamba": {
        "state_size": 16,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_cannot_be_paged_are_refused(name):
    model = small_model(name, **OPTIONS.get(name, {}))
    before = bindings()
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be paged: {UNSUPPORTED[name]}"):
        PagedStore(model, num_blocks=4)
    assert bindings() == before
    assert type(caches.make_prompt_cache(model)[0]) is not PagedLayer


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("embed_tokens", "before a layer used its cache, KeyError: 'why'"),
        ("layers.1", "after layer 0, KeyError: 'why'"),
        ("layers.1.self_attn.o_proj", "after layer 1, KeyError: 'why'"),
        ("norm", "after layer 2, KeyError: 'why'"),
    ],
)
def test_a_pass_that_fails_says_where_and_why(broken, reason, monkeypatch):
    model = small_model("llama")
    part = dict(model.model.named_modules())[broken]

    def fail(*arguments, **options):
        raise KeyError("why")

    part.__class__ = type("Broken", (type(part),), {"__call__": fail})
    with pytest.raises(
        UnsupportedModelError, match=f"llama cannot be paged: its pass failed {reason}"
    ):
        PagedStore(model, num_blocks=4)


def test_a_cache_that_is_used_as_a_list_says_so():
    model = small_model("llama")

    def index(self, x, mask=None, cache=None):
        return x if cache is None else cache[0]

    part = model.model.layers[1]
    part.__class__ = type("Broken", (type(part),), {"__call__": index})
    with pytest.raises(
        UnsupportedModelError, match=r"failed after layer 0, TypeError: .*subscript"
    ):
        PagedStore(model, num_blocks=4)


def test_options_that_a_store_has_not_are_refused(model, store):
    prompt = mx.array([1, 2, 3])
    for cache in (None, store.cache()):
        with pytest.raises(ValueError, match="kv_bits=None over a paged store, got 8"):
            generate_step(prompt, model, kv_bits=8, prompt_cache=cache)
        with pytest.raises(ValueError, match="max_kv_size=None over a paged store, got 64"):
            generate_step(prompt, model, max_kv_size=64, prompt_cache=cache)
    with pytest.raises(ValueError, match="max_kv_size=None over a paged store, got 64"):
        BatchGenerator(model, max_tokens=8, max_kv_size=64).insert([[1, 2]])
    with pytest.raises(ValueError, match="kv_bits=None, got 4"):
        store.cache()[0].to_quantized()
    with pytest.raises(ValueError, match="padding on the right, got left_padding"):
        store.cache()[0].prepare(left_padding=[1])


def test_a_pass_that_fails_between_layers_leaves_no_tokens(model, store, monkeypatch):
    cache, clean = store.cache(), store.cache()
    for each in (cache, clean):
        model(mx.array([[1, 2, 3, 4, 5]]), cache=each)
    attend = PagedLayer.attend

    def fails(self, *arguments):
        if self.layer == 1:
            raise MemoryError("injected")
        return attend(self, *arguments)

    monkeypatch.setattr(PagedLayer, "attend", fails)
    with pytest.raises(MemoryError, match="injected"):
        model(mx.array([[9, 9, 9]]), cache=cache)
    monkeypatch.undo()
    tokens = mx.array([[6, 7]])
    assert mx.allclose(model(tokens, cache=cache), model(tokens, cache=clean), atol=1e-4)
    assert [layer.offset for layer in cache] == [7, 7, 7]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("place", ["update_and_fetch", "attend", "written"])
def test_a_pass_that_breaks_off_anywhere_leaves_no_tokens(model, store, monkeypatch, layer, place):
    cache, clean = store.cache(), store.cache()
    for each in (cache, clean):
        model(mx.array([[1, 2, 3, 4, 5]]), cache=each)
    owner, name = (Sequences, "attended") if place == "written" else (PagedLayer, place)
    own = getattr(owner, name)

    def breaks(self, *arguments):
        index = arguments[0] if place == "written" else self.layer
        if index == layer and place != "update_and_fetch":
            raise KeyboardInterrupt
        out = own(self, *arguments)
        if index == layer:
            raise KeyboardInterrupt
        return out

    for tokens in ([[9, 9, 9]], [[8]]):
        monkeypatch.setattr(owner, name, breaks)
        with pytest.raises(KeyboardInterrupt):
            model(mx.array(tokens), cache=cache)
        monkeypatch.undo()
    tokens = mx.array([[6, 7]])
    assert mx.allclose(model(tokens, cache=cache), model(tokens, cache=clean), atol=1e-4)
    assert [each.offset for each in cache] == [7, 7, 7]


def test_out_of_blocks_leaves_everything(model, store):
    cache = store.cache()
    model(mx.array([list(range(40))]), cache=cache)
    with pytest.raises(OutOfBlocksError, match="expected 7 free blocks, 6 are left"):
        model(mx.array([list(range(25))]), cache=cache)
    assert [layer.offset for layer in cache] == [40, 40, 40]
    assert store.stats().free_blocks == 6
    model(mx.array([list(range(24))]), cache=cache)
    assert cache[0].offset == 64


def test_cached_prefixes_make_room(model, store):
    for start in (0, 30):
        prompt = list(range(start, start + 20))
        cache = store.cache(prompt)
        model(mx.array([prompt]), cache=cache)
        assert store.keep(cache, prompt) == 20
    del cache
    assert store.stats().cached_blocks == 10
    cache = store.cache()
    model(mx.array([list(range(50))]), cache=cache)
    assert store.stats().cached_blocks <= 3
    assert cache[0].offset == 50


def test_a_dropped_cache_gives_its_blocks_back(model, store):
    cache = store.cache()
    model(mx.array([[1, 2, 3, 4, 5]]), cache=cache)
    assert store.stats().free_blocks == 14
    del cache
    gc.collect()
    assert store.stats().free_blocks == 16


def test_a_closed_store_is_refused(model):
    store = PagedStore(model, num_blocks=4)
    cache = store.cache()
    store.close()

    def compute():
        return model(mx.array([[1, 2]]), cache=cache)

    for call in (store.cache, store.stats, store.warm_up, compute):
        with pytest.raises(PagedKVError, match="expected an open store"):
            call()


def test_attention_over_other_arrays_is_refused(model, store):
    layer = store.cache()[0]
    new = mx.zeros((1, 2, 3, 16))
    layer.update_and_fetch(new, new)
    with pytest.raises(PagedKVError, match="the K and V that the layer put into its cache"):
        layer.attend(mx.zeros((1, 4, 3, 16)), new * 1, new, 0.25, "causal", None)
    with pytest.raises(PagedKVError, match="before those of the others"):
        store.cache()[1].extract(0)


def test_a_state_is_no_files_content(store, model):
    cache = store.cache()
    model(mx.array([[1, 2]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    with pytest.raises(ValueError, match="while its store is open"):
        routing_free_save(cache)


def routing_free_save(cache):
    from pagedkv.mlx_lm.routing import _OWN

    _OWN["save_prompt_cache"]("/nonexistent/x.safetensors", cache)


@pytest.mark.parametrize(
    ("found", "message"),
    [("0.31.3", "found 0.31.3"), ("0.9", "found 0.9"), (None, "it is not installed")],
)
def test_an_older_mlx_lm_is_refused(monkeypatch, found, message):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=f"needs mlx-lm {pagedkv.mlx_lm.OLDEST}.*{message}"):
        pagedkv.mlx_lm._check_mlx_lm()


@pytest.mark.parametrize(
    ("found", "is_tested"),
    [(pagedkv.mlx_lm.OLDEST, True), ("0.32.9", True), ("0.33.0rc1", False), ("1.0", False)],
)
def test_a_newer_mlx_lm_than_was_tested_warns(monkeypatch, found, is_tested):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with nullcontext() if is_tested else pytest.warns(UserWarning, match=f"found {found}"):
        pagedkv.mlx_lm._check_mlx_lm()


def test_a_closed_store_keeps_no_memory_for_a_pass_that_never_ended(model):
    store = PagedStore(model, num_blocks=16, block_size=4)
    cache = store.cache()
    keys = mx.zeros((1, 2, 3, 16))
    cache[0].update_and_fetch(keys, keys)
    cache[0].attend(mx.zeros((1, 4, 3, 16)), keys, keys, 1.0, None, None)
    pools = weakref.ref(store.memory.kv)
    store.close()
    gc.collect()
    assert pools() is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("num_blocks", [1, 4, 40, 400])
def test_warming_up_computes_prompts_and_steps_and_leaves_nothing(monkeypatch, family, num_blocks):
    passes, update = set(), PagedLayer.update_and_fetch

    def spy(self, keys, values):
        passes.add((keys.shape[0], keys.shape[2]))
        return update(self, keys, values)

    model = small_model(family)
    with PagedStore(model, num_blocks=num_blocks, block_size=4) as store:
        monkeypatch.setattr(PagedLayer, "update_and_fetch", spy)
        store.warm_up()
        after = store.stats()
        assert after.asked_tokens == after.cached_blocks == 0
        assert after.free_blocks == after.num_blocks
        if num_blocks >= 4:
            assert (1, 1) in passes
        if num_blocks >= 40:
            assert (8, 1) in passes
            assert max(batch * count for batch, count in passes) > 30  # prompts


@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize("num_blocks", [20, 33, 64, 90])
def test_warming_up_leaves_prefixes_and_statistics(model, block_size, num_blocks):
    with PagedStore(model, num_blocks=num_blocks, block_size=block_size) as store:
        list(generate_step(mx.array([1] * (2 * block_size + 1)), model, max_tokens=1))
        before = store.stats()
        assert before.cached_blocks == 2
        store.warm_up()
        assert store.stats() == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_warming_up_beside_others(family):
    model = small_model(family)
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        cache = store.cache()
        list(generate_step(mx.array([1, 2, 3, 4, 5]), model, prompt_cache=cache, max_tokens=1))
        fork = copy.deepcopy(cache)
        store.warm_up()
        generator = BatchGenerator(model, max_tokens=200)
        generator.insert([[1, 2, 3, 4, 5]])
        generator.next_generated()
        store.warm_up()
        assert fork[-1].offset == cache[-1].offset == 6


def test_warming_up_leaves_others_their_blocks(model):
    with PagedStore(model, num_blocks=12, block_size=4) as store:
        cache = store.cache()
        model(mx.array([list(range(30))]), cache=cache)
        mx.eval(cache[0].state)
        for _ in range(2):
            store.warm_up()
            assert store.stats().free_blocks == 4
        model(mx.array([list(range(16))]), cache=cache)
        store.warm_up()  # no block is free
        assert cache[0].offset == 46
