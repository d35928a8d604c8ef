"""A model of mlx-lm that computes schedules: the tokens that mlx-lm's own caches give."""

import functools
import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from launching import BACKEND
from mlx_lm.generate import generate_step
from mlx_lm.models import base
from mlx_lm.tuner.lora import LoRALinear
from small_models import FAMILIES, small_model

from pagedkv import PagedKVError, Scheduler
from pagedkv.errors import UnsupportedModelError
from pagedkv.mlx_lm import PagedStore, ScheduledModel

pytestmark = pytest.mark.usefixtures("storage")
PAGED = sorted(set(FAMILIES) - {"qwen3_next"})
OWN_ATTENTION = ["llama", "gemma3_text", "gpt_oss", "gemma", "gemma4_text", "mimo_v2_flash"]
"""Families whose layers attend each in another way; the others' do as Llama's."""
VOCABULARY, SIZES = 97, {"num_blocks": 17, "block_size": 4}


def requests_that_share():
    """Eight requests, most of them after the same 14 tokens: prompt and number of new tokens."""
    rng = np.random.default_rng(41)
    shared = rng.integers(0, VOCABULARY, 14).tolist()
    requests = {}
    for number in range(8):
        own = rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist()
        requests[number] = (shared + own if number % 4 else own), int(rng.integers(5, 13))
    return requests


@functools.cache
def own_answers(family):
    """Tokens and logprobs of each request of `requests_that_share` over mlx-lm's own caches."""
    logprobs = {}
    return one_by_one(small_model(family), requests_that_share(), logprobs), logprobs


def one_by_one(model, requests, logprobs=None):
    """What mlx-lm generates over its own caches; `logprobs` are added to by request."""
    generated = {}
    for number, (prompt, most) in requests.items():
        steps = list(generate_step(mx.array(prompt), model, max_tokens=most))
        generated[number] = [int(token) for token, _ in steps]
        if logprobs is not None:
            logprobs[number] = mx.stack([x for _, x in steps])
    return generated


def scheduler_of(scheduled, **options):
    cache = scheduled.cache
    return Scheduler(cache.pool, cache.block_size, **{"max_running": 6, "watermark": 0, **options})


def serve(scheduled, scheduler, requests, logprobs=None):
    generated = {number: [] for number in requests}
    rows = {number: [] for number in requests}
    for number, (prompt, most) in requests.items():
        scheduler.add(number, prompt, most)
    while (schedule := scheduler.schedule()).request_ids:
        logits = scheduled.logits(schedule)
        assert logits.shape == (len(schedule.samples), VOCABULARY)
        tokens = mx.argmax(logits, axis=-1).tolist()
        sampled = dict(zip(schedule.samples, tokens, strict=True))
        for row, number in enumerate(schedule.samples):
            generated[number].append(tokens[row])
            rows[number].append(logits[row] - mx.logsumexp(logits[row]))
        scheduler.update(sampled)
    if logprobs is not None:
        logprobs.update({number: mx.stack(found) for number, found in rows.items()})
    return generated


@pytest.mark.parametrize(
    ("family", "storage"),
    [
        *((family, "donated") for family in PAGED),
        *((family, "in place") for family in (OWN_ATTENTION if BACKEND == "cpu" else PAGED)),
    ],
    indirect=["storage"],
)
def test_requests_under_pressure(family):
    model, requests, logprobs = small_model(family), requests_that_share(), {}
    expected, own = own_answers(family)
    with ScheduledModel(model, **SIZES) as scheduled:
        scheduler = scheduler_of(scheduled, max_tokens=11)
        assert serve(scheduled, scheduler, requests, logprobs) == expected
        stats = scheduler.stats()
    for number in requests:  # tokens alone say little of a model that repeats itself
        assert mx.allclose(logprobs[number], own[number], rtol=1e-3, atol=1e-3), number
    assert stats.preemptions > 0
    assert stats.hit_tokens > 0
    assert stats.blocks_live == 0


