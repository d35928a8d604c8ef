"""A store that several threads use: each answer is what it is alone, and no block is lost."""

import gc
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
from small_models import tokens_of

from pagedkv import PagedKVError
from pagedkv.host.turns import FairLock
from pagedkv.mlx_lm import PagedStore

SHARED = list(range(1, 30))
PROMPTS = [[*SHARED[: 10 + 3 * k], *range(50 + k, 60 + k)] for k in range(6)]


def answer(model, prompt, cache=None, count=8, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


@pytest.fixture(scope="module")
def expected(model):
    return [answer(model, prompt) for prompt in PROMPTS]


def in_threads(*calls):
    """Return what calls return, each in a new thread that then ends, or raise what one raises."""
    found, errors = [None] * len(calls), []

    def run(place, call):
        try:
            found[place] = call()
        except BaseException as error:
            errors.append(error)
        finally:
            mx.synchronize()
            mx.synchronize(generation_stream)
            mx.clear_streams()  # MLX aborts at the end of a thread that has some

    started = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return found


def whole(store):
    gc.collect()
    stats = store.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.num_blocks


def test_threads_that_generate_at_once(model, expected):
    with PagedStore(model, num_blocks=300, block_size=4) as store:
        answer(model, PROMPTS[0])  # in this one first

        def work(number):
            found = []
            for turn in range(8):
                which = (number + turn) % len(PROMPTS)
                found.append(answer(model, PROMPTS[which]) == expected[which])
            return found

        assert in_threads(*(partial(work, k) for k in range(4))) == [[True] * 8] * 4
        assert store.stats().cached_tokens > 0
        whole(store)


def test_a_thread_that_raised_leaves_the_store_to_others(model, expected):
    def bad(_):
        raise RuntimeError("sampler")

    with PagedStore(model, num_blocks=100, block_size=4) as store:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="sampler"):
                in_threads(lambda: answer(model, PROMPTS[0], sampler=bad))
            assert answer(model, PROMPTS[0]) == expected[0]
        whole(store)


def batch(model, prompts):
    generator = BatchGenerator(model, max_tokens=8)
    return tokens_of(generator, generator.insert(prompts))


def test_batches_in_one_thread_beside_generations_in_others(model, expected):
    with PagedStore(model, num_blocks=300, block_size=4) as store:

        def batches():
            return all(batch(model, PROMPTS[:3]) == expected[:3] for _ in range(6))

        def alone():
            return [answer(model, prompt) for prompt in PROMPTS[3:]] == expected[3:]

        assert all(in_threads(batches, *[alone] * 4))
        whole(store)


def test_batches_in_several_threads(model, expected):
    with PagedStore(model, num_blocks=300, block_size=4) as store:

        def batches():
            return all(batch(model, PROMPTS) == expected for _ in range(4))

        assert all(in_threads(*[batches] * 3))
        whole(store)


def test_statistics_beside_threads_that_generate(model, expected):
    with PagedStore(model, num_blocks=300, block_size=4) as store:
        over = threading.Event()

        def look():
            while not over.is_set():
                stats = store.stats()
                assert 0 <= stats.free_blocks <= 300
                store.cache(PROMPTS[1])

        def work():
            try:
                return [[answer(model, prompt) for prompt in PROMPTS] for _ in range(5)]
            finally:
                over.set()

        assert in_threads(look, work)[1] == [expected] * 5
        whole(store)


def test_threads_with_a_lock_of_their_own_around_each_step(model, expected):
    lock = threading.Lock()
    with PagedStore(model, num_blocks=300, block_size=4) as store:

        def work(which):
            steps = generate_step(mx.array(PROMPTS[which]), model, max_tokens=8)
            found = []
            for _ in range(8):
                with lock:
                    found.append(int(next(steps)[0]))
            with lock:
                steps.close()
            return found

        assert in_threads(*(partial(work, k) for k in range(6))) == expected
        whole(store)


def test_a_pass_beside_that_of_another_thread_is_refused(model, expected):
    with PagedStore(model, num_blocks=100, block_size=4) as store:
        cache = store.cache()
        rng = np.random.default_rng(0)
        new = mx.array(rng.standard_normal((1, 2, 3, 16)), mx.float32)
        left, may_end = threading.Event(), threading.Event()

        def leaves():
            cache[0].update_and_fetch(new, new)
            left.set()
            assert may_end.wait(10)

        thread = threading.Thread(target=in_threads, args=(leaves,))
        thread.start()
        assert left.wait(10)
        with pytest.raises(PagedKVError, match="expected no other thread in a forward pass"):
            answer(model, PROMPTS[0])
        may_end.set()
        thread.join()
        assert answer(model, PROMPTS[0]) == expected[0]
        assert cache[0].offset == 0
        cache = None
        whole(store)


