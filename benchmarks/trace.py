"""A trace of mixed requests, over mlx-lm with its own caches: tokens a second, and waiting.

Lengths of prompts and answers are log-normal, with medians of 1200 and 96 tokens on a GPU, clipped
to 32..12000 and 8..512. Half of the requests begin with one prefix of 1024 tokens, which comes
before the prompt's own. A CPU gets a few short ones. Both sides answer the same requests.
"""

import gc
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import generate
from .common import on_gpu, require_memory, settle
from .generate import BLOCK_SIZE, import_mlx_lm
from .server import MARKS, Server, budget_of, save_llama, text_of

SERVED = 32  # sequences that a server decodes at once
SIDES = "store", "mlx-lm"
TEMPLATE = 16  # tokens that a chat's template adds at most


@dataclass(frozen=True)
class Shape:
    """The sizes of a trace, in tokens.

    Attributes
    ----------
    requests : int
        Their number.
    prefix : int
        What half of the prompts share, before their own tokens.
    prompt, answer : tuple of (int, float, int, int)
        Median, standard deviation of the logarithm, least and most.
    slots : int
        Sequences that a `BatchGenerator` decodes at once.
    """

    requests: int
    prefix: int
    prompt: tuple
    answer: tuple
    slots: int


LARGE = Shape(96, 1024, (1200, 1.0, 32, 12000), (96, 0.8, 8, 512), 32)
SMALL = Shape(12, 32, (24, 0.7, 8, 128), (6, 0.4, 4, 8), 8)


@dataclass(frozen=True)
class Request:
    """A request of a trace.

    Attributes
    ----------
    prefix, own : list of int
        Tokens of the prompt; the prefix is shared or empty.
    answer : int
        Tokens of the answer.
    """

    prefix: list
    own: list
    answer: int

    @property
    def prompt(self):
        """All tokens of the prompt."""
        return self.prefix + self.own


def shape():
    """Return the shape of a trace that this machine answers in a minute."""
    return LARGE if on_gpu() else SMALL


def requests_of(shape, vocabulary, run=0):
    """Return the requests of a trace: always the same lengths, and other tokens in each run."""
    rng = np.random.default_rng(0)
    prompts, answers = (
        log_normal(rng, shape.requests, *sizes) for sizes in (shape.prompt, shape.answer)
    )
    shares = rng.permutation(shape.requests) < shape.requests // 2
    rng = np.random.default_rng(1 + run)
    prefix = rng.integers(0, vocabulary, shape.prefix).tolist()
    return [
        Request(prefix if shared else [], rng.integers(0, vocabulary, prompt).tolist(), int(answer))
        for shared, prompt, answer in zip(shares, prompts, answers, strict=True)
    ]


def log_normal(rng, count, median, deviation, least, most):
    """Return integers of a log-normal distribution, clipped."""
    drawn = median * np.exp(deviation * rng.standard_normal(count))
    return np.clip(np.rint(drawn), least, most).astype(int)


def percentile(values, share):
    """Return the value that `share` percent are at most, between two of them if need be."""
    return float(np.percentile(values, share))


def numbers_of(waits, num_tokens, seconds):
    """Return the numbers of a run.

    Parameters
    ----------
    waits : list of list of float
        For each request when its tokens came, in seconds since it did.
    num_tokens : int
        Tokens of all answers.
    seconds : float
        From the first request to the last token.
    """
    first = [times[0] for times in waits]
    between = np.concatenate([np.diff(times) for times in waits])
    return {
        "tokens_per_second": num_tokens / seconds,
        "first_token_p50": percentile(first, 50),
        "first_token_p95": percentile(first, 95),
        "between_tokens_p95": percentile(between, 95),
    }


def answer_all(model, requests, store=None):
    """Answer requests through `BatchGenerator`, in order, as many at once as it has slots.

    Parameters
    ----------
    model : nn.Module
        The model.
    requests : list of Request
        All are there at the beginning.
    store : PagedStore, optional
        Where their caches are, each made when its request begins, and kept when it ends; mlx-lm's
        own by default, which reuse nothing.

    Returns
    -------
    list of (list of int, list of float)
        For each request its tokens, and when each came, in seconds since the beginning.
    """
    from mlx_lm.generate import BatchGenerator

    slots = shape().slots
    generator = BatchGenerator(model, completion_batch_size=slots)
    waiting, found, running = deque(enumerate(requests)), [([], []) for _ in requests], {}
    began = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < slots:
            number, request = waiting.popleft()
            rest, caches, cached = request.prompt, None, 0
            if store:
                caches = [store.cache(rest)]
                cached = caches[0].cached
            [uid] = generator.insert(
                [rest[cached:]], [request.answer], caches=caches, all_tokens=[rest[:cached]]
            )
            running[uid] = number
        _, responses = generator.next()
        now = time.perf_counter() - began
        for response in responses:
            tokens, times = found[running[response.uid]]
            tokens.append(response.token)
            times.append(now)
            if response.finish_reason is not None:
                del running[response.uid]
                if store:
                    store.keep(response.prompt_cache, response.all_tokens)
    settle()
    generator.close()
    return found


