"""A model's paged store: pools of its layers, cached prefixes, and caches for mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from pagedkv.attention.codes import bits_of_each
from pagedkv.cache.device_memory import check_room, device_memory
from pagedkv.errors import OutOfBlocksError, PagedKVError
from pagedkv.host.turns import FairLock, synchronized
from pagedkv.limits import integers
from pagedkv.mlx_lm.admission import CHUNK, Admission
from pagedkv.mlx_lm.files import fingerprint, read_caches
from pagedkv.mlx_lm.layer import Content, PagedLayer, sequences_of
from pagedkv.mlx_lm.memory import Memory
from pagedkv.mlx_lm.output import OutputLayer, output_layer
from pagedkv.mlx_lm.probe import layer_shapes
from pagedkv.mlx_lm.prompt_cache import PromptCache
from pagedkv.mlx_lm.routing import Closing, RoutedMaker, open_routes
from pagedkv.mlx_lm.sequences import Sequences

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
AUTO = 0.8
"""Share of the memory left; a chunk of a prompt, logits and MLX's own cache take the rest."""
WARM_UP_BATCHES, WARM_UP_TOKENS, WARM_UP_STEPS = (1, 8), 700, 3
"""Batch sizes, longest prompt and answer in tokens: they select different kernels."""


@dataclass(frozen=True)
class StoreStats:
    """The contents of a store, and how much it reused.

    Attributes
    ----------
    num_blocks, free_blocks : int
        All blocks, and the free ones.
    cached_blocks : int
        Blocks in the tree of cached prefixes.
    block_bytes : int
        Bytes of a block: K and V in the layers of its group.
    peak_blocks : int
        The most blocks held at once.
    groups : tuple of (int or None, int)
        For each group of layers its window in tokens, None if it sees all, and its blocks in use.
    asked_tokens, cached_tokens : int
        Prompt tokens that caches were made for, and how many of them were cached already.
    kv_bits : tuple of (int or None, int or None)
        Bits of K and of V; None where they are not quantized.
    """

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    block_bytes: int
    peak_blocks: int
    groups: tuple[tuple[int | None, int], ...]
    asked_tokens: int
    cached_tokens: int
    kv_bits: tuple[int | None, int | None]


