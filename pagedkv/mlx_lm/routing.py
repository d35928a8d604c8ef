"""Replaces functions of mlx-lm while a store is open; nothing else in the package does.

Models import the attention function by name, each into its own module. While a store is open, every
module that holds mlx-lm's own function holds ours instead, which handles the caches of a store and
passes all others to mlx-lm's. The same goes for the other functions in `_ROUTES`, and for the
methods of mlx-lm's batches in `_METHODS`.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.generate import generate_step as own_generate_step
from mlx_lm.generate import speculative_generate_step as own_speculative_generate_step
from mlx_lm.models import base
from mlx_lm.models import cache as caches

from pagedkv.errors import OutOfBlocksError
from pagedkv.host.sequence import prompt_ids
from pagedkv.mlx_lm.files import save_caches

Self = TypeVar("Self", bound="Closing")
_lock = threading.RLock()  # the garbage collector may close a store while another is opened
_open: set[object] = set()  # one for each store
_by_keys: weakref.WeakValueDictionary[int, Routed] = weakref.WeakValueDictionary()
"""Caches by the identity of the K that a layer was given last and may hand on to others."""


class Routed:
    """A layer's cache that attends by itself.

    Attributes
    ----------
    given_keys : mx.array or None
        K that was given last, if other layers may attend over it.
    """

    given_keys: mx.array | None = None

    def give(self, keys: mx.array) -> None:
        """Let layers that attend over the same K, and have no cache, come to `attend_again`."""
        self.given_keys, _by_keys[id(keys)] = keys, self

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        """Return the attention of a layer, with what it hands to mlx-lm's function."""
        raise NotImplementedError

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Return the attention of another layer over the K and V that were given last."""
        raise NotImplementedError

    def packs(self) -> bool:
        """Whether all layers take a pass `without_padding`."""
        return False

    def without_padding(self, counts: list[int]) -> AbstractContextManager[None]:
        """Let a pass compute `counts` new tokens of each sequence, one after the other."""
        raise NotImplementedError

    def size(self) -> int:
        """Return the tokens of the longest sequence."""
        raise NotImplementedError

    def unpaged(self) -> Any:
        """Return a cache of mlx-lm's own with the same tokens."""
        raise NotImplementedError

    def check_model(self, *models: Any) -> None:
        """Raise ValueError unless the layer belongs to one of some models."""

    def fingerprint(self) -> str | None:
        """Return what tells the model's weights from others, if there is a model."""
        return None


