"""mlx-lm's server over a paged store, asked over loopback by OpenAI's client."""

import argparse
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
pytest.importorskip("openai", reason="the test group is not installed")
import mlx.core as mx
import openai
from mlx_lm import load, stream_generate
from mlx_lm import server as own_server
from mlx_lm.generate import GenerationBatch
from served_models import Asked, asked, options, saved_model, served, texts, words
from small_models import small_model

from pagedkv import PagedKVError
from pagedkv.mlx_lm import PagedStore, server

pytestmark = pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
COUNT = 12
ANY_MODEL = server.Limits(any_model=True)
SYSTEM = {"role": "system", "content": words(30)}
CHATS = [[SYSTEM, {"role": "user", "content": words(4, 31 + 7 * k)}] for k in range(6)]
# Marks and words: 1 + 30 + 1, 1 + 4 + 1, 1.
PROMPT_TOKENS, SYSTEM_TOKENS = 39, 32
NEED = -(-(PROMPT_TOKENS + COUNT) // 4)  # blocks of 4 of a chat: 13, eight of which are shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def path(folder):
    return saved_model(folder / "first")


@pytest.fixture(scope="module")
def other(folder):
    return saved_model(folder / "other", "qwen3", seed=1)


def reference(path):
    """mlx-lm's own generation, without a server and a store."""
    model, tokenizer = load(path)

    def answer(prompt, count=COUNT):
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return "".join(
            found.text for found in stream_generate(model, tokenizer, prompt, max_tokens=count)
        )

    return answer


@pytest.fixture(scope="module")
def answer(path):
    return reference(path)


@pytest.fixture(scope="module")
def expected(answer):
    return [answer(chat) for chat in CHATS]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_server_is_healthy_once_its_model_is_there(path, expected, monkeypatch, backend):
    """On a GPU kernels are compiled before."""
    may_go_on, compiled = threading.Event(), []
    load = own_server.ModelProvider._load

    def slow(self, *arguments, **more):
        assert may_go_on.wait(20)
        return load(self, *arguments, **more)

    monkeypatch.setattr(own_server.ModelProvider, "_load", slow)
    monkeypatch.setattr(PagedStore, "warm_up", lambda store: compiled.append(health()))
    monkeypatch.setattr(server, "backend_of", lambda device: backend)
    with served(server.Provider(options(path), num_blocks=64, block_size=4)) as (url, generator):
        address = url.removeprefix("http://").removesuffix("/v1")

        def health():
            connection = http.client.HTTPConnection(address, timeout=5)
            connection.request("GET", "/health")
            status = connection.getresponse().status
            connection.close()
            return status

        assert health() == 503
        may_go_on.set()
        found = Asked(url, generator)
        with found.client:
            assert found.wait(lambda: health() == 200)
            assert compiled == ([] if backend == "cpu" else [503])
            assert found.text(CHATS[0]) == expected[0]


def test_a_model_that_could_not_be_loaded_is_never_ready(path, folder):
    provider = server.Provider(options(str(folder / "missing")), num_blocks=64, block_size=4)
    with pytest.raises(Exception, match="missing"):
        provider.load_default()
    assert not provider.is_ready
    provider = server.Provider(options(path), num_blocks=64, block_size=4)
    provider.load_default()
    with pytest.raises(Exception, match="missing"):
        provider.load(str(folder / "missing"))
    assert provider.is_ready  # for the model of the command line, which is loaded again
    provider.load_default()
    provider.reset()


@pytest.fixture
def batches(monkeypatch):
    """Grows by how many sequences each step computes."""
    found, step = [], GenerationBatch._step

    def spy(self):
        found.append(len(self.uids))
        return step(self)

    monkeypatch.setattr(GenerationBatch, "_step", spy)
    return found


def test_answers_are_those_of_mlx_lm(path, answer, expected):
    with asked(path) as server:
        found = server.chat(CHATS[0])
        assert found.choices[0].message.content == expected[0]
        assert found.choices[0].finish_reason == "length"
        assert found.usage.prompt_tokens == PROMPT_TOKENS
        assert found.usage.prompt_tokens_details.cached_tokens == 0
        assert server.text(CHATS[0]) == expected[0]
        stop = expected[0].split()[5]
        cut = server.chat(CHATS[0], stop=stop).choices[0]
        assert cut.finish_reason == "stop"
        assert expected[0].startswith(cut.message.content.strip())
        text = server.client.completions.create(
            model="default_model", prompt=words(9, 60), max_tokens=COUNT
        )
        assert text.choices[0].text == answer(words(9, 60))


def test_a_completion_goes_on_where_it_ended(path, answer):
    with asked(path) as server:
        text, asked_tokens = words(9, 60), 0
        for _ in range(3):
            found = server.client.completions.create(
                model="default_model", prompt=text, max_tokens=4
            )
            assert found.choices[0].text == answer(text, 4)
            text = f"{text} {found.choices[0].text}"
            asked_tokens += found.usage.prompt_tokens
        assert server.stats().asked_tokens == asked_tokens
        assert found.usage.prompt_tokens_details.cached_tokens == found.usage.prompt_tokens - 1


def test_an_empty_prompt_is_refused(path, expected):
    with asked(path) as server:
        server.text(CHATS[0])  # there is a batch that a prompt of nothing would end
        with pytest.raises(openai.BadRequestError, match="a prompt of a token at least, got none"):
            server.client.completions.create(model="default_model", prompt="")
        assert server.text(CHATS[0]) == expected[0]


def test_streaming(path, expected):
    with asked(path) as server:
        chunks = list(server.chat(CHATS[0], stream=True, stream_options={"include_usage": True}))
        parts = [choice.delta.content for chunk in chunks for choice in chunk.choices]
        assert "".join(part for part in parts if part) == expected[0]
        assert sum(bool(part) for part in parts) >= COUNT - 1
        assert chunks[-1].usage.completion_tokens == COUNT
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][
            -1
        ] == "length"


