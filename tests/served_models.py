"""Small models in folders, as mlx-lm loads them, and a server of them over loopback."""

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
from small_models import config_of, small_model

from benchmarks.server import MARKS, save_served
from pagedkv.mlx_lm import server

WORDS = [f"w{number}" for number in range(97 - len(MARKS))]


def saved_model(folder, family="llama", seed=0):
    """Write a model and its tokenizer, which never ends an answer by itself; return its path."""
    folder.mkdir()
    save_served(small_model(family, seed), config_of(family), folder)
    return str(folder)


def words(count, start=0):
    """Text of so many tokens."""
    return " ".join(WORDS[(start + number) % len(WORDS)] for number in range(count))


def options(model, **others):
    """What mlx-lm's command line makes of its defaults."""
    found = {
        "model": model,
        "adapter_path": None,
        "draft_model": None,
        "num_draft_tokens": 3,
        "pipeline": False,
        "trust_remote_code": False,
        "chat_template": "",
        "use_default_chat_template": False,
        "chat_template_args": {},
        "allowed_origins": ["*"],
        "max_tokens": 512,
        "temp": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "decode_concurrency": 32,
        "prompt_concurrency": 8,
        "prefill_step_size": 7,
        "prompt_cache_size": 10,
        "prompt_cache_bytes": None,
        "kv_bits": None,
        "kv_group_size": 64,
        "quantized_kv_start": 0,
    }
    return argparse.Namespace(**{**found, **others})


def command_of(path, port, *more, stdout=subprocess.PIPE):
    memory = [] if "--memory" in more else ["--memory", "1MB"]
    options = ["--model", path, *memory, "--port", str(port), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "pagedkv.mlx_lm.server", *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
    )


def await_health(process, port):
    for _ in range(300):
        try:
            if send(port, "/health", b"", method="GET")[0] == 200:
                return
        except OSError:
            pass
        assert process.poll() is None
        time.sleep(0.1)


def send(port, path, content, headers=(), method="POST"):
    """Send bytes or JSON; return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    connection.request(method, path, content, dict(headers))
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


@contextmanager
def served(provider, limits=None, grace=0.0):
    """Serve what a provider loads; yield the address and what answers."""
    ready, found = threading.Event(), {}

    def responses():
        caches = server.PromptCaches(provider.cli_args.prompt_cache_size)
        found["responses"] = server.Responses(provider, caches)
        return found["responses"]

    def note(listening):
        found["server"] = listening
        ready.set()

    thread = threading.Thread(
        target=server.serve,
        args=(("127.0.0.1", 0), responses, limits or server.Limits()),
        kwargs={"ready": note, "grace": grace},
    )
    thread.start()
    try:
        assert ready.wait(10)
        address = found["server"].server_address
        yield f"http://127.0.0.1:{address[1]}/v1", found["responses"]
    finally:
        if "server" in found:
            found["server"].shutdown()
        thread.join(20)
        assert not thread.is_alive()


class Asked:
    """A client of a server, and the server's inside."""

    def __init__(self, url, generator):
        self.generator, self.provider = generator, generator.model_provider
        self.model = "default_model"
        self.client = openai.OpenAI(
            base_url=url,
            api_key="none",
            max_retries=0,
            timeout=20,
            http_client=openai.DefaultHttpxClient(verify=False),  # reading certificates takes long
        )

    def chat(self, messages, count=12, **more):
        return self.client.chat.completions.create(
            model=self.model, messages=messages, max_tokens=count, **more
        )

    def text(self, messages, count=12, **more):
        return self.chat(messages, count, **more).choices[0].message.content

    def together(self, chats):
        """Answers to requests that are all there before the first is begun."""
        generator = self.generator
        own = generator._next_request

        def when_all_are_there(timeout=None):
            if generator.requests.qsize() < len(chats):
                time.sleep(0.01)
                return None
            generator._next_request = own
            return own(timeout)

        generator._next_request = when_all_are_there
        time.sleep(0.2)  # until a look that was under way is over
        with ThreadPoolExecutor(len(chats)) as pool:
            return list(pool.map(self.chat, chats))

    def stats(self):
        """What the store holds once nothing is computed any more."""
        assert self.wait(lambda: all(x.is_spare for x in list(self.provider.store.memory.live)))
        return self.provider.store.stats()

    def wait(self, until):
        for _ in range(500):
            try:
                if until():
                    return True
            except RuntimeError:  # a set that the server changed meanwhile
                pass
            time.sleep(0.02)
        return False


def texts(answers):
    return [one.choices[0].message.content for one in answers]


@contextmanager
def asked(path, num_blocks=128, arguments=None, limits=None, **budget):
    """Ask a server; at the end no block is lost."""
    provider = server.Provider(
        options(path, **(arguments or {})), num_blocks=num_blocks, block_size=4, **budget
    )
    with served(provider, limits) as (url, generator):
        found = Asked(url, generator)
        assert found.wait(lambda: provider.is_ready)
        with found.client:
            yield found
            found.stats()
            memory = provider.store.memory
            provider.caches.trim_to(n_sequences=0)
            stats = found.stats()
            assert stats.free_blocks + stats.cached_blocks == stats.num_blocks
            assert memory.tree.evict(num_blocks) == stats.cached_blocks
            assert memory.kv.pool.num_free == num_blocks