class RoutedPrompt:
    """A prompt cache that takes part in its generation.

    Attributes
    ----------
    looks_up : bool
        Whether to look up a cached prefix when its prompt begins.
    """

    looks_up = False

    def begun(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens that a prompt begins with and the cache holds, [] if it follows.

        ValueError if it could be either.
        """
        raise NotImplementedError

    def generate(
        self, own: Callable[..., Any], prompt: mx.array, *arguments: Any, **options: Any
    ) -> Any:
        """Return the result for `generate_step`; `own` is mlx-lm's."""
        raise NotImplementedError


class RoutedMaker:
    """A model's `make_cache` while it has a store; a copy of the model may keep it longer."""

    is_open = True
    memory: Any = None

    def __call__(self, tokens: Sequence[int] = (), namespace: Hashable = None) -> RoutedPrompt:
        """Return a prompt cache, for a prompt if it is known, as `PagedStore.cache` does."""
        raise NotImplementedError

    def check(self, prompt_tokens: int, max_tokens: int, chunk: int) -> None:
        """Raise ValueError for a request that can never be admitted."""
        raise NotImplementedError

    def admit(self, generator: BatchGenerator, count: int) -> int:
        """Return how many of the first `count` waiting sequences may be computed now."""
        raise NotImplementedError

    def shortage(self, generator: BatchGenerator) -> OutOfBlocksError:
        """Return the error to raise if none ever can."""
        raise NotImplementedError

    def keep(self, cache: Sequence[Any], tokens: Sequence[int]) -> None:
        """Cache a sequence that ended, if `tokens` are all of its tokens."""
        raise NotImplementedError


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend as mlx-lm does, over a store's pools if `cache` is a layer of a store."""
    if isinstance(cache, Routed):
        return cache.attend(queries, keys, values, scale, mask, sinks)
    giver = _by_keys.get(id(keys))
    if giver is not None and giver.given_keys is keys:
        return giver.attend_again(queries, scale, sinks)
    return own_attention(queries, keys, values, cache, scale, mask, sinks)


def generate_step(prompt: mx.array, model: Any, *stream: Any, **options: Any) -> Any:
    """Generate as mlx-lm does; a store's prompt cache leaves out what it holds already."""
    own, make, cache = _OWN["generate_step"], _maker(model), options.get("prompt_cache")
    _check_models(cache, model)
    if isinstance(cache, RoutedPrompt) or (cache is None and make):
        for name in ("kv_bits", "max_kv_size"):
            if options.get(name) is not None:
                hint = ": give kv_bits to PagedStore" if name == "kv_bits" else ""
                raise ValueError(
                    f"expected {name}=None over a paged store, got {options[name]}{hint}"
                )
        if cache is None and make:
            tokens: Any = [] if options.get("input_embeddings") is not None else prompt.tolist()
            options["prompt_cache"] = cache = make(tokens)
        assert cache is not None
        return cache.generate(own, prompt, model, *stream, **options)
    return own(prompt, model, *stream, **options)


def speculative_generate_step(
    prompt: mx.array, model: Any, draft_model: Any, *arguments: Any, **options: Any
) -> Any:
    """Generate as mlx-lm does, with caches of a store that belong to one of the models."""
    _check_models(options.get("prompt_cache"), model, draft_model)
    own = _OWN["speculative_generate_step"]
    items = own(prompt, model, draft_model, *arguments, **options)
    # Stores of both models in one order, or two threads might wait for each other.
    for make in sorted(filter(None, (_maker(model), _maker(draft_model))), key=id):
        items = make.memory.lock.each(make.memory.settle, items)
    return items


def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> Any:
    """Make a prompt cache as mlx-lm does; a model with a store has no cache of another size."""
    if max_kv_size is not None and _maker(model):
        raise ValueError(f"expected max_kv_size=None over a paged store, got {max_kv_size}")
    return _OWN["make_prompt_cache"](model, max_kv_size)


def _maker(model: Any) -> RoutedMaker | None:
    make = getattr(model, "make_cache", None)
    return make if isinstance(make, RoutedMaker) and make.is_open else None


def _check_models(cache: Any, *models: Any) -> None:
    """Raise ValueError if a layer of a prompt cache belongs to a store of none of some models."""
    for layer in cache or ():
        if isinstance(layer, Routed):
            layer.check_model(*models)


def save_prompt_cache(
    file_name: str, cache: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Save a prompt cache as mlx-lm does: of a paged one the tokens it holds, not the pools.

    The metadata of a paged one tell its model's weights from others, and damage.
    """
    own = _OWN["save_prompt_cache"]
    paged = [layer for layer in cache if isinstance(layer, Routed)]
    if not paged:
        own(file_name, cache, metadata)
        return
    unpaged = [layer.unpaged() if isinstance(layer, Routed) else layer for layer in cache]
    save_caches(own, file_name, unpaged, metadata, paged[0].fingerprint())


def insert_segments(
    generator: BatchGenerator,
    segments: Sequence[Sequence[Sequence[int]]],
    max_tokens: Sequence[int] | None = None,
    caches: Sequence[Any] | None = None,
    all_tokens: Sequence[list[int]] | None = None,
    *others: Any,
    **options: Any,
) -> Any:
    """Insert as mlx-lm does; of a whole prompt, only the tokens that its cache does not hold.

    A prompt without a cache looks up its cached prefix when it begins. If a request can never fit,
    all of them are refused.
    """
    for cache in caches or ():
        _check_models(cache, generator.model)
    if make := _maker(generator.model):
        for prompt in segments:
            for segment in prompt:
                if len(segment):
                    prompt_ids(segment)
        for cache in caches or ():
            if isinstance(cache, RoutedPrompt):
                cache.looks_up = False  # the caller's, to be filled itself
        segments, all_tokens = _left(segments, caches, all_tokens)
        caches = list(caches or [None] * len(segments))
        for place, (prompt, cache, known) in enumerate(
            zip(segments, caches, all_tokens, strict=False)
        ):
            if cache is None and len(prompt) == 1 and not known:
                caches[place] = make_prompt_cache(generator.model, generator.max_kv_size)
                caches[place].looks_up = True
        answers = max_tokens or [generator.max_tokens] * len(segments)
        held = [_held(cache) for cache in caches]
        for prompt, before, answer in zip(segments, held, answers, strict=False):
            make.check(before + sum(map(len, prompt)), answer, generator.prefill_step_size)
    own = _OWN_METHODS["insert_segments"]
    return own(generator, segments, max_tokens, caches, all_tokens, *others, **options)


def _left(
    prompts: Sequence[Sequence[Sequence[int]]],
    caches: Sequence[Any] | None,
    all_tokens: Sequence[list[int]] | None,
) -> tuple[list[Sequence[Sequence[int]]], list[list[int]]]:
    """Return the segments of each prompt that its cache does not hold, and the tokens it holds.

    A caller that says which tokens a cache holds gives what follows them.
    """
    left: list[Sequence[Sequence[int]]] = list(prompts)
    known = list(all_tokens or [[] for _ in prompts])
    for place, (prompt, cache, held) in enumerate(zip(prompts, caches or (), known, strict=False)):
        if isinstance(cache, RoutedPrompt) and not held:
            known[place] = begun = cache.begun([token for segment in prompt for token in segment])
            rest, count = [], len(begun)
            for segment in prompt:
                rest.append(segment[count:])
                count = max(count - len(segment), 0)
            left[place] = rest
    return left, known


def _held(cache: Any) -> int:
    """Return the tokens in a prompt cache of a store."""
    return next((layer.size() for layer in cache or () if isinstance(layer, Routed)), 0)


def _make_batch(generator: BatchGenerator, n: int) -> Any:
    """Begin with waiting sequences as mlx-lm does, over a store only with those that fit now."""
    make = _maker(generator.model)
    return _OWN_METHODS["_make_batch"](generator, make.admit(generator, n) if make else n)


def _next(generator: BatchGenerator) -> Any:
    """Compute as mlx-lm does; raise OutOfBlocksError if all there is waits, before it begins."""
    make, own = _maker(generator.model), _OWN_METHODS["_next"]
    found = own(generator)
    if make and not any(found) and generator._unprocessed_sequences:
        gc.collect()  # caches in a circle, as an error with its traceback is
        found = own(generator)
        if not any(found):
            raise make.shortage(generator)
    return found


def next_tokens(batch: GenerationBatch) -> Any:
    """Compute a step as mlx-lm does, and cache the prefixes of sequences that ended."""
    responses = _OWN_METHODS["next"](batch)
    if make := _maker(batch.model):
        for response in responses:
            if response.prompt_cache is not None:
                make.keep(response.prompt_cache, response.all_tokens)
    return responses


def prompt(batch: PromptProcessingBatch, tokens: Sequence[list[int]]) -> None:
    """Compute prompts as mlx-lm does; those of a store without padding.

    All tokens are in one pass, [B, Q] of prompts of one length or else [T, 1], one prompt after the
    other: each token is a row with a position of its own, which is all that a model has to know.
    """
    lead, chunk = next(iter(batch.prompt_cache), None), batch.prefill_step_size
    is_known = isinstance(lead, Routed) and lead.packs() and len(batch.uids) == len(tokens)
    if not is_known or not any(tokens):
        _OWN_METHODS["prompt"](batch, tokens)
        return
    assert isinstance(lead, Routed)
    passes = [
        [own[start : start + chunk] for own in tokens]
        for start in range(0, max(map(len, tokens)), chunk)
    ]
    for held, more in zip(batch.tokens, tokens, strict=True):
        held += more
    for now in passes:
        counts = [len(own) for own in now]
        rows = [own for own in now if own]
        is_even = len({*map(len, rows)}) == 1
        flat = rows if is_even else [[token] for own in rows for token in own]
        with lead.without_padding(counts):
            batch.model(mx.array(flat), cache=batch.prompt_cache)
        mx.eval([layer.state for layer in batch.prompt_cache])
        mx.clear_cache()


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of a generator wait while another thread uses its model's store."""

    @wraps(method)
    def alone(generator: BatchGenerator, *arguments: Any, **options: Any) -> Any:
        if (make := _maker(generator.model)) is None:
            return method(generator, *arguments, **options)
        with make.memory.lock.until(make.memory.settle):
            return method(generator, *arguments, **options)

    return alone


_METHODS: dict[str, Callable[..., Any]] = {
    "insert_segments": _alone(insert_segments),
    "_make_batch": _make_batch,
    "_next": _alone(_next),
    "remove": _alone(BatchGenerator.remove),
    "extract_cache": _alone(BatchGenerator.extract_cache),
    "prompt": prompt,
    "next": next_tokens,
}
_CLASSES = dict.fromkeys(_METHODS, BatchGenerator) | {
    "prompt": PromptProcessingBatch,
    "next": GenerationBatch,
}
_OWN_METHODS: dict[str, Callable[..., Any]] = {
    name: vars(_CLASSES[name])[name] for name in _METHODS
}
_ROUTES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attend,
    "generate_step": generate_step,
    "speculative_generate_step": speculative_generate_step,
    "make_prompt_cache": make_prompt_cache,
    "save_prompt_cache": save_prompt_cache,
}
_OWN: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": base.scaled_dot_product_attention,
    "generate_step": own_generate_step,
    "speculative_generate_step": own_speculative_generate_step,
    "make_prompt_cache": caches.make_prompt_cache,
    "save_prompt_cache": caches.save_prompt_cache,
}


