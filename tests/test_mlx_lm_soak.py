"""A server under clients of all kinds: every answer as alone, all blocks back, memory flat.

PAGEDKV_SOAK_MINUTES in the environment says for how long; `make soak` sets it.
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
pytest.importorskip("openai", reason="the test group is not installed")
from served_models import await_health, command_of, saved_model, send, words
from test_mlx_lm_doors import FIELDS, TEXT

MINUTES = float(os.environ.get("PAGEDKV_SOAK_MINUTES", 0))
SECONDS, CLIENTS = (60 * MINUTES, 32) if MINUTES else (1, 4)
GROWTH = 1.05  # of memory, from the middle of a long run to its end
BODIES = [
    {"prompt": words(count, start), "max_tokens": answer}
    for count, start, answer in (
        *((count, 0, 3 + count % 11) for count in range(5, 300, 13)),  # with one beginning
        *((count, count, 1 + count % 50) for count in range(7, 300, 17)),
    )
][:: 1 if MINUTES else 4]


class Client:
    """Requests of all kinds, one after the other.

    Attributes
    ----------
    done : dict
        How many of each kind.
    """

    def __init__(self, port, alone, seed):
        self.port, self.alone, self.random = port, alone, random.Random(seed)
        kinds = (self.asks, self.asks, self.asks, self.reads_slowly, self.leaves, self.errs)
        self.kinds = (*kinds, self.asks_too_much)
        self.done = dict.fromkeys([kind.__name__ for kind in kinds], 0)

    def run(self, deadline):
        while time.monotonic() < deadline:
            kind = self.random.choice(self.kinds)
            kind(self.random.randrange(len(BODIES)))
            self.done[kind.__name__] = self.done.get(kind.__name__, 0) + 1
        return self.done

    def asks(self, which):
        status, _, content = send(self.port, TEXT, BODIES[which])
        assert (status, text_of(content)) == (200, self.alone[which])

    def reads_slowly(self, which):
        answer = self._stream(which)
        text = ""
        for line in answer:
            time.sleep(self.random.choice([0, 0, 0.01]))
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        assert text == self.alone[which]

    def leaves(self, which):
        answer = self._stream(which)
        for _ in range(self.random.randrange(4)):
            answer.readline()
        answer.close()
        self._connection.close()

    def errs(self, which):
        field, value = self.random.choice(FIELDS)
        status, _, _ = send(self.port, TEXT, {**BODIES[which], field: value})
        assert 400 <= status < 500, (field, value)

    def asks_too_much(self, which):
        status, _, content = send(self.port, TEXT, {**BODIES[which], "max_tokens": 100_000})
        assert status == 400
        assert json.loads(content)["error"]["param"] == "max_tokens"

    def _stream(self, which):
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        body = json.dumps({**BODIES[which], "stream": True})
        self._connection.request("POST", TEXT, body)
        answer = self._connection.getresponse()
        assert answer.status == 200
        return answer


def text_of(content):
    return json.loads(content)["choices"][0]["text"]


def largest(port):
    """A request that takes all blocks of the server, and its answer."""
    for count in range(320, 0, -1):
        body = {"prompt": words(1000), "max_tokens": count}
        status, _, content = send(port, TEXT, body)
        if status == 200:
            return body, text_of(content)
    raise AssertionError("expected a request that fits")


def resident(process):
    """Memory of a process in KiB."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(process.pid)]))


def test_a_server_for_a_long_time(tmp_path):
    path = saved_model(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open(tmp_path / "log", "w+") as log:
        process = command_of(path, port, stdout=log)
        try:
            await_health(process, port)
            alone = [text_of(send(port, TEXT, body)[2]) for body in BODIES]
            all_blocks, answer = largest(port)
            sizes, deadline = [], time.monotonic() + SECONDS
            with ThreadPoolExecutor(CLIENTS) as pool:
                clients = [Client(port, alone, seed) for seed in range(CLIENTS)]
                running = [pool.submit(client.run, deadline) for client in clients]
                while not all(one.done() for one in running):
                    time.sleep(SECONDS / 100)
                    sizes.append(resident(process))
                done = [one.result() for one in running]
            # It would wait for ever for a block that was lost.
            status, _, content = send(port, TEXT, all_blocks)
            assert (status, text_of(content)) == (200, answer)
            assert [text_of(send(port, TEXT, body)[2]) for body in BODIES] == alone
            print({kind: sum(each.get(kind, 0) for each in done) for kind in done[0]})
            print(f"resident, KiB: {sizes[len(sizes) // 3]} {sizes[len(sizes) // 2]} {sizes[-1]}")
            if MINUTES:
                third = len(sizes) // 3
                assert max(sizes[2 * third :]) < GROWTH * max(sizes[third : 2 * third])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        log.seek(0)
        assert "Traceback" not in log.read()
