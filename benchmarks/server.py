"""What clients of a server get: requests a second, over `mlx_lm.server` as it is.

Each server is a process of its own, as its users start it; both serve the random llama of
`generate.py` over loopback and know nothing of each other but that they share the device.
"""

import dataclasses
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import generate
from .common import on_gpu, require_memory

START = 60.0  # seconds that a server may take to begin
PATIENCE = 300.0  # seconds that a client waits for an answer

MARKS = ["<eos>", "<unk>", "system", "user", "assistant", "end"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_served(model, config, folder):
    """Write a model as mlx-lm loads it, with a tokenizer of words: `w0`, `w1`, ..., a token each.

    Parameters
    ----------
    model : mlx.nn.Module
        The model.
    config : dict
        Its sizes; `vocab_size` words and marks are tokens.
    folder : pathlib.Path
        Where to; it exists.
    """
    from mlx_lm.utils import save_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    words = [f"w{number}" for number in range(config["vocab_size"] - len(MARKS))]
    known = {word: place for place, word in enumerate([*MARKS, *words])}
    tokenizer = Tokenizer(WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


class RefusedError(RuntimeError):
    """Raised if a server answers, but not with what was asked for."""


class Server:
    """A server in a process of its own, until `close`."""

    def __init__(self, module, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", module, "--model", str(folder), "--port", str(self.port)]
        path = os.pathsep.join(filter(None, sys.path))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until `close`
        self.process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def _await(self):
        deadline = time.monotonic() + START
        while True:
            try:
                self.ask("GET", "/health")
            except (OSError, RefusedError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"a server did not start: {self.said()}") from None
                time.sleep(0.1)
            else:
                return

    def ask(self, method, path, body=None):
        """Return the answer to a request, from JSON; RefusedError if it is not 200."""
        with self._answer(method, path, body) as response:
            return json.loads(response.read())

    @contextmanager
    def _answer(self, method, path, body):
        """Hand out the answer to a request while its connection is open."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, body and json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                text = response.read()
                raise RefusedError(f"{path} was answered by {response.status}: {text!r}")
            yield response
        finally:
            connection.close()

    def ask_again(self, path, body, ask=None):
        """Ask until the server takes the connection: mlx-lm's cuts off all but five that wait.

        `ask` is what asks, `ask` of this server by default.
        """
        while True:
            try:
                return (ask or self.ask)("POST", path, body)
            except ConnectionError:
                if self.process.poll() is not None:
                    raise
                time.sleep(0.05)

    def stream(self, method, path, body):
        """Return the parts of a streamed answer, from JSON, and when each came, in seconds."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._answer(method, path, body) as response:
            parts = []
            for line in response:
                kind, _, text = line.decode().strip().partition(": ")
                if kind == "data" and text != "[DONE]":
                    parts.append((time.perf_counter(), json.loads(text)))
            return parts

    def said(self):
        """Return what it printed, but for the requests that it logs."""
        self.log.seek(0)
        return "".join(line for line in self.log if '"GET ' not in line)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.log.close()


def save_llama(folder):
    """Write the random llama of `generate.py` as `save_served` does; return it."""
    model = generate.llama()
    sizes = dataclasses.asdict(model.args).items()
    save_served(model, {name: size for name, size in sizes if size is not None}, Path(folder))
    return model


def text_of(tokens):
    """Return text of tokens, the numbers of words."""
    return " ".join(f"w{token}" for token in tokens)


def budget_of(num_bytes):
    """Return the option of a server that gives a store so many bytes."""
    return "--memory", f"{-(-num_bytes // 2**20)}MiB"


class Requests:
    """Requests a second of clients that share a system prompt, over those of `mlx_lm.server`.

    Each client asks for an answer, and when it is there for another, with a question of its own.
    """

    version = "1"
    params = [[1, 32]]
    param_names = ["clients"]
    timeout = 900
    warmup_time = 0.0
    repeat = (3, 10, 30.0)
    unit = "x mlx_lm.server"
    better = "larger"
    own = paged = folder = None

    def setup(self, clients):
        generate.import_mlx_lm()
        # Requests of a client in a sample; tokens that all share, of a question, of an answer.
        sizes = (2, 2048, 64, 32) if on_gpu() else (1, 128, 16, 8)
        self.requests, self.shared, self.question, self.answer = sizes
        self.folder = tempfile.TemporaryDirectory()
        model = save_llama(self.folder.name)
        self.vocabulary = model.args.vocab_size - len(MARKS)
        # Of each client, and of ten prompts that either server keeps.
        tokens = (self.shared + self.question + self.answer + 8) * (clients + 10)
        num_bytes = tokens * generate.token_bytes(model)
        require_memory(4 * num_bytes)
        self.rng = np.random.default_rng(0)
        self.system = self.words(self.shared)
        del model
        self.own = Server("mlx_lm.server", self.folder.name)
        budget = budget_of(num_bytes)
        self.paged = Server("pagedkv.mlx_lm.server", self.folder.name, *budget)
        self.pool = ThreadPoolExecutor(clients)

    def teardown(self, clients):
        for server in (self.own, self.paged):
            if server is not None:
                server.close()
        if self.folder is not None:
            self.folder.cleanup()

    def words(self, count):
        """Return text of so many random tokens."""
        return text_of(self.rng.integers(0, self.vocabulary, count))

    def answers(self, server, clients):
        """Ask for all answers of a sample, and return them."""
        questions = [
            [self.words(self.question) for _ in range(self.requests)] for _ in range(clients)
        ]

        def client(own):
            found = []
            for question in own:
                roles = {"system": self.system, "user": question}
                messages = [{"role": role, "content": text} for role, text in roles.items()]
                body = {"messages": messages, "max_tokens": self.answer, "temperature": 0}
                found.append(server.ask_again("/v1/chat/completions", body))
            return found

        return [answer for found in self.pool.map(client, questions) for answer in found]

    def ratio_requests_per_second(self, clients):
        # A ratio of speeds: mlx-lm's time over the store's.
        return (lambda: self.answers(self.own, clients), lambda: self.answers(self.paged, clients))
