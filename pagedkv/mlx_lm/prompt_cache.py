"""A prompt cache that knows which tokens it holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from pagedkv.mlx_lm.layer import PagedLayer
from pagedkv.mlx_lm.routing import RoutedPrompt
from pagedkv.mlx_lm.sequences import Sequences


class PromptCache(list[Any], RoutedPrompt):
    """A prompt cache as mlx-lm takes it: a list of the layers' caches.

    A generation with it begins after the tokens that it holds already, and gives the whole blocks
    of prompt and answer to the store's cached prefixes when it ends.

    Attributes
    ----------
    tokens : list of int
        The prompt it was made for; empty if that is not known.
    cached : int
        How many of its first tokens were in the cache at once.
    namespace : hashable
        Of the prefixes that it shares.
    held : list of int or None
        The tokens in the cache, from the first on; None if they are not known.
    """

    def __init__(
        self, layers: Sequence[Any], tokens: list[int] | None, cached: int, namespace: Hashable
    ) -> None:
        super().__init__(layers)
        self.tokens, self.cached, self.namespace = tokens or [], cached, namespace
        self.held = None if tokens is None else tokens[:cached]

    @property
    def rest(self) -> list[int]:
        """The tokens left to compute."""
        return self.tokens[self.cached :]

    @property
    def sequences(self) -> Sequences:
        """What the paged layers share."""
        return next(layer.sequences for layer in self if isinstance(layer, PagedLayer))

    def generate(
        self, own: Callable[..., Any], prompt: mx.array, *arguments: Any, **options: Any
    ) -> Iterator[Any]:
        """Yield what mlx-lm's `generate_step` does, without computing again what is cached.

        Parameters
        ----------
        own : callable
            mlx-lm's function.
        prompt : mx.array
            The whole prompt that the cache was made for, or what follows the tokens that it holds.
        arguments, options
            Of `generate_step`, but for the prompt.
        """
        [table] = self.sequences.tables
        held = self.held
        if options.get("input_embeddings") is not None or held is None:
            held = None
        elif len(held) != table.num_tokens:
            held = held[: table.num_tokens] if table.num_tokens < len(held) else None
        if held is not None:
            tokens: Any = prompt.tolist()
            if held and len(held) == self.cached and tokens == self.tokens:
                prompt, tokens = prompt[self.cached :], tokens[self.cached :]
            held = [*held, *tokens]
        self.held = None  # until it ends
        try:
            for token, logprobs in own(prompt, *arguments, **options):
                if held is not None:
                    held.append(token)
                yield token, logprobs
        except GeneratorExit:
            self._ended(held)
            raise
        self._ended(held)

    def _ended(self, held: list[int] | None) -> None:
        sequences = self.sequences
        sequences.end()
        [table] = sequences.tables
        if held is not None and len(held) >= table.num_tokens:
            self.held = held[: table.num_tokens]
            sequences.memory.keep(table, self.held, self.namespace)