def test_one_step_in_flight():
    model, requests = small_model("qwen3"), requests_that_share()
    expected, _ = own_answers("qwen3")
    generated, in_flight, unknown = {number: [] for number in requests}, [], 0
    with ScheduledModel(model, **SIZES) as scheduled:
        scheduler = scheduler_of(scheduled)
        for number, (prompt, most) in requests.items():
            scheduler.add(number, prompt, most)
        while True:
            schedule = scheduler.schedule()
            if schedule.request_ids:
                before = in_flight[-1][1] if in_flight else None
                logits = scheduled.logits(schedule, before)
                tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
                mx.async_eval(tokens)
                in_flight.append((schedule, tokens))
                unknown += len(schedule.unknown)
                if len(in_flight) == 1:
                    continue
            if not in_flight:
                break
            computed, tokens = in_flight.pop(0)
            sampled = dict(zip(computed.samples, tokens.tolist(), strict=True))
            for number, token in sampled.items():
                generated[number].append(token)
            scheduler.update(sampled)
    assert generated == expected
    assert unknown > 20


def test_a_pass_that_fails_is_retracted(monkeypatch):
    model, requests = small_model("llama"), requests_that_share()
    expected, _ = own_answers("llama")
    with ScheduledModel(model, **SIZES) as scheduled:
        scheduler = scheduler_of(scheduled)
        own, calls = scheduled.logits, []

        def fails_at_first(schedule):
            calls.append(schedule)
            if len(calls) % 3:
                return own(schedule)
            attend = base.scaled_dot_product_attention
            with monkeypatch.context() as patch:
                module = "mlx_lm.models.llama.scaled_dot_product_attention"
                layers = []

                def breaks(*arguments, **options):
                    layers.append(arguments)
                    if len(layers) == 2:
                        raise MemoryError("injected")
                    return attend(*arguments, **options)

                patch.setattr(module, breaks)
                with pytest.raises(MemoryError, match="injected"):
                    own(schedule)
            scheduler.retract()
            return own(scheduler.schedule())

        monkeypatch.setattr(scheduled, "logits", fails_at_first)
        assert serve(scheduled, scheduler, requests) == expected
        assert len(calls) > 9


def test_a_prompt_in_parts_samples_nothing_before_its_last():
    model = small_model("llama")
    with ScheduledModel(model, **SIZES) as scheduled:
        scheduler = scheduler_of(scheduled, max_tokens=4)
        scheduler.add("a", list(range(10)), 1)
        shapes = []
        while (schedule := scheduler.schedule()).request_ids:
            logits = scheduled.logits(schedule)
            shapes.append(logits.shape)
            tokens = mx.argmax(logits, axis=-1).tolist() if schedule.samples else []
            scheduler.update(dict(zip(schedule.samples, tokens, strict=True)))
    assert shapes == [(0, 97), (0, 97), (1, 97)]


def test_close_leaves_mlx_lm_as_it_was():
    model, own = small_model("llama"), base.scaled_dot_product_attention
    scheduled = ScheduledModel(model, memory="1MB")
    assert base.scaled_dot_product_attention is not own
    scheduler = scheduler_of(scheduled)
    scheduler.add("a", [1, 2], 2)
    schedule = scheduler.schedule()
    scheduled.close()
    scheduled.close()
    assert base.scaled_dot_product_attention is own
    with pytest.raises(PagedKVError, match="expected an open model"):
        scheduled.logits(schedule)


