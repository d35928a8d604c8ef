"""A prompt cache that knows which tokens it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import ref

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import PagedKVError
from pagedkv.limits import integers
from pagedkv.mlx_lm.admission import CHUNK
from pagedkv.mlx_lm.layer import sequences_of
from pagedkv.mlx_lm.output import OutputLayer
from pagedkv.mlx_lm.routing import RoutedPrompt
from pagedkv.mlx_lm.sequences import Sequences


class PromptCache(list[Any], RoutedPrompt):
    """A prompt cache as mlx-lm takes it: a list of the layers' caches.

    mlx-lm takes the prompt that the cache was made for, whole, and computes what the cache does not
    hold; or, as with mlx-lm's own caches, a prompt that follows what the cache holds. Another
    prompt that begins with all tokens of the cache is refused with a `ValueError`: it could be
    either. At its end a generation gives the whole blocks of prompt and answer to the store's
    cached prefixes.

    Parameters
    ----------
    layers : list
        The layers' caches.
    tokens : ndarray or None
        The prompt it is made for, int64; None if its tokens are not known.
    cached : int
        How many tokens of the prompt are in the cache already.
    namespace : hashable
        Namespace of the prefixes that it shares.
    output : OutputLayer or None
        The model's output layer, if it can skip tokens of a pass.

    Attributes
    ----------
    cached, namespace
        As given.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        tokens: NDArray[np.int64] | None,
        cached: int,
        namespace: Hashable,
        output: OutputLayer | None,
    ) -> None:
        super().__init__(layers)
        self._output = output
        self._tokens = np.empty(0, np.int64) if tokens is None else tokens
        self.cached, self.namespace = cached, namespace
        self._held = None if tokens is None else tokens[:cached]
        self._version, self._trims = self.sequences.version if layers else 0, 0
        self._ending: ref[partial[None]] | None = None  # of the generation under way

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        held = self._known()
        layers = [copy.deepcopy(layer, memo) for layer in self]
        other = PromptCache(layers, self._tokens, self.cached, self.namespace, self._output)
        other._held = held
        return other

    @property
    def tokens(self) -> list[int]:
        """The prompt it was made for; empty if it is not known."""
        tokens: list[int] = self._tokens.tolist()
        return tokens

    @property
    def rest(self) -> list[int]:
        """The tokens of the prompt that are left to compute."""
        rest: list[int] = self._tokens[self.cached :].tolist()
        return rest

    @property
    def held(self) -> list[int] | None:
        """The tokens in the cache, from the first on.

        None if they are not known: during a generation, and after a forward pass of your own.
        """
        held = self._known()
        return None if held is None else held.tolist()

    def _known(self) -> NDArray[np.int64] | None:
        """Return the tokens in the cache, None if they are not known; end what was let go of."""
        with self.sequences.lock:
            self.sequences.memory.collect()
            if self._held is None or self._version != self.sequences.version:
                return None
            [table] = self.sequences.tables
            return self._held[: table.num_tokens]

    @property
    def sequences(self) -> Sequences:
        """The sequences that the paged layers share."""
        found = sequences_of(self)
        assert found is not None
        return found

    def appending(self) -> PromptCache:
        """Return a cache over the same tokens that appends every prompt to them.

        It does not know its tokens: it refuses no prompt, and the store does not cache its
        generations.
        """
        return PromptCache(self, None, 0, self.namespace, self._output)

    def begun(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens that a prompt begins with and the cache holds.

        These are all tokens of the cache if the prompt is the one it was made for, and none if the
        prompt follows them.

        Raises
        ------
        ValueError
            If it is another prompt that begins with all of them: it could be whole, or follow.
        """
        held = self._known()
        tokens = integers(prompt, "prompt") if len(prompt) else np.empty(0, np.int64)
        found: list[int] = [] if held is None else held[: self._count_begun(tokens, held)].tolist()
        return found

    def _count_begun(self, prompt: NDArray[np.int64], held: NDArray[np.int64]) -> int:
        """Return how many tokens `begun` does, of a prompt and what the cache holds."""
        count, whole = len(held), self._tokens
        if count < len(whole) and np.array_equal(whole[:count], held):
            if np.array_equal(prompt, whole):
                return count
            if np.array_equal(prompt, whole[count:]):
                return 0
        if count and np.array_equal(prompt[:count], held):
            raise ValueError(
                f"expected the prompt that the cache was made for, or what follows the {count} "
                "tokens that it holds, got another prompt that begins with these: "
                "store.cache(prompt) takes it whole, cache.appending() what follows"
            )
        return 0

    def generate(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        """Yield what `_generate` does, each token computed while no other thread uses the store."""
        memory = self.sequences.memory
        return memory.lock.each(memory.settle, self._generate(*arguments, **options))

    def _generate(
        self, own: Callable[..., Any], prompt: mx.array, model: Any, *stream: Any, **options: Any
    ) -> Iterator[Any]:
        """Yield what mlx-lm's `generate_step` does, without computing again what is cached.

        Parameters
        ----------
        own : callable
            mlx-lm's function.
        prompt : mx.array
            The whole prompt that the cache was made for, or what follows the tokens that it holds.
        model, stream, options
            Of `generate_step`.
        """
        sequences = self.sequences
        sequences.memory.collect()
        if self._ending is not None and self._ending() is not None:
            raise PagedKVError("expected no other generation with this prompt cache under way")
        sequences.end()
        held = self._known()
        if held is not None and options.get("input_embeddings") is None:
            tokens = np.array(prompt).astype(np.int64)
            if cached := self._count_begun(tokens, held):
                prompt = prompt[cached:]
                if options.get("logits_processors"):
                    skipped = mx.array(tokens[:cached].astype(np.int32))
                    options["logits_processors"] = [
                        _after(skipped, each) for each in options["logits_processors"]
                    ]
                held = tokens
            else:
                held = np.concatenate([held, tokens])
        else:
            held = None
        if self._output and joins_last_token() and options.get("input_embeddings") is None:
            chunk = options.get("prefill_step_size", CHUNK)
            model = held_back = _LastChunk(model, self._output, len(prompt), chunk)
            if (report := options.get("prompt_progress_callback")) is not None:
                options["prompt_progress_callback"] = held_back.reporting(report)
        answer: list[int] = []
        # Nothing but this generation holds it: whatever interrupts that, it is no longer under way.
        end = partial(self._end, sequences, held, answer)
        try:
            self._ending, self._held, self._trims = ref(end), None, sequences.trims
            for token, logprobs in own(prompt, model, *stream, **options):
                answer.append(token)
                yield token, logprobs
        except GeneratorExit:
            # Maybe out of the garbage collector, in the middle of a change of the pool.
            sequences.memory.endings.append(partial(end, keeps=True))
            raise
        except BaseException:
            end(keeps=False)
            raise
        end(keeps=True)

    def _end(
        self,
        sequences: Sequences,
        held: NDArray[np.int64] | None,
        answer: list[int],
        *,
        keeps: bool,
    ) -> None:
        """Note what the cache holds of `held` and an answer, all it may hold, and cache that.

        It can be called again after an interrupt.
        """
        self._ending = None
        [table] = sequences.tables
        if not sequences.memory.is_open or not table.is_in_use:
            return
        sequences.end()
        if held is None or sequences.trims != self._trims:
            return
        if answer:
            held = np.concatenate([held, np.array(answer, np.int64)])
        if len(held) >= table.num_tokens:
            self._held, self._version = held[: table.num_tokens], sequences.version
            if keeps:
                sequences.memory.keep(table, self._held, self.namespace)


def joins_last_token() -> bool:
    """Whether the last token of a prompt is computed in one pass with the chunk before it.

    On a GPU, where each pass has a fixed cost. mlx-lm computes it in a pass of its own and so never
    needs the last layer's output for the tokens before it: on a CPU that is worth more, a sixth of
    a prompt of 512 tokens in a model of 4 layers (2-core EPYC, MLX 0.32.4).
    """
    return mx.default_device().type == mx.gpu


def _after(
    skipped: mx.array, processor: Callable[[mx.array, mx.array], mx.array]
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a logits processor that sees the tokens which were not computed again, too."""
    return lambda tokens, logits: processor(
        mx.concatenate([skipped.astype(tokens.dtype), tokens]), logits
    )


class _LastChunk:
    """A model that computes the last chunk of a prompt and the token after it in one pass.

    mlx-lm computes that token, the only one whose logits it reads, in a pass of its own.

    Parameters
    ----------
    model : nn.Module
        The model.
    output : OutputLayer
        The model's.
    left : int
        Tokens of the prompt.
    chunk : int
        Most tokens of a pass.
    """

    def __init__(self, model: Any, output: OutputLayer, left: int, chunk: int) -> None:
        self._model, self._output, self._left, self._chunk = model, output, left, chunk
        self._held: mx.array | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: mx.array, **options: Any) -> Any:
        """Return the logits of tokens [1, Q]; None for a last chunk, which the next call runs."""
        self._left -= tokens.shape[1]
        if self._left == 1 and tokens.shape[1] < self._chunk:
            self._held = tokens
            return None
        held, self._held = self._held, None
        if held is None:
            return self._model(tokens, **options)
        together = mx.concatenate([held, tokens], axis=1)
        return self._output.seeing(_last, self._model, together, **options)

    def reporting(self, report: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Return a progress callback that does not report a chunk as done while it is held back."""

        def done(processed: int, total: int) -> None:
            if self._held is None:
                report(processed, total)

        return done


def _last(hidden: mx.array) -> mx.array:
    return hidden[:, -1:]
