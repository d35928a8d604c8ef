"""mlx-lm's server over a paged store: ``python -m pagedkv.mlx_lm.server --model M --memory 8GB``.

All of it is mlx-lm's own, `mlx_lm.server.main` and its options, but for three objects of it: the
provider of models opens a store for each, the cache of prompts keeps whole blocks in the store's
tree as well, and a request larger than the store is refused before it is answered. And clients that
come all at once wait: mlx-lm's own queue of connections has five places, the rest are cut off.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from pagedkv.attention.paths import backend_of
from pagedkv.limits import positive_int32
from pagedkv.mlx_lm.layer import sequences_of
from pagedkv.mlx_lm.routing import replaced
from pagedkv.mlx_lm.store import PagedStore, parse_bytes

CONNECTIONS = 128  # that wait until the server takes them
KV_BITS = {"8": 8, "4": 4, "8,4": (8, 4)}


class PromptCaches(LRUPromptCache):
    """mlx-lm's prompt caches, which a store may take back, and its tree beside them.

    Attributes
    ----------
    store : PagedStore or None
        Whose cached prefixes are looked for and kept; None: mlx-lm's caches are all there is.
    """

    store: PagedStore | None = None

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return a cache of the longest known prefix, and the rest of a prompt: a token at least.

        Parameters
        ----------
        model : hashable
            Which model it is for.
        tokens : list of int
            The prompt. Negative ones stand for images, which the tree does not know.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and not rest:
            # mlx-lm's server cannot begin with a prompt of which nothing is left.
            trimmed = can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1)
            cache, rest = (cache, tokens[-1:]) if trimmed else (None, tokens)
        if self.store is not None and min(tokens, default=-1) >= 0:
            found = self.store.cache(tokens)
            if found.cached > len(tokens) - len(rest):
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
            As mlx-lm has it.
        """
        kept = copy.copy(prompt_cache)
        prompt_cache.clear()
        sequences = sequences_of(kept)
        if sequences is not None:
            held = sequences.tables[0].num_tokens
            tokens = tokens[:held]  # with a draft model the last one is not in the caches
            if self.store is not None and held <= len(tokens) and min(tokens, default=-1) >= 0:
                self.store.keep(kept, tokens)
        super().insert_cache(model, tokens, kept, cache_type=cache_type)
        if sequences is not None:
            sequences.is_spare = True

    def give_up(self, _: int) -> bool:
        """Drop the cache that was not used for longest; return whether there was one."""
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
        Whether the model of the command line was loaded, and no other is being loaded.

    Raises
    ------
    ValueError
        If mlx-lm is to quantize K and V, or the model is to be shared with other processes.
    """

    def __init__(self, cli_args: argparse.Namespace, **budget: Any) -> None:
        self.store: PagedStore | None = None
        self.caches: PromptCaches | None = None
        self.is_ready = cli_args.model is None
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
            store.memory.givers.insert(0, self.caches.give_up)
            # Caches of a draft model would be missing in what the tree finds.
            self.caches.store = store if self.draft_model is None else None
        stats = store.stats()
        logging.info(f"Paged store: {stats.num_blocks} blocks of {stats.block_bytes} bytes")

    def check(self, prompt_tokens: int, args: Any) -> None:
        """Raise ValueError if a request is larger than the store."""
        if self.store is not None:
            drafted = args.num_draft_tokens if self.draft_model is not None else 0
            chunk = self.cli_args.prefill_step_size
            self.store.check(prompt_tokens, args.max_tokens, chunk, drafted)


class Responses(server.ResponseGenerator):
    """Answers as mlx-lm's server does; refuses prompts that are empty or larger than the store."""

    model_provider: Provider

    def __init__(self, model_provider: Provider, prompt_cache: PromptCaches) -> None:
        model_provider.caches = prompt_cache
        super().__init__(model_provider, prompt_cache)

    def _run_generate(self) -> None:
        try:
            super()._run_generate()  # type: ignore[no-untyped-call]
        finally:
            mx.clear_streams()  # of this thread: else MLX ends the process with an abort

    @property
    def is_healthy(self) -> bool:
        """Whether it answers requests now: not while a model is loaded."""
        return bool(super().is_healthy) and self.model_provider.is_ready

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
        if not found[0]:
            raise ValueError("expected a prompt of a token at least, got none")
        self.model_provider.check(len(found[0]), args)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run mlx-lm's server; `arguments` are the command line's, by default.

    Raises
    ------
    SystemExit
        If options are malformed, and after ``--help``.
    """
    parser = argparse.ArgumentParser(
        "python -m pagedkv.mlx_lm.server",
        description="mlx-lm's server over a paged store. All other options are mlx-lm's.",
        add_help=False,
        allow_abbrev=False,
    )
    budget = parser.add_mutually_exclusive_group()
    sizes = "memory of K and V, such as 8GB; 80%% of what the device has left, or auto"
    budget.add_argument("--memory", metavar="BYTES", help=sizes)
    budget.add_argument("--num-blocks", type=int, help="or the number of blocks")
    parser.add_argument("--block-size", type=int, default=32, help="tokens in a block (32)")
    kinds = "bits of K and V: 8, 4, or 8,4 for 8 of K and 4 of V"
    parser.add_argument("--kv-bits", metavar="BITS", choices=KV_BITS, help=kinds)
    own, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    elif own.memory is None and own.num_blocks is None:
        parser.error("expected a budget, either --memory or --num-blocks")
    try:
        for name in ("num_blocks", "block_size"):
            if getattr(own, name) is not None:
                positive_int32(getattr(own, name), f"--{name.replace('_', '-')}")
        if own.memory is not None:
            parse_bytes(own.memory)
        own.kv_bits = KV_BITS.get(own.kv_bits)
    except ValueError as error:
        parser.error(str(error))

    def provider(cli_args: argparse.Namespace) -> Provider:
        try:
            return Provider(cli_args, **vars(own))
        except ValueError as error:
            parser.error(str(error))

    before = sys.argv
    sys.argv = [parser.prog, *rest]
    try:
        with (
            replaced(
                server,
                ModelProvider=provider,
                ResponseGenerator=Responses,
                LRUPromptCache=PromptCaches,
            ),
            replaced(ThreadingHTTPServer, request_queue_size=CONNECTIONS),
        ):
            server.main()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
