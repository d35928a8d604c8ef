"""mlx-lm's server over a paged store: ``pagedkv-server --model M --memory 8GB``.

This runs mlx-lm's `mlx_lm.server.main`, with its options and four replacements: `Provider` opens a
store for each model, `PromptCaches` also keeps whole blocks in the store's tree, `Responses` checks
each request and recovers from a failed generation, and `http` handles connections and access.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.utils import _download, load_config

from pagedkv.attention.paths import backend_of
from pagedkv.limits import positive_int32
from pagedkv.mlx_lm.http import LOOPBACK, Handler, Limits, Server, is_gone
from pagedkv.mlx_lm.layer import sequences_of
from pagedkv.mlx_lm.metrics import Metrics
from pagedkv.mlx_lm.prompt_cache import PromptCache
from pagedkv.mlx_lm.requests import RequestError, check_vocabulary
from pagedkv.mlx_lm.routing import replaced
from pagedkv.mlx_lm.store import PagedStore, parse_bytes

WATCH = 0.5  # seconds between looks at a client
API_KEY = "PAGEDKV_API_KEY"
STORE = "memory", "num_blocks", "block_size", "kv_bits"  # options of `PagedStore`
KV_BITS = {"8": 8, "4": 4, "8,4": (8, 4)}


class PromptCaches(LRUPromptCache):
    """mlx-lm's prompt caches, which a store may take back, and the store's own prefixes.

    Attributes
    ----------
    store : PagedStore or None
        The store whose cached prefixes are used as well; None: only mlx-lm's caches are.
    salt : str or None
        The `cache_salt` of the next request. Requests with different salts share nothing.
    """

    store: PagedStore | None = None
    salt: str | None = None

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return a cache of the longest known prefix, and the rest of a prompt: a token at least.

        Parameters
        ----------
        model : hashable
            Which model it is for.
        tokens : list of int
            The prompt. Negative ones stand for images, which the tree does not know.
        """
        salt = self.salt
        key = model if salt is None else (model, salt)
        cache, rest = super().fetch_nearest_cache(key, tokens)
        if cache is not None and not rest:
            # mlx-lm's server cannot start a prompt that has no token left to compute.
            trimmed = can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1)
            cache, rest = (cache, tokens[-1:]) if trimmed else (None, tokens)
        if self.store is not None and min(tokens, default=-1) >= 0:
            found = self.store.cache(tokens, namespace=salt)
            # If there is no other cache, this one: it knows the salt, and was looked up already.
            if cache is None or found.cached > len(tokens) - len(rest):
                return found, found.rest
        return cache, rest

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Take over the caches of a sequence; the list that they come in is empty then.

        The server's loop holds on to such lists, and their blocks could not be given up.

        Parameters
        ----------
        model : hashable
            Which model it is for.
        tokens : list of int
            What the caches hold, and what came after it.
        prompt_cache : list
            The layers' caches.
        cache_type : str
            As in mlx-lm.
        """
        kept = copy.copy(prompt_cache)
        prompt_cache.clear()
        sequences = sequences_of(kept)
        if sequences is not None:
            [table] = sequences.tables
            held, salt = table.num_tokens, table.namespace
            tokens = tokens[:held]  # with a draft model the last one is not in the caches
            if self.store is not None and held <= len(tokens) and min(tokens, default=-1) >= 0:
                self.store.keep(kept, tokens, namespace=salt)
            if salt is not None:
                model = model, salt
        if isinstance(kept, PromptCache):
            kept = kept.appending()  # mlx-lm gives only what follows
        super().insert_cache(model, tokens, kept, cache_type=cache_type)
        if sequences is not None:
            sequences.is_spare = True

    def give_up(self, _: int) -> bool:
        """Drop the least recently used cache; return whether there was one."""
        if not len(self):
            return False
        self.trim_to(n_sequences=len(self) - 1)
        return True


class Provider(server.ModelProvider):
    """Loads models as mlx-lm's server does, each with a store, one at a time.

    Parameters
    ----------
    cli_args : argparse.Namespace
        Of mlx-lm's server.
    budget
        Options of `PagedStore`.

    Attributes
    ----------
    store : PagedStore or None
        Of the model that is loaded.
    caches : PromptCaches or None
        The server's, which it makes after this.
    is_ready : bool
        Whether the model of the command line is loaded, and no other is being loaded.
    vocabulary : int
        Number of logits of the model.
    longest_token : int
        Characters of the longest token.

    Raises
    ------
    ValueError
        If mlx-lm would quantize K and V, or several processes would share the model.
    """

    def __init__(self, cli_args: argparse.Namespace, **budget: Any) -> None:
        self.store: PagedStore | None = None
        self.caches: PromptCaches | None = None
        self.is_ready = cli_args.model is None
        self.vocabulary = self.longest_token = 0
        self._budget = budget
        if cli_args.kv_bits is not None:
            raise ValueError(
                f"expected --kv-bits of the paged store, got {cli_args.kv_bits} for mlx-lm's cache"
            )
        super().__init__(cli_args)
        if self.is_distributed:
            raise ValueError("expected one process: a paged store is not shared by several")

    def reset(self) -> None:
        """Drop the model, its store, and all caches of it."""
        if self.caches is not None:
            self.caches.store = None
            self.caches.trim_to(n_sequences=0)
        if self.store is not None:
            self.store.close()
            self.store = None
        super().reset()

    def _load(self, *paths: Any, **more: Any) -> None:
        before, self.is_ready = self.is_ready, False
        try:
            self._load_with_store(*paths, **more)
            before = True
        finally:
            self.is_ready = before

    def _load_with_store(self, *paths: Any, **more: Any) -> None:
        super()._load(*paths, **more)  # type: ignore[no-untyped-call]
        try:
            model: Any = self.model
            tokenizer: Any = self.tokenizer
            self.vocabulary = model(mx.array([[0]])).shape[-1]
            self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)
            self.store = store = PagedStore(self.model, **self._budget)
            if backend_of(mx.default_device()) != "cpu":
                began = time.monotonic()
                logging.info("Compiling kernels, which takes up to 20 s once a machine")
                store.warm_up()
                logging.info(f"Compiled kernels in {time.monotonic() - began:.1f} s")
        except BaseException:
            self.reset()  # or the next request would be served without a store
            raise
        if self.caches is not None:
            store.memory.kv.pool.reclaimers.insert(0, self.caches.give_up)
            # Caches of a draft model would be missing in what the tree finds.
            self.caches.store = store if self.draft_model is None else None
        stats = store.stats()
        logging.info(f"Paged store: {stats.num_blocks} blocks of {stats.block_bytes} bytes")

    def check_paths(self, model: str | None, adapters: str | None, draft: str | None) -> None:
        """Raise RequestError for paths without a model, before the served model is dropped.

        Parameters
        ----------
        model, adapters, draft : str or None
            Those of a request; None for those of the command line.
        """
        for name, path in (("model", model), ("draft_model", draft), ("adapters", adapters)):
            if path in (None, "default_model", self.cli_args.model):
                continue
            try:
                folder = Path(path) if name == "adapters" else _download(path)
                if name != "adapters":
                    dict(load_config(folder))
                if not any(folder.glob("*.safetensors")):
                    raise FileNotFoundError("it has no weights")
            except Exception as error:
                raise RequestError(
                    f"there is nothing to load at {path}: {error}",
                    name,
                    status=404,
                    code="model_not_found",
                ) from error

    def check_size(self, size: int, tokens: Sequence[int]) -> None:
        """Refuse a prompt that is far too large, before the generation thread gets it.

        Parameters
        ----------
        size : int
            Characters, or tokens.
        tokens : sequence of int
            The prompt, if it was given as tokens.
        """
        store = self.store
        if store is None or not store.is_open:
            return
        most = store.memory.kv.num_blocks * store.memory.kv.block_size
        if not tokens:
            most *= self.longest_token
        if size > most:
            of = "tokens" if tokens else "characters"
            raise RequestError(f"expected {most} {of} at most, got {size}", "prompt")
        if tokens and self.cli_args.model is not None:
            check_vocabulary(self.vocabulary, tokens=tokens)

    def check(self, prompt_tokens: int, args: Any) -> None:
        """Raise ValueError if a request is larger than the store."""
        if self.store is not None:
            drafted = args.num_draft_tokens if self.draft_model is not None else 0
            chunk = self.cli_args.prefill_step_size
            self.store.check(prompt_tokens, args.max_tokens, chunk, drafted)


class _Queue:
    """The queue of a request's answer; tells `responses` about its end."""

    def __init__(self, own: Any, request: Any, responses: Responses) -> None:
        self._own, self._request, self._responses = own, request, responses
        self._context: Any = None
        request.stop = self.stop

    @property
    def is_over(self) -> bool:
        """Whether its client has left, or has the whole answer."""
        return self._context is not None and self._context._should_stop

    def stop(self) -> None:
        """End the request: nothing reads this queue any more."""
        self._request.is_over = True
        if self._context is not None:
            self._context.stop()

    def put(self, item: Any) -> None:
        """Hand over an item; None and an exception are the last."""
        if item is None or isinstance(item, Exception):
            self._responses.held.discard(self)
        elif isinstance(item, server.GenerationContext):
            self._responses.context = self._context = item
            if getattr(self._request, "is_over", False):
                item.stop()
        self._own.put(item)