class PagedStore(Closing):
    """Paged K and V for a model of mlx-lm: prompt caches that share memory and prefixes.

    While the store is open, attention over its caches uses its blocks, and
    `make_prompt_cache(model)` returns one of its caches. Without a cache from the caller, mlx-lm's
    `generate`, `stream_generate`, `generate_step`, `batch_generate` and `BatchGenerator.insert`
    reuse the longest cached prefix of each prompt, and cache prompt and answer at the end. `close`,
    or the end of a ``with``, undoes all of that.

    Parameters
    ----------
    model : nn.Module
        A model of mlx-lm. Layers that keep something other than K and V use mlx-lm's own caches.
    memory : int or str
        Size of the pools: bytes, or a string such as ``"8GB"`` or ``"500MiB"``. ``"80%"`` is a
        share of the device memory that is left once the weights are loaded, see
        `pagedkv.cache.device_memory`; ``"auto"`` is the share `AUTO`. The rest is for activations.
        Give this or `num_blocks`.
    num_blocks : int
        Number of blocks in the pools.
    block_size : int
        S, tokens in a block.
    kv_bits : int or tuple of (int or None, int or None), optional
        Quantize K and V to 8 or 4 bits, or each to its own, such as ``(8, 4)`` for K in 8 and V in
        4. More tokens fit into the same memory, and outputs can differ from those of unquantized K
        and V. None: not quantized.

    Raises
    ------
    UnsupportedModelError
        If a layer that keeps K and V cannot be paged, or cannot be quantized: `kv_bits` needs head
        dims that are multiples of 8, up to 256.
    ValueError
        If the budget is missing, given twice, malformed, too small for a block or larger than what
        the device has left, or `kv_bits` is something else.
    PagedKVError
        If the model has an open store.
    """

    def __init__(
        self,
        model: Any,
        *,
        memory: int | str | None = None,
        num_blocks: int | None = None,
        block_size: int = 32,
        kv_bits: int | tuple[int | None, int | None] | None = None,
    ) -> None:
        bits = bits_of_each(kv_bits, "kv_bits")
        num_bytes = check_budget(model, memory, num_blocks)
        self._model, self._asked, self._cached = model, 0, 0
        caches = make_prompt_cache(model)
        self._undo_routes = open_routes(self)
        try:
            shapes = layer_shapes(model, caches)
            self.memory = Memory(
                model,
                shapes,
                block_size,
                num_blocks=num_blocks,
                num_bytes=num_bytes,
                bits=bits,
                is_whole=len(shapes) == len(caches),
            )
            self._output: OutputLayer | None = None
            if self.memory.is_whole:
                self._output = output_layer(model, lambda: make_prompt_cache(model))
        except BaseException:
            self._undo_routes()
            raise
        self._make_own = vars(model).get("make_cache")
        self._own_caches = getattr(model, "make_cache", None)
        model.make_cache = self._maker = _Maker(self)
        self.is_open = True

    @property
    def lock(self) -> FairLock:
        """The lock that `exclusive` holds."""
        return self.memory.lock

    def exclusive(self) -> AbstractContextManager[None]:
        """Return a context manager that keeps other threads from computing with the store.

        A generation loop of your own, which calls the model itself, runs each step inside it and
        evaluates the results there. mlx-lm's `generate`, `BatchGenerator` and so on already do.
        """
        return self.lock.until(self.memory.settle)

    @synchronized
    def cache(self, tokens: Sequence[int] = (), *, namespace: Hashable = None) -> PromptCache:
        """Return a prompt cache that already holds the longest cached prefix of a prompt.

        At least one token is left to compute; `PromptCache.rest` has those. Give mlx-lm's
        `generate`, `stream_generate`, `generate_step`, `batch_generate` and `BatchGenerator` the
        whole prompt with the cache, or the rest; give speculative decoding the rest.

        Parameters
        ----------
        tokens : sequence of int
            The prompt. If it is empty, no prefix is looked up.
        namespace : hashable
            Namespaces share no prefixes.

        Raises
        ------
        ValueError
            If tokens are not 32-bit integers.
        TypeError
            If the namespace cannot be hashed.
        PagedKVError
            If the store is closed.
        """
        memory = self.memory
        memory.collect()
        hash(namespace)
        prompt = integers(tokens, "tokens") if len(tokens) else np.empty(0, np.int64)
        table = memory.kv.new_table()
        table.namespace = namespace
        sequences = Sequences(memory, [table])
        if memory.is_whole and len(prompt) > 1:
            match = memory.tree.match_prefix(prompt[:-1], namespace)
            table.adopt(match.ids, match.num_blocks * memory.kv.block_size)
        self._asked, self._cached = self._asked + len(prompt), self._cached + table.num_tokens
        layers = self._layers(sequences)
        return PromptCache(layers, prompt, table.num_tokens, namespace, self._output)

    def _layers(self, sequences: Sequences) -> list[Any]:
        """Return the caches of all layers, mlx-lm's own where a layer is not paged."""
        own = self.own_caches()
        for layer, shape in enumerate(self.memory.shapes):
            own[shape.index] = PagedLayer(sequences, layer)
        return own

    def own_caches(self) -> list[Any]:
        """Return empty caches of mlx-lm's own, as the model has them without a store."""
        if self._own_caches:
            return list(self._own_caches())
        return [KVCache() for _ in self._model.layers]

    def warm_up(self) -> None:
        """Compile the usual kernels, so that the first request does not wait for them.

        A GPU compiles each kernel of MLX and of this package at its first use: 10 to 20 s in all,
        once per machine. This runs made-up prompts in free blocks, and leaves the contents and
        statistics of the store as they were.

        Raises
        ------
        PagedKVError
            If the store is closed.
        """
        before, kv = self.stats(), self.memory.kv
        blocks = before.free_blocks // len(kv.groups.windows)
        try:
            for count in WARM_UP_BATCHES:
                room = blocks // count * kv.block_size - WARM_UP_STEPS - 1
                if room > 0:
                    self._answer_made_up([min(WARM_UP_TOKENS, room - row) for row in range(count)])
        except OutOfBlocksError:
            pass  # what others hold may grow, and admission keeps blocks for that
        finally:
            self.memory.peak = before.peak_blocks

    def _answer_made_up(self, lengths: list[int]) -> None:
        # One more than are computed: a sequence that ends would be kept.
        generator = BatchGenerator(self._model, max_tokens=WARM_UP_STEPS + 1)
        with self.lock:
            table = self.memory.kv.new_table
            caches = [self._layers(Sequences(self.memory, [table()])) for _ in lengths]
        generator.insert([[0] * max(length, 1) for length in lengths], caches=caches)
        for _ in range(WARM_UP_STEPS):
            generator.next_generated()
        generator.close()

    @synchronized
    def forget(self) -> None:
        """Forget all cached prefixes, as after a change of the model's weights."""
        self.memory.collect()
        self.memory.tree.reset()

    @synchronized
    def keep(
        self, cache: Sequence[Any], tokens: Sequence[int], *, namespace: Hashable = None
    ) -> int:
        """Add the whole blocks of a finished cache to the cached prefixes; return their tokens.

        Parameters
        ----------
        cache : list
            A prompt cache of this store, of one sequence. Nothing is cached from one that was
            loaded without the tokens that had left a layer's window.
        tokens : sequence of int
            The tokens that it holds, from the first one on.
        namespace : hashable
            As for `cache`.
        """
        sequences = self._sequences(cache)
        if len(sequences.tables) != 1:
            raise ValueError(f"expected a cache of one sequence, got {len(sequences.tables)}")
        sequences.end()
        if any(sequences.begins):
            return 0  # a prompt that begins with less of it would see what is not there
        [table] = sequences.tables
        return self.memory.keep(table, tokens, namespace)

    def check(
        self, prompt_tokens: int, max_tokens: int, chunk: int = CHUNK, drafted: int = 0
    ) -> None:
        """Raise ValueError for a request that can never fit, see `Admission.check`."""
        self._maker.check(prompt_tokens, max_tokens, chunk, drafted)

    @synchronized
    def load(self, file_name: str) -> PromptCache:
        """Load a file that mlx-lm's `save_prompt_cache` wrote, from a paged cache or another.

        A file of a paged cache has a checksum and a fingerprint of the model's weights; both are
        checked.

        Raises
        ------
        OutOfBlocksError
            If the store has too few blocks. Nothing has changed then.
        ValueError
            If the file cannot be read, is damaged, comes from another model, is quantized by
            mlx-lm's `kv_bits`, or lacks tokens that left a window. Nothing has changed then.
        """
        memory = self.memory
        memory.collect()
        found, model = read_caches(file_name)
        if model is not None and model != (own := fingerprint(self._model)):
            raise ValueError(
                f"expected a prompt cache of weights {own}, this model's, got one of weights "
                f"{model} in {file_name}"
            )
        sequences = Sequences(memory, [memory.kv.new_table()])
        layers = self._layers(sequences)
        try:
            contents = self._contents(layers, found)
        except Exception as error:
            reason = f"{error}" if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{reason}, in {file_name}") from error
        count = contents[0].num_tokens
        if count:
            paged = [layers[shape.index] for shape in memory.shapes]
            for start in range(0, count, CHUNK):  # layers with a window need not hold all
                _write(sequences, paged, contents, min(CHUNK, count - start))
            memory.settle()
            sequences.begins = [max(count - held.arrays[0].shape[2] for held in contents)]
        for index, layer in enumerate(layers):
            if not isinstance(layer, PagedLayer):
                layers[index] = found[index]
        return PromptCache(layers, None, 0, None, self._output)

    def _contents(self, layers: list[Any], found: list[Any]) -> list[Content]:
        """Return what a file's caches hold for the paged layers; ValueError if it does not fit."""
        if len(found) != len(layers):
            raise ValueError(f"expected {len(layers)} layers, got {len(found)}")
        for index, (layer, cache) in enumerate(zip(layers, found, strict=True)):
            if isinstance(cache, QuantizedKVCache):
                raise ValueError(
                    "expected K and V as the model computed them, got those of mlx-lm's kv_bits="
                    f"{cache.bits} in layer {index}"
                )
            if not isinstance(layer, PagedLayer) and type(cache) is not type(layer):
                names = type(layer).__name__, type(cache).__name__
                raise ValueError(f"expected {names[0]} in layer {index}, got {names[1]}")
        shapes = self.memory.shapes
        held = [layers[shape.index].held_by(found[shape.index]) for shape in shapes]
        contents = [content for content in held if content is not None]
        if len(contents) < len(held) or len({content.num_tokens for content in contents}) > 1:
            tokens = [content and content.num_tokens for content in held]
            raise ValueError(f"expected all tokens in every layer, got {tokens} by layer")
        for shape, content in zip(shapes, contents, strict=True):
            sizes = [x.shape for x in content.arrays]
            if any(len(size) != 4 or size[0] != 1 or size[2] != sizes[0][2] for size in sizes):
                raise ValueError(
                    f"expected K and V of one sequence, [1, H, L, D] each, in layer {shape.index}, "
                    f"got {sizes}"
                )
            got = [(x.shape[1], x.shape[3], x.dtype) for x in content.arrays]
            dims = shape.key_dim, shape.value_dim
            expected = [(shape.kv_heads, dim, shape.dtype) for dim in dims if content.num_tokens]
            if got != expected:
                raise ValueError(
                    f"expected K and V of heads, dims and dtype {expected} in layer {shape.index}, "
                    f"got {got}"
                )
        return contents

    @synchronized
    def stats(self) -> StoreStats:
        """Return the contents of the store, and how much it reused."""
        memory = self.memory
        memory.collect()
        usage = memory.kv.memory_usage()
        return StoreStats(
            num_blocks=usage.allocated_blocks,
            free_blocks=usage.free_blocks,
            cached_blocks=memory.tree.num_blocks,
            block_bytes=usage.block_bytes,
            peak_blocks=memory.peak,
            groups=tuple(
                zip(memory.kv.groups.windows, memory.kv.pool.blocks_by_group, strict=True)
            ),
            asked_tokens=self._asked,
            cached_tokens=self._cached,
            kv_bits=memory.bits,
        )

    @synchronized
    def close(self) -> None:
        """Free the memory and restore mlx-lm; caches of the store cannot be used any more.

        It can be called again, including after an interrupt.
        """
        self.is_open = False
        if vars(self._model).get("make_cache") is self._maker:
            if self._make_own is None:
                del self._model.make_cache
            else:
                self._model.make_cache = self._make_own
        if self._output is not None:
            self._output.close()
        self._undo_routes()
        self.memory.close()

    def _sequences(self, cache: Sequence[Any]) -> Sequences:
        sequences = sequences_of(cache)
        if sequences is None or sequences.memory is not self.memory:
            raise ValueError("expected a prompt cache of this store")
        return sequences