def test_concurrent_requests_share_a_system_prompt(path, expected, batches):
    with asked(path) as server:
        server.text([SYSTEM, {"role": "user", "content": words(3, 80)}])
        batches.clear()
        found = server.together(CHATS)
        assert texts(found) == expected
        assert max(batches) == 6
        for one in found:
            assert one.usage.prompt_tokens_details.cached_tokens >= SYSTEM_TOKENS
        stats = server.stats()
        assert stats.cached_tokens >= 6 * SYSTEM_TOKENS
        # Each has five blocks of its own, and shares the other eight.
        assert stats.peak_blocks <= 8 + 7 * 5 + 6


def test_requests_that_do_not_fit_now_wait(path, expected, batches):
    # Two fit: eight blocks that they share, and five of each; none shares before one has begun.
    with asked(path, num_blocks=2 * NEED) as server:
        assert texts(server.together(CHATS)) == expected
        assert 1 < max(batches) < 6
        assert server.stats().peak_blocks <= 2 * NEED


def test_what_mlx_lm_has_dropped_is_found_in_the_tree(path, expected):
    with asked(path, arguments={"prompt_cache_size": 1}) as server:
        for k in (0, 1, 2):
            assert server.text([{"role": "user", "content": words(20, 9 * k)}])
        assert server.text(CHATS[0]) == expected[0]
        assert server.text([{"role": "user", "content": words(20)}])
        found = server.chat(CHATS[0])
        assert found.choices[0].message.content == expected[0]
        assert found.usage.prompt_tokens_details.cached_tokens == PROMPT_TOKENS // 4 * 4
        found = server.chat([{"role": "user", "content": words(20, 9)}])
        assert found.usage.prompt_tokens_details.cached_tokens == 20