class _Batches(BatchGenerator):
    """A batch generator that drops waiting sequences whose client has left.

    mlx-lm's server checks a client when it has a response, and a waiting request has none.
    """

    def __init__(self, responses: Responses, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._responses = responses
        self._contexts: dict[int, Any] = {}
        self._told: set[int] = set()  # that are to be removed

    def insert_segments(self, *arguments: Any, **options: Any) -> Any:
        """Insert as mlx-lm does; the sequence belongs to the context that the server made last."""
        uids = super().insert_segments(*arguments, **options)
        self._contexts.update(dict.fromkeys(uids, self._responses.context))
        return uids

    def next(self) -> Any:
        """Compute as mlx-lm does; add a response for each waiting sequence to be removed."""
        waiting = {sequence[0] for sequence in self._unprocessed_sequences}
        self._contexts = {uid: self._contexts[uid] for uid in waiting}
        stopped = {
            uid
            for uid, context in self._contexts.items()
            if context._should_stop and uid not in self._told
        }
        self._told = (self._told | stopped) & waiting
        prompts, answers = super().next()  # type: ignore[no-untyped-call]
        answer = PromptProcessingBatch.Response
        return [*prompts, *(answer(uid, (0, 1), False, False) for uid in stopped)], answers


class Responses(server.ResponseGenerator):
    """mlx-lm's response generator, with each request isolated from the others.

    A bad request is refused before it reaches the model. An error during generation fails only the
    requests that were in it.

    Attributes
    ----------
    metrics : Metrics
        Counts of the answers.
    held : set
        Queues of the requests that the generation thread has taken, and not ended.
    context : GenerationContext or None
        The newest one.
    error : Exception or None
        The error that ended the generation thread.
    when_failed : callable
        Called when that happens.
    """

    model_provider: Provider
    prompt_cache: PromptCaches

    def __init__(self, model_provider: Provider, prompt_cache: PromptCaches) -> None:
        model_provider.caches = prompt_cache
        self.metrics = Metrics(lambda: model_provider.store)
        self.held: set[_Queue] = set()
        self.context: Any = None
        self.error: Exception | None = None
        self.when_failed: Callable[[], object] = bool
        self._client, self._tokenizing = threading.local(), threading.Lock()
        super().__init__(model_provider, prompt_cache)

    def generate_for(
        self, connection: socket.socket, request: Any, arguments: Any, **options: Any
    ) -> tuple[Any, Iterator[Any]]:
        """Answer as `generate` does, while the client is connected.

        Raises
        ------
        ConnectionAbortedError
            If the client has left; the iterator raises it, too.
        """
        self._client.connection, self._client.looked = connection, time.monotonic()
        began = time.monotonic()
        provider, cli_args = self.model_provider, self.cli_args
        key = cli_args.model, cli_args.adapter_path, cli_args.draft_model
        is_own = (arguments.model.model, arguments.model.adapter) == ("default_model", None)
        if is_own and provider.model_key == key and provider.processor is None:
            # Here, where a long text keeps no other request waiting.
            with self._tokenizing:
                found = self._checked(provider.tokenizer, request, arguments)
            request.tokenized = key, found
        try:
            context, responses = self.generate(request, arguments, **options)
        except BaseException:
            request.is_over = True  # it may still wait for its turn
            getattr(request, "stop", bool)()
            raise
        return context, self.metrics.observed(context, responses, began)

    def _await_response(self, response_queue: Any) -> Any:
        while True:
            with suppress(Empty):
                found = response_queue.get(timeout=WATCH)
                if time.monotonic() - self._client.looked >= WATCH:
                    self._check_client()
                return found
            if not self.generation_available():  # type: ignore[no-untyped-call]
                raise RuntimeError("the generation thread has ended")
            self._check_client()

    def _check_client(self) -> None:
        self._client.looked = time.monotonic()
        if is_gone(self._client.connection):
            raise ConnectionAbortedError("the client has left")

    def _run_generate(self) -> None:
        generators: list[_Batches] = []

        def make(*arguments: Any, **options: Any) -> _Batches:
            generators[:] = [_Batches(self, *arguments, **options)]  # mlx-lm closed the one before
            return generators[0]

        try:
            with replaced(server, BatchGenerator=make):
                while not self._stop:
                    try:
                        self._generate()  # type: ignore[no-untyped-call]
                    except Exception as error:
                        if self.model_provider.model is None:
                            raise
                        self._recover(error, generators)
        except Exception as error:
            logging.exception(f"The generation thread ends: {error}")
            self._generation_failed, self.error = True, error
            self.when_failed()
        finally:
            self._fail_held(RuntimeError("the server ends"))
            mx.clear_streams()  # of this thread: else MLX ends the process with an abort

    def stop_and_join(self) -> None:
        """Stop, and end all answers."""
        self._stop = True
        for queue in list(self.held):
            queue.stop()
        super().stop_and_join()  # type: ignore[no-untyped-call]

    def _recover(self, error: Exception, generators: list[_Batches]) -> None:
        """Fail the requests of a failed generation, and free their blocks."""
        logging.error(f"A generation failed, with {len(self.held)} requests", exc_info=error)
        traceback.clear_frames(error.__traceback__)
        while generators:
            with suppress(Exception):  # of what failed
                generators.pop().close()  # type: ignore[no-untyped-call]
        self.context = None
        self._fail_held(RuntimeError(f"a generation failed: {error}"))
        gc.collect()

    def _fail_held(self, error: Exception) -> None:
        for queue in list(self.held):
            queue.put(error)

    def _next_request(self, timeout: float | None = None) -> Any:
        self.held = {queue for queue in self.held if not queue.is_over}
        found = super()._next_request(timeout)  # type: ignore[no-untyped-call]
        if found is None:
            return None
        own, *rest = found
        queue = _Queue(own, rest[0], self)
        self.held.add(queue)
        return queue, *rest

    @property
    def is_healthy(self) -> bool:
        """Whether it answers requests now; not while a model loads."""
        return bool(super().is_healthy) and self.model_provider.is_ready

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if getattr(request, "is_over", False):
            raise ConnectionAbortedError("the client has left")
        self.prompt_cache.salt = getattr(request, "salt", None)
        key, found = getattr(request, "tokenized", (None, None))
        if key is not None and key == self.model_provider.model_key:
            return found
        return self._checked(tokenizer, request, args)

    def _checked(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Return what mlx-lm's `_tokenize` does; RequestError for what the model cannot take."""
        caches = self.model_provider.caches
        if getattr(request, "salt", None) is not None and (caches is None or caches.store is None):
            raise RequestError("expected no cache_salt with a draft model", "cache_salt")
        size = self.model_provider.vocabulary
        check_vocabulary(
            size,
            top_k=args.sampling.top_k,
            top_logprobs=args.top_logprobs,
            logit_bias=args.logits.logit_bias,
        )
        if request.request_type == "text" and not isinstance(request.prompt, str):
            prompt = list(request.prompt)
            found: Any = prompt, [prompt], ["assistant"], "normal", None
        else:
            found = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
        if not found[0]:
            name = "messages" if request.request_type == "chat" else "prompt"
            raise RequestError("expected a prompt of a token at least, got none", name)
        if found[4] is None:  # no image, for which there are tokens beyond the vocabulary
            check_vocabulary(size, tokens=found[0])
        try:
            self.model_provider.check(len(found[0]), args)
        except ValueError as error:
            raise RequestError(str(error), "max_tokens") from None
        return found

    def _log_cache_stats(self) -> None:
        super()._log_cache_stats()  # type: ignore[no-untyped-call]
        if (store := self.model_provider.store) is not None:
            stats = store.stats()
            logging.info(
                f"Paged store: {stats.free_blocks} of {stats.num_blocks} blocks free, "
                f"{stats.cached_blocks} in cached prefixes, {stats.cached_tokens} of "
                f"{stats.asked_tokens} prompt tokens found in them"
            )


def serve(
    address: tuple[str, int],
    responses: Callable[[], Responses],
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    *,
    grace: float = 0.0,
    ready: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve until a signal, or until the `Server` is shut down.

    Parameters
    ----------
    address : (str, int)
        Host and port.
    responses : callable
        Makes the `Responses`, once the port is bound.
    limits : Limits
        Limits on clients.
    grace : float
        Seconds that running answers get after that.
    ready : callable
        Called with the `Server`.

    Raises
    ------
    OSError
        If the port cannot be bound. No model is loaded then.
    RuntimeError
        If the model of the command line cannot be loaded.
    """
    host, _ = address
    hosts = frozenset({*LOOPBACK, host}) if host in LOOPBACK else None
    with Server(address, limits.connections) as listening:
        kind = {"limits": limits, "hosts": hosts}
        handler = type("Handler", (Handler,), kind)
        fingerprint = server.get_system_fingerprint()
        answers = responses()
        listening.RequestHandlerClass = partial(handler, answers, system_fingerprint=fingerprint)
        try:
            answers.when_failed = partial(end, listening)
            if answers.error is None:
                ready(listening)
                listening.serve_forever()
            if answers.error is not None:
                raise RuntimeError(str(answers.error)) from answers.error
            listening.server_close()
            listening.wait(grace)
        finally:
            answers.stop_and_join()


def end(listening: Server) -> None:
    """Have a server stop listening, from any thread."""
    threading.Thread(target=listening.shutdown, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run mlx-lm's server; `arguments` are the command line's, by default.

    Raises
    ------
    SystemExit
        For malformed options, after ``--help``, and if the port is in use.
    """
    parser = argparse.ArgumentParser(
        "pagedkv-server",
        description="Serve a model with mlx-lm's server over a paged KV cache. All other options "
        "are mlx-lm's.",
        add_help=False,
        allow_abbrev=False,
    )
    budget = parser.add_mutually_exclusive_group()
    sizes = "memory for K and V: 8GB, 80%% of the memory that is left, or auto (80%%)"
    budget.add_argument("--memory", metavar="BYTES", help=sizes)
    count = "number of blocks, in place of --memory"
    budget.add_argument("--num-blocks", type=int, help=count)
    size = "tokens in a block (default: 32)"
    parser.add_argument("--block-size", type=int, default=32, help=size)
    kinds = "quantize K and V to 8 or 4 bits, or 8,4: K to 8 and V to 4"
    parser.add_argument("--kv-bits", metavar="BITS", choices=KV_BITS, help=kinds)
    doors = parser.add_argument_group("clients")
    key = f"key that clients must send (default: ${API_KEY})"
    doors.add_argument("--api-key", help=key)
    doors.add_argument(
        "--any-model", action="store_true", help="load any model that a request names"
    )
    doors.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="accept chat templates, which are programs, in requests",
    )
    seconds = "seconds that running answers get at SIGTERM (default: 30)"
    doors.add_argument("--grace", type=float, default=30.0, help=seconds)
    own, rest = parser.parse_known_args(arguments)
    options = {name: getattr(own, name) for name in STORE}
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    elif own.memory is None and own.num_blocks is None:
        parser.error("expected a budget, either --memory or --num-blocks")
    try:
        for name in ("num_blocks", "block_size"):
            if options[name] is not None:
                positive_int32(options[name], f"--{name.replace('_', '-')}")
        if own.memory is not None:
            parse_bytes(own.memory)
        options["kv_bits"] = KV_BITS.get(own.kv_bits)
        if not 0 <= own.grace < math.inf:
            raise ValueError(f"expected --grace in seconds, got {own.grace}")
    except ValueError as error:
        parser.error(str(error))
    limits = Limits(
        api_key=own.api_key or os.environ.get(API_KEY) or None,
        any_model=own.any_model,
        request_templates=own.trust_request_chat_template,
    )

    def run(host: str, port: int, cli_args: argparse.Namespace) -> None:
        if not 0 <= port < 2**16:
            parser.error(f"expected --port to be 0 to 65535, got {port}")
        if not any(option.split("=")[0] == "--allowed-origins" for option in rest):
            cli_args.allowed_origins = []

        try:
            provider = Provider(cli_args, **options)
        except ValueError as error:
            parser.error(str(error))

        def responses() -> Responses:
            return Responses(provider, PromptCaches(cli_args.prompt_cache_size))

        def ready(listening: Server) -> None:
            def stop(number: int, frame: Any) -> None:
                end(listening)

            signal.signal(signal.SIGTERM, stop)
            logging.info(f"Serving at http://{host}:{port}/v1")

        try:
            serve((host, port), responses, limits, grace=own.grace, ready=ready)
        except KeyboardInterrupt:
            pass
        except OSError as error:
            sys.exit(f"cannot listen at port {port} of {host}: {error.strerror or error}")
        except Exception as error:
            sys.exit(f"cannot serve {cli_args.model}: {error}")

    before = sys.argv
    sys.argv = [parser.prog, *rest]
    try:
        with replaced(server, ModelProvider=lambda cli_args: cli_args, run=run):
            server.main()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