def _write(
    sequences: Sequences, layers: list[PagedLayer], contents: list[Content], count: int
) -> None:
    """Append the next `count` tokens of mlx-lm's caches to a sequence."""
    with sequences.memory.extend(sequences.tables, [count]) as step:
        stop = sequences.tables[0].num_tokens
        for layer, content in zip(layers, contents, strict=True):
            held = content.arrays[0].shape[2] - (content.num_tokens - stop)  # up to the last of it
            if held > 0:
                new = slice(max(held - count, 0), held)
                keys, values = (layer.widened(x[..., new, :]) for x in content.arrays)
                slots = step.slots_of(layer.layer)
                slots = replace(slots, slots=slots.slots[-keys.shape[2] :])
                sequences.kv.write(layer.layer, keys, values, slots)
            else:
                step.skip(layer.layer)


class _Maker(RoutedMaker):
    def __init__(self, store: PagedStore) -> None:
        self._store, self.memory = store, store.memory
        self._admission = Admission(store.memory)

    def __call__(self, tokens: Sequence[int] = (), namespace: Hashable = None) -> Any:
        if self.is_open:
            return self._store.cache(tokens, namespace=namespace)
        return self._store.own_caches()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Maker:
        return self  # a copy of the model shares the store

    @property
    def is_open(self) -> bool:  # type: ignore[override]
        return self._store.is_open

    def check(self, prompt_tokens: int, max_tokens: int, chunk: int, drafted: int = 0) -> None:
        self._admission.check(prompt_tokens, max_tokens, chunk, drafted)

    def admit(self, generator: Any, count: int) -> int:
        waiting = generator._unprocessed_sequences
        for place in range(count):
            uid, segments, max_tokens, cache, tokens, *others = waiting[place]
            if isinstance(cache, PromptCache) and cache.looks_up:
                prompt = [token for segment in segments for token in segment]
                cache = self._store.cache(prompt)
                tokens, rest = prompt[: cache.cached], cache.rest
                segments = [rest[:-1], rest[-1:]] if len(rest) > 1 else [rest]
                waiting[place] = (uid, segments, max_tokens, cache, tokens, *others)
        return self._admission.admit(generator, count)

    def shortage(self, generator: Any) -> OutOfBlocksError:
        return self._admission.shortage(generator)

    def keep(self, cache: Sequence[Any], tokens: Sequence[int]) -> None:
        sequences = sequences_of(cache)
        if sequences is not None:
            [table] = sequences.tables
            if len(tokens) >= table.num_tokens:
                self._store.keep(cache, tokens, namespace=table.namespace)