def test_one_at_a_time_and_caches_make_room(path, answer):
    chats = [[{"role": "user", "content": words(25, 5 * k)}] for k in range(5)]
    prompts, need = 25 + 3, -(-(25 + 3 + COUNT) // 4)
    with asked(path, num_blocks=need) as server:
        for messages in chats[:2]:
            assert server.text(messages) == answer(messages)
        assert texts(server.together(chats)) == [answer(messages) for messages in chats]
        assert server.stats().peak_blocks == need == -(-(prompts + COUNT) // 4)


def test_one_that_is_cancelled_gives_its_blocks_back(path, expected):
    with asked(path, num_blocks=2000) as server, ThreadPoolExecutor(2) as pool:
        long = server.chat([{"role": "user", "content": words(10, 70)}], 7000, stream=True)
        chunks = iter(long)
        for _ in range(3):
            next(chunks)
        beside = [pool.submit(server.text, chat) for chat in CHATS[:2]]
        long.close()
        assert [one.result() for one in beside] == expected[:2]
        stats = server.stats()
        # To its end it would have held 1754, and more than a minute.
        assert stats.peak_blocks < 1500
        # It is in no cache: what is held are the others' two.
        assert stats.num_blocks - stats.free_blocks <= 3 * NEED
        assert server.text(CHATS[2]) == expected[2]


def test_one_larger_than_the_store_fails_alone(path, expected):
    message = (
        "expected prompt and answer of 112 tokens at most, the whole paged store, got a prompt of "
    )
    with asked(path, num_blocks=28) as server, ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(server.text, chat) for chat in CHATS[:2]]
        with pytest.raises(openai.BadRequestError, match=f"{message}39 and max_tokens of 74"):
            server.text(CHATS[0], 112 - PROMPT_TOKENS + 1)
        with pytest.raises(openai.BadRequestError, match=f"{message}113 and max_tokens of 1"):
            server.chat([{"role": "user", "content": words(110)}], 1, stream=True)
        with pytest.raises(openai.BadRequestError):
            server.text(CHATS[0], 74, seed=3)  # such are served one by one
        assert [one.result() for one in beside] == expected[:2]
        assert server.chat(CHATS[0], 112 - PROMPT_TOKENS).usage.total_tokens == 112


def test_requests_that_mlx_lm_serves_one_by_one(path, other, expected):
    with asked(path, num_blocks=28) as server:
        for chat, text in zip(CHATS, expected, strict=True):
            assert server.text(chat, seed=1, temperature=0.0) == text
        assert server.stats().cached_tokens >= 5 * SYSTEM_TOKENS
    with asked(path, num_blocks=28, arguments={"draft_model": other}) as server:
        assert [server.text(chat) for chat in CHATS[:3]] == expected[:3]
        with pytest.raises(openai.BadRequestError):
            server.text(CHATS[0], 112 - PROMPT_TOKENS - 2)  # three more are drafted
    alone = {"draft_model": other, "prompt_cache_size": 0}
    with asked(path, num_blocks=28, arguments=alone) as server:
        assert [server.text(CHATS[0]) for _ in range(2)] == expected[:1] * 2


def test_prompts_with_images_are_not_looked_for_in_the_tree():
    model = small_model("llama")
    image = [1, 2, *[-(10**15)] * 4, 3, 4]  # as mlx-lm's server stands for an image in its keys
    with PagedStore(model, num_blocks=8, block_size=4) as store:
        caches = server.PromptCaches()
        caches.store = store
        cache = store.cache()
        model(mx.array([[1, 2, 5, 5, 5, 5, 3, 4]]), cache=cache)
        caches.insert_cache("m", image, cache)
        assert store.stats().cached_blocks == 0
        found, rest = caches.fetch_nearest_cache("m", [*image, 5])
        assert (found[0].offset, rest) == (8, [5])


def test_another_model_has_another_store(path, other, expected):
    answers = [reference(other)(chat) for chat in CHATS[:2]]
    with asked(path, limits=ANY_MODEL) as server:
        assert server.text(CHATS[0]) == expected[0]
        first = server.provider.store
        server.model = other
        assert [server.text(chat) for chat in CHATS[:2]] == answers
        with pytest.raises(PagedKVError, match="closed"):
            first.stats()
        second = server.provider.store
        server.model = "default_model"
        # Caches of the store that was closed are not found again.
        assert [server.text(chat) for chat in CHATS[:2]] == expected[:2]
        assert server.provider.store is not second


def test_a_model_that_cannot_be_paged_is_refused(path, folder, expected):
    odd = saved_model(folder / "odd", "gemma2")
    message = "gemma2 cannot be paged: layer 0 does not attend through mlx-lm's base"
    with asked(path, limits=ANY_MODEL) as server:
        for _ in range(2):
            server.model = odd
            with pytest.raises(openai.BadRequestError, match=message):
                server.text(CHATS[0])
        server.model = "default_model"
        assert server.text(CHATS[0]) == expected[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a budget, either --memory or --num-blocks"),
        (["--memory", "8 apples"], "expected memory in bytes or such as '8GB', got '8 apples'"),
        (["--memory", "8GB", "--num-blocks", "3"], "not allowed with argument --memory"),
        (["--num-blocks", "0"], "--num-blocks"),
        (["--memory", "8GB", "--block-size", "-1"], "--block-size"),
        (["--memory", "8GB", "--kv-bits", "3"], "--kv-bits: invalid choice: '3'"),
        (["--memory", "8GB", "--kv-bits", "4,8,4"], "--kv-bits: invalid choice: '4,8,4'"),
        (["--memory", "8GB", "--kv-bit", "4"], "--kv-bits of the paged store, got 4 for mlx-lm's"),
        (["--memory", "8GB", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_malformed_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        server.main(["--model", "m", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [([], None), (["--kv-bits", "8"], 8), (["--kv-bits=4"], 4), (["--kv-bits", "8,4"], (8, 4))],
)
def test_bits_are_the_stores(monkeypatch, arguments, bits):
    found = []

    def main():
        # As mlx-lm's own does, of what is left of the command line.
        assert "kv-bits" not in " ".join(sys.argv)
        server.server.run("127.0.0.1", 0, argparse.Namespace())

    monkeypatch.setattr(server, "serve", lambda *arguments, **options: None)
    monkeypatch.setattr(server, "Provider", lambda _, **budget: found.append(budget))
    monkeypatch.setattr(server.server, "main", main)
    server.main(["--model", "m", "--num-blocks", "3", *arguments])
    assert found == [{"memory": None, "num_blocks": 3, "block_size": 32, "kv_bits": bits}]


def test_a_store_of_few_bits_serves_a_batch_that_shares(path, batches):
    with asked(path, kv_bits=(8, 4)) as server:
        server.text(CHATS[0])
        batches.clear()
        found = server.together(CHATS)
        assert max(batches) == 6
        assert all(one.usage.completion_tokens == COUNT for one in found)
        for one in found:
            assert one.usage.prompt_tokens_details.cached_tokens >= SYSTEM_TOKENS
        alone = server.chat(CHATS[0], seed=1, temperature=0.0)  # such are served one by one
        assert alone.usage.prompt_tokens_details.cached_tokens >= SYSTEM_TOKENS
        assert server.stats().kv_bits == (8, 4)


def test_help_names_all_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        server.main(["--help"])
    printed = capsys.readouterr().out
    assert re.search(
        r"--memory BYTES.*--num-blocks.*--kv-bits BITS.*--decode-concurrency", printed, re.DOTALL
    )


def test_the_command_serves_and_ends(path, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--model", path, "--memory", "1MB", "--port", str(port), "--max-tokens", str(COUNT)]
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedkv.mlx_lm.server", *command],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for _ in range(200):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except ConnectionError:
                pass
            finally:
                connection.close()
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        clients = [socket.create_connection(("127.0.0.1", port), timeout=2) for _ in range(64)]
        process.send_signal(signal.SIGCONT)
        for waiting in clients:
            waiting.close()
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
            found = client.chat.completions.create(model="default_model", messages=CHATS[0])
        assert found.choices[0].message.content == expected[0]
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        assert "Paged store: 40 blocks of 24576 bytes" in printed
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
