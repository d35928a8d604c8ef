"""A model's output layer sees fewer rows in the passes that ask for it, and in no others."""

import copy
import gc
import pickle
import sys
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from interrupts import interrupted
from mlx_lm.generate import generate_step
from small_models import small_model

from pagedkv import Scheduler
from pagedkv.mlx_lm import PagedStore, ScheduledModel
from pagedkv.mlx_lm.output import OutputLayer

SIZES = {"num_blocks": 24, "block_size": 4}
HIDDEN = mx.random.normal((4, 8), key=mx.random.key(0))
TOKENS = mx.array([[1, 2, 3, 4]])


def first(hidden):
    return hidden[:1]


@pytest.fixture
def head():
    return nn.Linear(8, 3)


def in_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_it_is_narrowed_below_the_call_alone(head):
    output = OutputLayer(head, "__call__")

    def model():
        beside = in_thread(lambda: head(HIDDEN).shape)
        return head(HIDDEN).shape, beside

    assert output.seeing(first, model) == ((1, 3), (4, 3))
    assert head(HIDDEN).shape == (4, 3)
    output.close()
    assert type(head) is nn.Linear


def test_a_pass_within_a_pass_has_its_own_choice(head):
    output = OutputLayer(head, "__call__")

    def model():
        inner = output.seeing(lambda hidden: hidden[:2], lambda: head(HIDDEN).shape)
        return inner, head(HIDDEN).shape

    assert output.seeing(first, model) == ((2, 3), (1, 3))


def test_another_output_layer_sees_all(head):
    other = nn.Linear(8, 5)
    outputs = [OutputLayer(one, "__call__") for one in (head, other)]
    found = outputs[0].seeing(first, lambda: (head(HIDDEN).shape, other(HIDDEN).shape))
    assert found == ((1, 3), (4, 5))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_that_share_a_layer_close_in_any_order(head, order):
    outputs = [OutputLayer(head, "__call__") for _ in range(2)]
    for which in order:
        assert outputs[which].seeing(first, lambda: head(HIDDEN).shape) == (1, 3)
        outputs[which].close()
        outputs[which].close()
    assert type(head) is nn.Linear


def test_two_threads_whose_passes_overlap(head):
    outputs = [OutputLayer(head, "__call__") for _ in range(2)]
    entered, left = threading.Event(), threading.Event()

    def one():
        entered.set()
        assert left.wait(10)
        return head(HIDDEN).shape

    found = []
    thread = threading.Thread(target=lambda: found.append(outputs[0].seeing(first, one)))
    thread.start()
    assert entered.wait(10)
    assert outputs[1].seeing(first, lambda: head(HIDDEN).shape) == (1, 3)
    outputs[1].close()
    left.set()
    thread.join()
    outputs[0].close()
    assert found == [(1, 3)]
    assert type(head) is nn.Linear
    assert head(HIDDEN).shape == (4, 3)


def test_one_that_is_dropped_gives_the_class_back(head):
    output = OutputLayer(head, "__call__")
    assert type(head) is not nn.Linear
    del output
    gc.collect()
    assert type(head) is nn.Linear


def test_copies_are_of_the_own_class(head):
    output = OutputLayer(head, "__call__")
    for made in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert type(made) is nn.Linear
        assert output.seeing(first, lambda made=made: made(HIDDEN).shape) == (4, 3)
        assert mx.array_equal(made(HIDDEN), head(HIDDEN))


def test_an_error_whose_traceback_is_kept_narrows_nothing(head):
    output = OutputLayer(head, "__call__")

    def fails():
        raise RuntimeError("model")

    with pytest.raises(RuntimeError) as kept:
        output.seeing(first, fails)
    assert kept.traceback
    assert head(HIDDEN).shape == (4, 3)


def test_an_interrupt_anywhere_narrows_nothing_afterwards():
    model = small_model("llama", num_hidden_layers=1)
    with PagedStore(model, num_blocks=4000, block_size=4) as store:

        def start():
            return store.cache([5, 6, 7, 8])

        def generate(cache):
            for _ in generate_step(mx.array([5, 6, 7, 8]), model, max_tokens=1, prompt_cache=cache):
                pass

        for _, _ in interrupted(start, generate):
            assert model(TOKENS).shape == (1, 4, 97)
    assert type(model.model.embed_tokens) is nn.Embedding


def test_where_an_interrupt_left_a_frame_it_is_not_asked(head):
    """Without a look at the stack the choice would outlive its pass."""
    output = OutputLayer(head, "__call__")

    def model():
        # As if an interrupt came between the pass and what puts the frame away.
        frames.append(sys._getframe(1))

    frames = []
    output.seeing(first, model)
    from pagedkv.mlx_lm import output as module

    module._here.frame = frames[0]
    try:
        assert head(HIDDEN).shape == (4, 3)
        assert output.seeing(first, lambda: head(HIDDEN).shape) == (1, 3)
        assert module._here.frame is None
    finally:
        module._here.frame = None


def test_scheduled_models_and_stores_leave_it_as_it_was():
    model = small_model("llama")
    kind = type(model.model.embed_tokens)
    with ScheduledModel(model, **SIZES) as scheduled:
        scheduler = Scheduler(scheduled.cache.pool, 4)
        scheduler.add("a", range(7), 2)
        assert scheduled.logits(scheduler.schedule()).shape == (1, 97)
        assert model(TOKENS).shape == (1, 4, 97)
    assert type(model.model.embed_tokens) is kind
    with PagedStore(model, **SIZES):
        list(generate_step(TOKENS[0], model, max_tokens=2))
        assert model(TOKENS).shape == (1, 4, 97)
    assert type(model.model.embed_tokens) is kind
