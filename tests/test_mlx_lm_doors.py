"""What reaches the server from outside: each request is answered, and harms no other."""

import http.client
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
pytest.importorskip("openai", reason="the test group is not installed")
from mlx_lm.generate import GenerationBatch
from served_models import asked, await_health, command_of, saved_model, send, words

from pagedkv.mlx_lm import server
from pagedkv.mlx_lm.http import LARGEST_BODY, Limits

pytestmark = pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
COUNT = 6
VOCABULARY = 97


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def serving(path):
    with asked(path) as found:
        found.port = found.client.base_url.port
        yield found


def ask(serving, body, path=TEXT):
    status, _, content = send(serving.port, path, body)
    return status, json.loads(content)


def canary(serving):
    status, answer = ask(serving, {"prompt": words(9, 60), "max_tokens": COUNT})
    assert status == 200, answer
    return answer["choices"][0]["text"]


NAN, INFINITY = float("nan"), float("inf")
FIELDS = [
    *(("stop", x) for x in (5, 1.5, True, {}, [["a"]], [5], [None], "", [""], ["x"] * 65)),
    *(("stop", x) for x in ("x" * 1001, [{"a": 1}])),
    *(("temperature", x) for x in (-1, NAN, INFINITY, 1e-300, 1e300, "1", True, [1], {}, 10**400)),
    *(("top_p", x) for x in (-0.1, 1.1, NAN, INFINITY, "x", [0.5])),
    *(("min_p", x) for x in (-0.1, 1.1, NAN, -INFINITY, "x")),
    *(("top_k", x) for x in (-2, 0.5, 97, 98, 2**31, 2**63, 2**64, 10**30, "5", True)),
    *(("xtc_probability", x) for x in (-1, 2, NAN, "x")),
    *(("xtc_threshold", x) for x in (-1, 0.51, NAN, [])),
    *(("repetition_penalty", x) for x in (-1, NAN, INFINITY, 1e-30, 1e30, "x")),
    *(("repetition_context_size", x) for x in (-1, 2**31, 2**63, 10**30, 1.5, "x")),
    *(("presence_penalty", x) for x in (NAN, INFINITY, 1e30, "x", [])),
    *(("presence_context_size", x) for x in (-1, 2**40, "x")),
    *(("frequency_penalty", x) for x in (NAN, -INFINITY, -1e30, "x")),
    *(("frequency_context_size", x) for x in (-1, 2**40, "x")),
    *(("logit_bias", x) for x in ([], 5, {"97": 1}, {"-1": 1}, {"2147483648": 1}, {"1e3": 1})),
    *(("logit_bias", x) for x in ({"5": NAN}, {"5": 1e30}, {"5": "x"}, {"": 1}, {"\u0665": 1})),
    *(("max_tokens", x) for x in (0, -1, 1.5, 2**31, 2**63, 10**30, "5", True, [5])),
    *(("max_completion_tokens", x) for x in (0, -5, "x", 2**64)),
    *(("num_draft_tokens", x) for x in (0, -1, 65, 2**63, "x")),
    *(("seed", x) for x in (2**64, -(2**63) - 1, 1.5, "x", [1], 10**30)),
    *(("logprobs", x) for x in (-1, 12, "x", [1], 1.5)),
    *(("top_logprobs", x) for x in (-2, 12, "x", 2**63)),
    *(("model", x) for x in (5, [], "", {"a": 1})),
    *(("adapters", x) for x in (5, "no such adapters")),
    *(("draft_model", x) for x in (5, [])),
    *(("stream", x) for x in ("yes", 1, [])),
    *(("stream_options", x) for x in (5, {"include_usage": "x"}, [])),
    *(("n", x) for x in (0, 2, "1")),
    *(("best_of", x) for x in (2, 0)),
    ("echo", True),
    ("suffix", "x"),
    *(("prompt", x) for x in (5, {}, [{}], [1, "a"], [[1.5]], [True], [[-1]], [97], [[97]])),
    *(("prompt", x) for x in ([2**31], [10**30], "", [], [[]], ["a", []], ["w1"] * 129)),
]
CHATS = [
    {"messages": 5},
    {"messages": []},
    {"messages": ["x"]},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": 5, "content": "x"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [5]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"function": 5}]}]},
    {"messages": [{"role": "user", "content": "w1"}], "tools": 5},
    {"messages": [{"role": "user", "content": "w1"}], "tools": ["x"]},
    {"messages": [{"role": "user", "content": "w1"}], "role_mapping": 5},
    {"messages": [{"role": "user", "content": "w1"}], "role_mapping": {"user": 5}},
    {"messages": [{"role": "user", "content": "w1"}], "logprobs": 3},
    *(
        {"messages": [{"role": "user", "content": "w1"}], "chat_template_kwargs": {name: value}}
        for name, value in {
            "chat_template": "{% for a in range(9999999) %}{% endfor %}",
            "tokenize": False,
            "tools": [],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "padding": True,
            "return_dict": True,
            "return_tensors": "np",
            "max_length": 3,
            "conversation": [],
        }.items()
    ),
    {"messages": [{"role": "user", "content": "w1"}], "chat_template_kwargs": 5},
    {},
]
RAW = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b'{"prompt": "\xff"}',
    b"[" * 10_000,
    b'{"a":' * 5_000,
    b'{"prompt": NaN}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5_000 + b"}",
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a"} {}',
]