def check_budget(model: Any, memory: int | str | None, num_blocks: int | None) -> int:
    """Return the bytes of a budget, 0 for one in blocks; refuse two, none, or a model in use."""
    if (memory is None) == (num_blocks is None):
        raise ValueError("expected a budget, either memory or num_blocks")
    maker = getattr(model, "make_cache", None)
    if isinstance(maker, RoutedMaker) and maker.is_open:
        raise PagedKVError("expected a model without an open store")
    if memory is None:
        return 0
    if isinstance(memory, str) and _share_of(memory) is not None:
        mx.eval(model.parameters())  # else they would come on top
    num_bytes = parse_bytes(memory)
    check_room(num_bytes)
    return num_bytes


def parse_bytes(memory: int | str | None) -> int:
    """Return the bytes of a budget; of a share, those of the memory that the device has left.

    ValueError for what is neither a number nor such as ``"8GB"``, ``"80%"`` or ``"auto"``.
    """
    share = _share_of(memory) if isinstance(memory, str) else None
    if share is not None:
        return int(device_memory().left * share)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", str(memory), re.IGNORECASE)
    if isinstance(memory, bool) or not found:
        raise ValueError(
            f"expected memory in bytes or such as '8GB', got {memory!r}: a share is such as '80%', "
            "or 'auto'"
        )
    number, unit = found.groups()
    return int(float(number) * _UNITS[(unit or "").upper()])


def _share_of(memory: str) -> float | None:
    """Return the share that a budget is, in (0, 1]; None if it is none."""
    if memory.strip().lower() == "auto":
        return AUTO
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", memory)
    share = float(found[1]) / 100 if found else 0
    return share if 0 < share <= 1 else None