REFUSED = {
    "no budget": ("llama", {}, ValueError, "either memory or num_blocks"),
    "little": ("llama", {"memory": "1KB"}, ValueError, "memory for a block, 24576 bytes"),
    "layers of another kind": (
        "qwen3_next",
        {"num_blocks": 4},
        UnsupportedModelError,
        "qwen3_next cannot be scheduled: layer 0 keeps something other than K and V",
    ),
    "attention of its own": (
        "gemma2",
        {"num_blocks": 4},
        UnsupportedModelError,
        "gemma2 cannot be paged: layer 0 does not attend through mlx-lm's base",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scheduled_is_refused(name):
    family, options, error, message = REFUSED[name]
    own = base.scaled_dot_product_attention
    with pytest.raises(error, match=message):
        ScheduledModel(small_model(family), **options)
    assert base.scaled_dot_product_attention is own


def test_a_model_with_an_open_store_is_refused():
    model = small_model("llama")
    with PagedStore(model, num_blocks=4), pytest.raises(PagedKVError, match="without an open st"):
        ScheduledModel(model, num_blocks=4)


def test_an_empty_schedule_is_refused():
    with ScheduledModel(small_model("llama"), num_blocks=4) as scheduled:
        schedule = scheduler_of(scheduled).schedule()
        with pytest.raises(ValueError, match="a schedule of at least one request"):
            scheduled.logits(schedule)
        assert schedule.state == "new"


def test_a_model_that_attends_over_other_arrays_is_refused():
    class Odd:
        """Hands K and V to its cache, and attends over copies."""

        def __init__(self, model):
            self.model = model
            self.layers = model.layers

        def __call__(self, tokens, cache):
            layer, new = cache[0], mx.zeros((len(tokens), 2, tokens.shape[1], 16))
            keys, values = layer.update_and_fetch(new, new)
            return layer.attend(new, keys * self.factor, values, 0.25, self.mask, None)

    model = small_model("llama")
    with ScheduledModel(model, num_blocks=4) as scheduled:
        odd = scheduled._model = Odd(model)
        scheduler = scheduler_of(scheduled)
        scheduler.add("a", [1, 2], 2)
        odd.factor, odd.mask = 2, None
        with pytest.raises(PagedKVError, match="the K and V that the layer put into its cache"):
            scheduled.logits(scheduler.schedule())
        scheduler.retract()
        layer = scheduled._layers[0]
        with pytest.raises(PagedKVError, match="the K and V that the layer put into its cache"):
            layer.attend(*[mx.zeros((1, 2, 1, 16))] * 3, 0.25, None, None)
        with pytest.raises(PagedKVError, match="got a layer of a scheduled model"):
            layer.unpaged()


def widths_of_the_output(model, monkeypatch):
    """How many rows of hidden states the output layer is given, pass by pass."""
    head = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head
    method = "as_linear" if model.args.tie_word_embeddings else "__call__"
    kind, given = type(head), []
    own = getattr(kind, method)

    def noted(self, hidden):
        if isinstance(self, kind) and hidden.shape[-1] == model.args.hidden_size:
            given.append(hidden.shape[0] * hidden.shape[1])
        return own(self, hidden)

    monkeypatch.setattr(kind, method, noted)
    return given


def test_only_tokens_that_are_sampled_from_have_logits(monkeypatch):
    """Three prompts, of 40 tokens in all: one pass, three rows of the vocabulary."""
    model = small_model("llama")
    given = widths_of_the_output(model, monkeypatch)
    with ScheduledModel(model, **SIZES) as scheduled:
        scheduler = scheduler_of(scheduled)
        for number, length in enumerate((5, 11, 24)):
            scheduler.add(number, range(30 * number, 30 * number + length), 2)
        given.clear()
        assert scheduled.logits(scheduler.schedule()).shape == (3, VOCABULARY)
        assert given == [3]


def test_one_that_is_dropped_gives_its_memory_back():
    model = small_model("llama")
    scheduled = ScheduledModel(model, **SIZES)
    pools = weakref.ref(scheduled.cache)
    del scheduled
    gc.collect()
    assert pools() is None


def test_an_adapter_beside_the_output_layer_is_part_of_the_logits():
    model = small_model("llama", tie_word_embeddings=False)
    model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
    model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape)
    requests = requests_that_share()
    with ScheduledModel(model, num_blocks=64, block_size=4) as scheduled:
        generated = serve(scheduled, scheduler_of(scheduled), requests)
    assert generated == one_by_one(model, requests)