def test_bad_fields_are_named_and_the_server_goes_on(serving):
    expected, thread = canary(serving), serving.generator._generation_thread
    for number, (name, value) in enumerate(FIELDS):
        content = json.dumps({"prompt": "w1", "max_tokens": 2, name: value}).encode()
        status, _, answer = send(serving.port, TEXT, content)
        said = json.loads(answer)
        assert status in (400, 404), (name, value, said)
        error = said["error"]
        assert error["type"] == "invalid_request_error", (name, value, error)
        finite = b"NaN" not in content and b"Infinity" not in content and b"0" * 400 not in content
        assert error["param"] == name or not finite, (name, value, error)
        if number % 10 == 0:
            assert canary(serving) == expected
    assert canary(serving) == expected
    assert serving.generator._generation_thread is thread
    assert serving.generator.is_healthy


def test_bad_chats_and_bodies_are_refused_and_the_server_goes_on(serving):
    expected = canary(serving)
    for body in CHATS:
        status, answer = ask(serving, {"max_tokens": 2, **body}, CHAT)
        assert status == 400, (body, answer)
        assert answer["error"]["message"]
    for content in RAW:
        for path in (TEXT, CHAT):
            status, _, answer = send(serving.port, path, content)
            assert status == 400, (content[:50], answer)
            assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert canary(serving) == expected


def test_what_openais_clients_send_is_answered(serving):
    expected = canary(serving)
    plain = {"prompt": words(9, 60), "max_tokens": COUNT}
    nulls = [
        *("temperature", "top_p", "logprobs", "stream", "stop", "seed", "n", "logit_bias", "model"),
        *("stream_options", "max_completion_tokens", "presence_penalty", "suffix", "echo", "user"),
    ]
    for more in (
        dict.fromkeys(nulls),
        {"n": 1, "best_of": 1, "echo": False, "user": "me", "metadata": {"a": 1}},
        {"top_k": -1, "top_p": 1, "xtc_probability": 0, "xtc_threshold": 0},
        {"temperature": 0, "logit_bias": {}, "stop": "never said"},
        {"max_tokens": None, "max_completion_tokens": COUNT},
        {"model": "default_model"},
    ):
        status, answer = ask(serving, {**plain, **more})
        assert status == 200, (more, answer)
        assert answer["choices"][0]["text"] == expected
    for seed in (0, -1, -(2**63), 2**64 - 1):
        status, answer = ask(serving, {**plain, "seed": seed, "temperature": 0})
        assert (status, answer["choices"][0]["text"]) == (200, expected)
    status, answer = ask(serving, {**plain, "logprobs": 3})
    assert len(answer["choices"][0]["logprobs"]["content"]) == COUNT
    message = [{"role": "user", "content": words(3)}]
    for more in ({"logprobs": True, "top_logprobs": 11}, {"tools": None}, {"tools": []}):
        status, answer = ask(serving, {"messages": message, "max_tokens": 2, **more}, CHAT)
        assert status == 200, answer
    status, _, content = send(serving.port, TEXT, {**plain, "stream": True, "stream_options": {}})
    assert status == 200
    assert content.endswith(b"data: [DONE]\n\n")