def test_what_a_thread_computed_and_did_not_evaluate_is_refused(model, expected):
    with PagedStore(model, num_blocks=100, block_size=4) as store:
        cache, computed, may_end = store.cache(), threading.Event(), threading.Event()

        def work():
            model(mx.array([PROMPTS[1]]), cache=cache)
            computed.set()
            assert may_end.wait(10)
            mx.eval([layer.state for layer in cache])

        thread = threading.Thread(target=in_threads, args=(work,))
        thread.start()
        assert computed.wait(10)
        with pytest.raises(PagedKVError, match="that computed last to evaluate"):
            answer(model, PROMPTS[0])
        may_end.set()
        thread.join()
        assert answer(model, PROMPTS[0]) == expected[0]
        cache = None
        whole(store)


def test_a_thread_that_computed_no_token_leaves_the_store_to_others(model, expected):
    with PagedStore(model, num_blocks=100, block_size=4) as store:
        in_threads(lambda: answer(model, PROMPTS[0], count=0))
        assert answer(model, PROMPTS[1]) == expected[1]
        whole(store)


@pytest.mark.parametrize("fails", [False, True])
def test_loops_of_the_callers_own(model, expected, fails):
    with PagedStore(model, num_blocks=300, block_size=4) as store:

        def work(which):
            cache, found, tokens = store.cache(), [], PROMPTS[which]
            while len(found) < 8:
                with store.exclusive():
                    logits = model(mx.array([tokens]), cache=cache)
                    if fails:
                        raise RuntimeError("between")
                    tokens = [mx.argmax(logits[0, -1]).item()]
                found += tokens
            return found

        if fails:
            for _ in range(3):
                with pytest.raises(RuntimeError, match="between"):
                    in_threads(partial(work, 0))
                assert answer(model, PROMPTS[1]) == expected[1]
        else:
            assert in_threads(*(partial(work, k) for k in range(6))) == expected
        whole(store)


def test_a_store_that_was_closed_beside_says_so(model):
    with PagedStore(model, num_blocks=100, block_size=4) as store:
        cache = store.cache()
        in_threads(lambda: answer(model, PROMPTS[0]))
    with pytest.raises(PagedKVError, match="expected an open store"):
        model(mx.array([[1]]), cache=cache)


def test_a_thread_that_waits_comes_before_one_that_asks_again():
    lock, order = FairLock(), []

    def waits():
        with lock:
            order.append("waited")

    thread = threading.Thread(target=waits)
    with lock:
        thread.start()
        while lock._next.acquire(blocking=False):  # until it waits
            lock._next.release()
            time.sleep(0.001)
        with lock:  # it is reentrant
            assert not order
    with lock:
        order.append("again")
    thread.join()
    assert order == ["waited", "again"]


def test_a_lock_is_free_after_interrupts_that_come_at_any_time():
    lock, counts = FairLock(), [0, 0]
    own = signal.signal(signal.SIGALRM, signal.default_int_handler)
    over = threading.Event()

    def others():
        while not over.is_set():
            with lock:
                counts[1] += 1

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for number in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + number * 1e-6)
                while True:
                    with lock:
                        lock.is_free()
                    lock.is_free()
            except KeyboardInterrupt:
                counts[0] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own)
        before = counts[1]
        time.sleep(0.1)
        over.set()
        thread.join(10)
    assert not thread.is_alive()
    assert counts[0] == 300
    assert counts[1] > before


UNLOCKED = """
import sys
sys.path.insert(0, {tests!r})
from test_mlx_lm_threads import *

FairLock.__enter__ = FairLock.__exit__ = lambda *_: None
model = small_model("llama")
with PagedStore(model, num_blocks=300, block_size=4) as store:
    in_threads(*[lambda: [answer(model, prompt) for prompt in PROMPTS] for _ in range(4)])
"""


def test_threads_without_the_lock_fail():
    found = subprocess.run(
        [sys.executable, "-c", UNLOCKED.format(tests=str(Path(__file__).parent))],
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert found.returncode
