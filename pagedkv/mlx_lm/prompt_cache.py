"""A prompt cache that knows which tokens it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from pagedkv.errors import PagedKVError
from pagedkv.mlx_lm.layer import sequences_of
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
        self._version, self._is_busy = self.sequences.version if layers else 0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        layers = [copy.deepcopy(layer, memo) for layer in self]
        other = PromptCache(layers, list(self.tokens), self.cached, self.namespace)
        is_known = self.held is not None and self._version == self.sequences.version
        other.held = copy.copy(self.held) if is_known else None
        return other

    @property
    def rest(self) -> list[int]:
        """The tokens left to compute."""
        return self.tokens[self.cached :]

    @property
    def sequences(self) -> Sequences:
        """What the paged layers share."""
        found = sequences_of(self)
        assert found is not None
        return found

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
        sequences = self.sequences
        sequences.memory.collect()
        if self._is_busy:
            raise PagedKVError("expected no other generation with this prompt cache under way")
        sequences.end()
        [table] = sequences.tables
        held = self.held if self._version == sequences.version else None
        if held is not None and options.get("input_embeddings") is None:
            tokens: Any = prompt.tolist()
            held = held[: table.num_tokens]
            cached = len(held)
            if cached < len(tokens) and tokens == self.tokens and tokens[:cached] == held:
                prompt, held = prompt[cached:], []
                if options.get("logits_processors"):
                    skipped = mx.array(tokens[:cached])
                    options["logits_processors"] = [
                        _after(skipped, each) for each in options["logits_processors"]
                    ]
            held = [*held, *tokens]
        else:
            held = None
        self._is_busy, self.held, self._trims = True, None, sequences.trims
        try:
            for token, logprobs in own(prompt, *arguments, **options):
                if held is not None:
                    held.append(token)
                yield token, logprobs
        except GeneratorExit:
            # Maybe out of the garbage collector, in the middle of a change of the pool.
            sequences.memory.endings.append(lambda: self._end(sequences, held, keeps=True))
            raise
        except BaseException:
            self._end(sequences, held, keeps=False)
            raise
        self._end(sequences, held, keeps=True)

    def _end(self, sequences: Sequences, held: list[int] | None, *, keeps: bool) -> None:
        """Note what the cache holds of `held`, all tokens that it may hold, and cache it."""
        self._is_busy = False
        if not sequences.memory.is_open:
            return
        sequences.end()
        [table] = sequences.tables
        if sequences.trims != self._trims:
            held = None
        if held is not None and len(held) >= table.num_tokens:
            self.held, self._version = held[: table.num_tokens], sequences.version
            if keeps:
                sequences.memory.keep(table, self.held, self.namespace)


def _after(
    skipped: mx.array, processor: Callable[[mx.array, mx.array], mx.array]
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a logits processor that sees the tokens which were not computed again, too."""
    return lambda tokens, logits: processor(
        mx.concatenate([skipped.astype(tokens.dtype), tokens]), logits
    )