def test_token_ids_are_a_prompt(serving):
    tokenizer = serving.provider.tokenizer
    ids = tokenizer.encode(words(9, 60))
    for prompt in (ids, [ids]):
        status, answer = ask(serving, {"prompt": prompt, "max_tokens": COUNT})
        assert (status, answer["choices"][0]["text"]) == (200, canary(serving))


def test_several_prompts_have_a_choice_each(serving):
    prompts = [words(5, 10 * k) for k in range(5)]
    alone = [
        ask(serving, {"prompt": prompt, "max_tokens": COUNT})[1]["choices"][0] for prompt in prompts
    ]
    status, answer = ask(serving, {"prompt": prompts, "max_tokens": COUNT})
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == list(range(5))
    assert [choice["text"] for choice in answer["choices"]] == [one["text"] for one in alone]
    assert answer["usage"]["completion_tokens"] == 5 * COUNT
    status, _, content = send(
        serving.port, TEXT, {"prompt": prompts, "max_tokens": COUNT, "stream": True}
    )
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = dict.fromkeys(range(5), "")
    for event in events[:-2]:
        if event.startswith("data: "):
            [choice] = json.loads(event.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
    assert [*texts.values()] == [one["text"] for one in alone]
    status, answer = ask(serving, {"prompt": ["w1", [97]], "max_tokens": 2})
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_an_error_of_the_loop_fails_what_it_held_and_no_more(serving, monkeypatch):
    expected = canary(serving)
    chats = [{"prompt": words(6, 7 * k), "max_tokens": 40} for k in range(4)]
    step, calls = server.BatchGenerator.next, []

    def fails(self):
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("the loop")
        return step(self)

    monkeypatch.setattr(server.BatchGenerator, "next", fails)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda body: ask(serving, body), chats))
    assert {status for status, _ in found} <= {200, 500}
    failed = [answer for status, answer in found if status == 500]
    assert failed
    assert all(one["error"]["type"] == "server_error" for one in failed)
    assert canary(serving) == expected
    assert serving.generator.is_healthy
    assert not serving.generator.held


def test_a_client_that_leaves_gives_its_blocks_back(path):
    """Not streaming, streaming, and one that waits for blocks."""
    with asked(path, num_blocks=100) as serving:
        port = serving.client.base_url.port
        for stream in (False, True):
            body = json.dumps({"prompt": words(9), "max_tokens": 380, "stream": stream}).encode()
            left = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
            for connection in left:
                head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
                connection.sendall(head.encode() + b"\r\n\r\n" + body)
            assert serving.wait(lambda: len(serving.generator.held) == 2)
            for connection in left:
                connection.close()
            assert serving.wait(lambda: not serving.generator.held)
            assert serving.stats().free_blocks >= 100 - 2 * 97