own_attention: Callable[..., mx.array] = _OWN["scaled_dot_product_attention"]


def _replace(old: dict[str, Callable[..., Any]], new: dict[str, Callable[..., Any]]) -> None:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("__name__") != __name__:
            for name, function in new.items():
                if names.get(name) is old[name]:
                    setattr(module, name, function)


def _replace_methods(methods: dict[str, Callable[..., Any]]) -> None:
    for name, function in methods.items():
        setattr(_CLASSES[name], name, function)


class Closing:
    """An object that opens routes, and closes them at the end of a ``with``."""

    def close(self) -> None:
        """Restore mlx-lm."""
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_routes(owner: object) -> Callable[[], object]:
    """Replace the functions for one more store; models that are imported later get ours.

    Parameters
    ----------
    owner : object
        The store; when it is collected, the replacement is undone, too.

    Returns
    -------
    callable
        Undoes the replacement, and can be called again after an interrupt; that of the last store
        restores mlx-lm.
    """
    opened = object()
    weakref.finalize(owner, _close_routes, opened).atexit = False
    with _lock:
        _open.add(opened)
        _replace(_OWN, _ROUTES)
        _replace_methods(_METHODS)
    return partial(_close_routes, opened)


def _close_routes(opened: object) -> None:
    with _lock:
        if _open == {opened}:
            _replace(_ROUTES, _OWN)
            _replace_methods(_OWN_METHODS)
        _open.discard(opened)


@contextmanager
def replaced(module: ModuleType | type, **others: Any) -> Iterator[None]:
    """Return a context manager in which a module or class has other objects by these names."""
    own = {name: getattr(module, name) for name in others}
    try:
        for name, other in others.items():
            setattr(module, name, other)
        yield
    finally:
        for name, before in own.items():
            setattr(module, name, before)