def store_of(model, requests):
    """Return a store with room for the largest requests, as many as decode at once."""
    sizes = sorted(
        -(-(len(request.prompt) + request.answer) // BLOCK_SIZE) + 1 for request in requests
    )
    blocks = sum(sizes[-shape().slots :])
    return import_mlx_lm().PagedStore(model, num_blocks=blocks, block_size=BLOCK_SIZE)


def replay(model, requests, side):
    """Return the numbers of a run over a side, alone in memory."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    if side == "store":
        with store_of(model, requests) as store:
            found = answer_all(model, requests, store)
    else:
        found = answer_all(model, requests)
    waits = [times for _, times in found]
    seconds = max(times[-1] for times in waits)
    numbers = numbers_of(waits, sum(map(len, waits)), seconds)
    return {**numbers, "peak_memory": mx.get_peak_memory()}


class _Traced:
    """Numbers of a store's run over those of mlx-lm's.

    `setup_cache` computes all of them once. asv hands on whatever it returns but None.
    """

    version = "1"
    timeout = 1800
    unit = "x mlx-lm"
    better = "smaller"

    def setup(self, found, *cell):
        if not found:
            self.require()

    def require(self):
        """Raise NotImplementedError (n/a) where nothing is measured; return a model."""
        import_mlx_lm()
        model = generate.llama()
        tokens = sum(len(one.prompt) + one.answer for one in requests_of(shape(), 2))
        # All that is held at once, of a server besides what it keeps.
        require_memory(4 * tokens * generate.token_bytes(model))
        return model

    def over(self, found, name):
        """Return a number of the store's over mlx-lm's."""
        return found["store"][name] / found["mlx-lm"][name]


class Batched(_Traced):
    """A trace through mlx-lm's `BatchGenerator`, all of it there at the beginning.

    32 sequences decode at once, 8 on a CPU. The store keeps the caches that end, so that later
    requests find the shared prefix; `BatchGenerator` with its own caches reuses nothing. Waiting
    for a first token begins with the trace. Each side runs once before it is measured.
    """

    params = []
    param_names = []

    def setup_cache(self):
        try:
            model = self.require()
        except NotImplementedError:
            return {}
        requests = requests_of(shape(), model.args.vocab_size)
        found = {}
        for _ in "warm", "measured":
            found = {side: replay(model, requests, side) for side in SIDES}
        return found

    setup_cache.timeout = 1800

    def track_tokens_per_second(self, found):
        return self.over(found, "tokens_per_second")

    track_tokens_per_second.better = "larger"

    def track_first_token_p50(self, found):
        return self.over(found, "first_token_p50")

    def track_first_token_p95(self, found):
        return self.over(found, "first_token_p95")

    def track_between_tokens_p95(self, found):
        return self.over(found, "between_tokens_p95")

    def track_peak_memory(self, found):
        return self.over(found, "peak_memory")


def arrivals_of(count, rate):
    """Return when requests arrive, in seconds: Poisson, so many a second; None: all at once."""
    if rate is None:
        return [0.0] * count
    return np.cumsum(np.random.default_rng(0).exponential(1 / rate, count)).tolist()


def ask_all(server, requests, arrivals):
    """Stream the answers to requests as they arrive.

    Parameters
    ----------
    server : Server
        Whom to ask.
    requests : list of Request
        What to ask.
    arrivals : list of float
        When, in seconds since the beginning.

    Returns
    -------
    (list of (str, list of float, dict), float)
        For each request the text, when each part of it came, in seconds since the request did, and
        the usage that the server counted; and the seconds from the first arrival to the last token.
    """
    began = time.perf_counter()

    def ask(request, arrival):
        time.sleep(max(0.0, began + arrival - time.perf_counter()))
        roles = {"system": text_of(request.prefix), "user": text_of(request.own)}
        body = {
            "messages": [{"role": role, "content": text} for role, text in roles.items() if text],
            "max_tokens": request.answer,
            "temperature": 0,
        }
        parts = server.ask_again("/v1/chat/completions", body, server.stream)
        texts, times, usage = [], [], None
        for came, part in parts:
            usage = part.get("usage") or usage
            choices = part.get("choices") or [{}]
            if text := choices[0].get("delta", {}).get("content"):
                texts.append(text)
                times.append(came - began - arrival)
        if usage is None or usage["completion_tokens"] != request.answer:
            raise AssertionError(f"expected an answer of {request.answer} tokens, got {usage}")
        return "".join(texts), times, usage

    with ThreadPoolExecutor(len(requests)) as pool:
        found = list(pool.map(ask, requests, arrivals))
    ends = [arrival + times[-1] for arrival, (_, times, _) in zip(arrivals, found, strict=True)]
    return found, max(ends) - min(arrivals)


ARRIVALS = {"all at once": None, "half of capacity": 0.5, "at capacity": 1.0}
"""Of what a server answers in a second, how much arrives in one; None: all at once."""


def serve_all(server, sizes, vocabulary, capacity=None):
    """Return the numbers of a server by arrivals, and its capacity, requests a second.

    It answers a trace before it is measured. No run has the tokens of another.

    Parameters
    ----------
    server : Server
        Which one.
    sizes : Shape
        Of the traces.
    vocabulary : int
        Words that it knows.
    capacity : float, optional
        What arrivals are shares of; by default this server's, when all requests come at once.
    """
    count, found = sizes.requests, {}
    ask_all(server, requests_of(sizes, vocabulary), arrivals_of(count, None))
    for run, (arrivals, share) in enumerate(ARRIVALS.items(), 1):
        rate = None if share is None else share * capacity
        requests = requests_of(sizes, vocabulary, run)
        answers, seconds = ask_all(server, requests, arrivals_of(count, rate))
        capacity = capacity or count / seconds
        num_tokens = sum(request.answer for request in requests)
        found[arrivals] = numbers_of([times for _, times, _ in answers], num_tokens, seconds)
    return found, capacity


class Served(_Traced):
    """A trace through the package's server, streamed over loopback, over `mlx_lm.server`.

    Requests come all at once, or as a Poisson process of half as many or as many a second as
    mlx_lm.server answered when they came all at once. Waiting begins when a request arrives. Both
    servers reuse prefixes, and no run has tokens of another.
    """

    params = [["all at once", "half of capacity", "at capacity"]]
    param_names = ["arrivals"]
    unit = "x mlx_lm.server"

    def setup_cache(self):
        try:
            model = self.require()
        except NotImplementedError:
            return {}
        sizes, vocabulary = shape(), model.args.vocab_size - len(MARKS)
        requests = requests_of(sizes, vocabulary)
        lengths = sorted(len(one.prompt) + one.answer + TEMPLATE for one in requests)
        # What decodes at once, and as much that a server keeps of requests that ended.
        budget = budget_of(2 * sum(lengths[-SERVED:]) * generate.token_bytes(model))
        del model
        found, capacity = {}, None
        with tempfile.TemporaryDirectory() as folder:
            save_llama(folder)
            # The servers' MLX takes nearly all of the GPU's memory for granted.
            gc.collect()
            mx.clear_cache()
            for side, module, options in (
                ("mlx-lm", "mlx_lm.server", ()),
                ("store", "pagedkv.mlx_lm.server", budget),
            ):
                server = Server(module, folder, *options)
                try:
                    found[side], capacity = serve_all(server, sizes, vocabulary, capacity)
                except Exception as error:
                    raise RuntimeError(f"{module}: {error}\n{server.said()}") from error
                finally:
                    server.close()
        return {arrivals: {side: found[side][arrivals] for side in SIDES} for arrivals in ARRIVALS}

    setup_cache.timeout = 1800

    def track_tokens_per_second(self, found, arrivals):
        return self.over(found[arrivals], "tokens_per_second")

    track_tokens_per_second.better = "larger"

    def track_first_token_p50(self, found, arrivals):
        return self.over(found[arrivals], "first_token_p50")

    def track_first_token_p95(self, found, arrivals):
        return self.over(found[arrivals], "first_token_p95")

    def track_between_tokens_p95(self, found, arrivals):
        return self.over(found[arrivals], "between_tokens_p95")