def test_only_the_model_that_is_served(serving, path):
    assert ask(serving, {"prompt": "w1", "max_tokens": 1, "model": path})[0] == 200
    before = serving.provider.store
    status, answer = ask(serving, {"prompt": "w1", "model": "mispelt/model"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert serving.provider.store is before
    status, _, content = send(serving.port, "/v1/models", b"", method="GET")
    assert (status, json.loads(content)["data"][0]["id"]) == (200, path)
    assert send(serving.port, f"/v1/models/{path}", b"", method="GET")[0] == 200
    assert send(serving.port, "/v1/models/none", b"", method="GET")[0] == 404


def test_a_misspelt_model_drops_nothing(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with asked(path, limits=Limits(any_model=True)) as serving:
        serving.port = serving.client.base_url.port
        expected, before = canary(serving), serving.provider.store
        for name in (str(tmp_path / "none"), str(tmp_path / "empty")):
            status, answer = ask(serving, {"prompt": "w1", "model": name})
            assert (status, answer["error"]["code"]) == (404, "model_not_found"), answer
            assert serving.provider.store is before
        assert canary(serving) == expected


def test_who_may_ask(path):
    limits, none = Limits(api_key="secret"), {"allowed_origins": []}
    with asked(path, arguments=none, limits=limits) as serving:
        port = serving.client.base_url.port
        body = {"prompt": "w1", "max_tokens": 1}
        key = {"Authorization": "Bearer secret"}
        assert send(port, TEXT, body, key)[0] == 200
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            status, _, content = send(port, TEXT, body, wrong)
            assert (status, json.loads(content)["error"]["code"]) == (401, "invalid_api_key")
        assert send(port, "/metrics", b"", method="GET")[0] == 401
        assert send(port, "/health", b"", method="GET")[0] == 200
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
            assert send(port, TEXT, body, {**key, "Host": host})[0] == 403
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80"):
            assert send(port, TEXT, body, {**key, "Host": host})[0] == 200
        assert send(port, TEXT, body, {**key, "Origin": "http://evil.example"})[0] == 403
        status, headers, _ = send(port, TEXT, body, key)
        assert not any(name.startswith("Access-Control") for name in headers)


def test_origins_that_are_allowed_are_answered(path):
    allowed = {"allowed_origins": ["http://good.example"]}
    with asked(path, arguments=allowed) as serving:
        port = serving.client.base_url.port
        origin = {"Origin": "http://good.example"}
        status, headers, _ = send(port, TEXT, {"prompt": "w1", "max_tokens": 1}, origin)
        assert status == 200
        assert headers["Access-Control-Allow-Origin"] == "http://good.example"
        assert send(port, TEXT, b"", origin, method="OPTIONS")[0] == 204


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Length": "-1"}, 400),
        ({"Content-Length": "x"}, 400),
        ({"Content-Length": "1e3"}, 400),
        ({"Content-Length": str(LARGEST_BODY + 1)}, 413),
        ({"Content-Length": "9" * 30}, 413),
        ({}, 411),
        ({"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_lengths(serving, headers, status):
    with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as connection:
        lines = [f"POST {TEXT} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert f" {status} ".encode() in connection.recv(100)


def test_paths(serving):
    for method in ("GET", "POST"):
        for path in ("/", "/v1", "/v1/embeddings", "/v1/completions/x", "/v1/modelsx"):
            status, _, content = send(serving.port, path, b"{}", method=method)
            assert status == 404
            assert json.loads(content)["error"]["message"]


def test_slow_clients_are_cut_off(path):
    limits = Limits(read_seconds=0.5, connections=3)
    with asked(path, limits=limits) as serving:
        port = serving.client.base_url.port
        slow = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3)]
        slow[1].sendall(b"POST /v1/completions HT")
        slow[2].sendall(f"POST {TEXT} HTTP/1.1\r\nContent-Length: 99\r\n\r\n{{".encode())
        for connection in slow:
            with connection:
                assert connection.recv(1) == b""
        assert send(port, TEXT, {"prompt": "w1", "max_tokens": 1})[0] == 200


def test_images_of_a_text_model_are_refused_before_they_are_fetched(serving):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        part = {"type": "image_url", "image_url": {"url": address}}
        body = {"messages": [{"role": "user", "content": [part]}]}
        status, answer = ask(serving, body, CHAT)
        assert (status, answer["error"]["param"]) == (400, "messages")
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):  # no connection was made
            listening.accept()


def test_a_template_of_a_request_is_taken_where_that_is_allowed(path):
    body = {
        "messages": [{"role": "user", "content": "w1"}],
        "max_tokens": 1,
        "chat_template_kwargs": {"chat_template": "w5 w6 w7"},
    }
    with asked(path, limits=Limits(request_templates=True)) as serving:
        serving.port = serving.client.base_url.port
        status, answer = ask(serving, body, CHAT)
        assert (status, answer["usage"]["prompt_tokens"]) == (200, 3)


def test_metrics(serving):
    canary(serving)
    status, headers, content = send(serving.port, "/metrics", b"", method="GET")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    text = content.decode()
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert float(values['pagedkv_requests_total{end="answered"}']) >= 1
    assert float(values['pagedkv_tokens_total{kind="answer"}']) >= COUNT
    assert float(values["pagedkv_time_to_first_token_seconds_count"]) >= 1
    assert float(values['pagedkv_blocks{state="all"}']) == 128
    assert float(values["pagedkv_requests_running"]) == 0


def test_metrics_are_read_while_nobody_changes_the_store(serving):
    """Reading takes dropped blocks back, which the thread that generates does, too."""
    store = serving.provider.store
    with ThreadPoolExecutor(1) as pool, store.exclusive():
        rendered = pool.submit(serving.generator.metrics.render)
        wait([rendered], 0.2)
        assert not rendered.done()
    assert b"pagedkv_blocks" in rendered.result()[0]


def test_one_that_waits_for_blocks_and_leaves_is_forgotten(path, monkeypatch):
    step = GenerationBatch._step

    def slow(self):
        time.sleep(0.01)
        return step(self)

    monkeypatch.setattr(GenerationBatch, "_step", slow)
    with asked(path, num_blocks=50) as serving:
        port = serving.port = serving.client.base_url.port
        running = json.dumps({"prompt": words(9), "max_tokens": 180, "stream": True}).encode()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(send, port, TEXT, running)
            assert serving.wait(lambda: len(serving.generator.held) == 1)
            waiting = socket.create_connection(("127.0.0.1", port))
            head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(running)}"
            waiting.sendall(head.encode() + b"\r\n\r\n" + running)
            assert serving.wait(lambda: len(serving.generator.held) == 2)
            waiting.close()
            assert serving.wait(lambda: len(serving.generator.held) == 1)
            assert not first.done()
            assert first.result()[0] == 200
        assert serving.stats().peak_blocks <= 50


def test_a_port_in_use_ends_the_process_with_a_sentence(path, monkeypatch):
    loaded = []
    monkeypatch.setattr(server.Provider, "load_default", lambda _: loaded.append(1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen at port {port} .*already in use"):
            server.main(["--model", path, "--memory", "1MB", "--port", str(port)])
    assert not loaded


def test_at_sigterm_running_answers_end_and_no_request_is_taken(path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = command_of(path, port, "--grace", "20")
    try:
        await_health(process, port)
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": words(9, 60), "max_tokens": 150}
            running = pool.submit(send, port, TEXT, {**body, "stream": True})
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            status, _, content = running.result()
            assert status == 200
            assert content.count(b"data: {") >= 150
            with pytest.raises(OSError, match=r"refused|reset"):
                send(port, TEXT, {"prompt": "w1", "max_tokens": 1})
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0, printed
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_what_is_far_too_large_never_reaches_the_generation_thread(serving, monkeypatch):
    expected, reached = canary(serving), []
    tokenize = server.Responses._tokenize
    monkeypatch.setattr(
        server.Responses, "_tokenize", lambda self, *a: reached.append(1) or tokenize(self, *a)
    )
    message = [{"role": "user", "content": "w1"}]
    for path, body in (
        (TEXT, {"prompt": "w1 " * 1_000_000}),
        (TEXT, {"prompt": [1] * 1_000_000}),
        (TEXT, {"prompt": "w1", "logit_bias": {str(n): 0 for n in range(2000)}}),
        (CHAT, {"messages": [{"role": "user", "content": "w1 " * 1_000_000}]}),
        (CHAT, {"messages": message * 20_000}),
    ):
        assert ask(serving, body, path)[0] == 400
    assert not reached
    assert canary(serving) == expected


def test_texts_are_tokenized_where_they_keep_no_other_request_waiting(serving, monkeypatch):
    threads, checked = [], server.Responses._checked

    def noting(self, *arguments):
        threads.append(threading.current_thread())
        return checked(self, *arguments)

    monkeypatch.setattr(server.Responses, "_checked", noting)
    canary(serving)
    assert threads
    assert serving.generator._generation_thread not in threads


def test_a_stream_of_several_prompts_tells_an_error(serving, monkeypatch):
    checked, calls = server.Responses._checked, []

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second")
        return checked(self, *arguments)

    monkeypatch.setattr(server.Responses, "_checked", fails)
    body = {"prompt": ["w1", "w2"], "max_tokens": 2, "stream": True}
    status, _, content = send(serving.port, TEXT, body)
    assert status == 200
    assert b'"type": "server_error"' in content
    status, answer = ask(serving, {"prompt": ["w1", [97]], "max_tokens": 2, "stream": True})
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_waiting_clients_that_leave_do_not_hold_up_a_batch(serving, monkeypatch):
    """Each is told to the loop once, beside what the batch has computed."""
    empty, batches = 0, server._Batches.next

    def noting(self):
        nonlocal empty
        prompts, answers = batches(self)
        empty += bool(prompts) and not answers and bool(len(self._generation_batch))
        return prompts, answers

    monkeypatch.setattr(server._Batches, "next", noting)
    long = json.dumps({"prompt": "w1", "max_tokens": 400, "stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(long)}\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(send, serving.port, TEXT, long)
        assert serving.wait(lambda: len(serving.generator.held) == 1)
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", serving.port)) as waiting:
                waiting.sendall(head.encode() + long)
                time.sleep(0.05)
        assert first.result()[0] == 200
    assert serving.wait(lambda: not serving.generator.held)
    assert empty <= 3


def test_one_that_is_tokenized_while_its_client_leaves_is_not_computed(serving, monkeypatch):
    check, in_it, may_go_on = server.Provider.check, threading.Event(), threading.Event()

    def slow(self, *arguments):
        in_it.set()
        assert may_go_on.wait(10)
        check(self, *arguments)

    monkeypatch.setattr(server.Provider, "check", slow)
    computed = []
    step = GenerationBatch._step

    def noting(self):
        time.sleep(0.01)
        computed.append(1)
        return step(self)

    monkeypatch.setattr(GenerationBatch, "_step", noting)
    body = json.dumps({"prompt": "w1", "max_tokens": 400}).encode()
    with socket.create_connection(("127.0.0.1", serving.port)) as leaving:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        leaving.sendall(head.encode() + body)
        assert in_it.wait(10)
    may_go_on.set()
    time.sleep(0.5)
    assert serving.wait(lambda: not serving.generator.held)
    assert len(computed) < 200


@pytest.mark.parametrize("seed", [None, 1])
def test_sigterm_ends_answers_that_take_longer_than_the_grace(path, seed):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = command_of(path, port, "--grace", "0.2", "--memory", "50MB")
    try:
        await_health(process, port)
        body = {"prompt": "w1", "max_tokens": 10_000, **({} if seed is None else {"seed": seed})}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(send, port, TEXT, body)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=20)
            assert process.returncode == 0, printed
            with suppress(OSError, http.client.HTTPException):
                assert running.result()[0] in (200, 500)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_model_that_cannot_be_loaded_ends_the_process_with_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemExit, match=f"cannot serve {tmp_path}: "):
        server.main(["--model", str(tmp_path), "--memory", "1MB", "--port", str(port)])


def test_refusals_are_counted_and_other_methods_are_answered_in_json(serving):
    def refused():
        text = send(serving.port, "/metrics", b"", method="GET")[2].decode()
        found = [x for x in text.splitlines() if x.startswith('pagedkv_requests_total{end="ref')]
        return float(found[0].split()[-1]) if found else 0

    before = refused()
    for method in ("PUT", "DELETE", "PATCH"):
        status, _, content = send(serving.port, TEXT, b"", method=method)
        assert (status, json.loads(content)["error"]["type"]) == (501, "server_error")
    assert ask(serving, {"prompt": 5})[0] == 400
    assert refused() == before + 1
    assert send(serving.port, "/v1/models?limit=3", b"", method="GET")[0] == 200
    body = {"prompt": "w1", "max_tokens": 1}
    assert send(serving.port, TEXT, body, {"Host": "LOCALHOST."})[0] == 200


def test_requests_share_within_a_salt(path):
    with asked(path) as serving:
        serving.port = serving.client.base_url.port

        def cached(**more):
            body = {"prompt": words(40), "max_tokens": 4, **more}
            status, answer = ask(serving, body)
            assert status == 200
            texts.append(answer["choices"][0]["text"])
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        texts = []
        for more in ({"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"cache_salt": "c", "seed": 1}):
            assert cached(**more) == 0
            assert cached(**more) >= 39
        serving.provider.caches.trim_to(n_sequences=0)  # what is left is in the store's tree
        for more in ({"cache_salt": "a"}, {"cache_salt": "b"}, {}):
            assert cached(**more) >= 36
        assert cached(cache_salt="d") == 0
        assert len(set(texts)) == 1
