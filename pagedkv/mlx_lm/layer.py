"""A layer's cache with mlx-lm's interface."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from pagedkv.attention.codes import take
from pagedkv.attention.scores import ScoreOptions
from pagedkv.cache.step import Extension
from pagedkv.errors import PagedKVError
from pagedkv.host.block_pool import GONE
from pagedkv.host.turns import FairLock, synchronized
from pagedkv.mlx_lm.files import fingerprint
from pagedkv.mlx_lm.probe import LayerShape
from pagedkv.mlx_lm.routing import Routed
from pagedkv.mlx_lm.sequences import Sequences

EVERY = 2
"""Layers of a prompt that the device begins with while the host builds the next. H200, MLX 0.32.4,
16 layers, time over mlx-lm's of 256 tokens after 30,000: none 1.15, 8 1.10, 4 1.05, 2 .97."""
WORTH = 3 * 2**24
"""Bytes that these take until they are computed, at least: each begin costs the host some 40 us.
The same for 256 tokens after 8,000, 59 MB: none 1.17, 2 1.05; 64 after 8,000, 40 MB: 1.13, 1.30."""


class Content(NamedTuple):
    """The contents of one of mlx-lm's own caches.

    Attributes
    ----------
    num_tokens : int
        Tokens that were added to it.
    arrays : list of mx.array
        K and V of these, or of the last ones that a window needs; empty without tokens.
    """

    num_tokens: int
    arrays: list[mx.array]


class NotInState:
    """Stands in a layer's state where a file would need K and V."""

    def __repr__(self) -> str:
        return "a paged layer: call mlx_lm.models.cache.save_prompt_cache while its store is open"


class ShapedLayer(Routed):
    """A layer over pools whose head dim may be larger than its own.

    Parameters
    ----------
    layer : int
        Which of the pools, from 0.
    shape : LayerShape
        What the layer keeps.
    """

    def __init__(self, layer: int, shape: LayerShape) -> None:
        self.layer, self.shape = layer, shape
        self._scores = ScoreOptions(window=shape.window)
        self._wide = shape.head_dim
        self._fits = shape.key_dim == shape.value_dim  # nothing to widen

    def scores(self, sinks: mx.array | None) -> ScoreOptions:
        """Return what happens to the layer's scores, with attention sinks or without."""
        if sinks is not self._scores.sinks:
            self._scores = ScoreOptions(window=self.shape.window, sinks=sinks)
        return self._scores

    def widened(self, x: mx.array) -> mx.array:
        """Return an array with zeros up to the pools' head dim: they change no product."""
        if self._fits:
            return x
        missing = self._wide - x.shape[3]
        return mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing)]) if missing else x

    def narrowed(self, out: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return an output without what `widened` added, in a dtype."""
        if not self._fits:
            out = out[..., : self.shape.value_dim]
        return out if out.dtype == dtype else out.astype(dtype)


class PagedLayer(ShapedLayer):
    """A layer's cache over blocks of a store, with mlx-lm's interface.

    Parameters
    ----------
    sequences : Sequences
        The sequences that all layers share.
    layer : int
        Index of the store's layer, from 0; the first layer acts for all.
    """

    def __init__(self, sequences: Sequences, layer: int) -> None:
        super().__init__(layer, sequences.memory.shapes[layer])
        self.sequences = sequences
        self._new: tuple[mx.array, mx.array, Extension] | None = None
        self._given: tuple[mx.array, mx.array, Extension] | None = None  # for other layers

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or int32 of shape [B] for a batch."""
        return self.sequences.offset(self.layer)

    def make_mask(
        self,
        N: int,  # noqa: N803
        return_array: bool = False,
        window_size: int | None = None,
    ) -> Any:
        """Return a placeholder for a mask: layers know which tokens each one sees."""
        if not self.sequences.memory.is_whole:
            # Before a layer changes what is not in the pools: there may be too few blocks.
            self.sequences.begin(self.layer, len(self.sequences.tables), N)
        lens = self.sequences.num_tokens(self.layer)
        if return_array:
            mask = create_causal_mask(N, max(lens), window_size=window_size)
            self.sequences.mask = mask
            return mask
        return None if N == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take the new tokens' K and V, [B, Hkv, L, D]; `attend` writes them."""
        sequences = self.sequences
        if self._new is not None and self._new[2] is sequences.step:
            sequences.end()  # of a pass that broke off before this layer attended
        self._new = keys, values, sequences.begin(self.layer, keys.shape[0], keys.shape[2])
        if self.shape.is_shared:
            self._given = self._new
            self.give(keys)
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        """Write the new tokens, and attend with them over all that their sequences hold.

        Raises
        ------
        PagedKVError
            If K and V are not those of `update_and_fetch`, or there is a mask of the model's own.
        """
        new, sequences = self._new, self.sequences
        if (
            new is None
            or new[2] is not sequences.step
            or keys is not new[0]
            or values is not new[1]
        ):
            raise PagedKVError("expected the K and V that the layer put into its cache")
        if isinstance(mask, mx.array) and mask is not sequences.mask:
            raise PagedKVError("expected a mask of the cache's, got another")
        try:
            out = self._attend(new[2], queries, keys, values, scale, sinks, writes=True)
            if self.layer % EVERY == EVERY - 1 and sequences.is_prompt:
                # Gathered K and V, and what a model's layer makes of its tokens besides.
                held = sequences.num_held * sequences.kv.layer_bytes(self.layer)
                taken = EVERY * (held // sequences.kv.block_size + 12 * out.nbytes)
                if taken >= WORTH:
                    sequences.kv.begin(self.layer, out, taken)
            self._new = None
            sequences.attended(self.layer, keys.shape[2])
            return out
        except BaseException:
            sequences.end()
            raise

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Attend with another layer's queries over all that the sequences hold of this one."""
        assert self._given is not None
        keys, values, step = self._given
        return self._attend(step, queries, keys, values, scale, sinks, writes=False)

    def _attend(
        self,
        step: Extension,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None,
        *,
        writes: bool,
    ) -> mx.array:
        own, sequences = queries.dtype, self.sequences
        if own != keys.dtype:
            queries = queries.astype(keys.dtype)
        queries, scores = self.widened(queries), self.scores(sinks)
        if sequences.is_padded:
            queries = sequences.packed(queries)
        if writes:
            keys, values = self.widened(keys), self.widened(values)
            if sequences.is_padded:
                keys, values = sequences.packed(keys), sequences.packed(values)
            out = step.attend(self.layer, queries, keys, values, scale=scale, scores=scores)
        else:
            out = step.attend_again(self.layer, queries, scale=scale, scores=scores)
        return self.narrowed(sequences.unpacked(out) if sequences.is_padded else out, own)

    def packs(self) -> bool:
        """Whether all layers are paged: other layers could not separate the sequences."""
        return self.sequences.memory.is_whole

    def without_padding(self, counts: list[int]) -> AbstractContextManager[None]:
        """Let a pass compute `counts` new tokens of each sequence, see `Sequences.counts`."""
        return self.sequences.without_padding(counts)

    @property
    def lock(self) -> FairLock:
        """The lock of the store."""
        return self.sequences.lock

    @synchronized
    def unpaged(self) -> KVCache | RotatingKVCache:
        """Return a copy of a single sequence's tokens in a cache of mlx-lm's own.

        For a layer that frees blocks outside its window, this is a `RotatingKVCache`.
        """
        sequences, shape = self.sequences, self.shape
        sequences.end()
        if len(sequences.tables) != 1:
            raise ValueError(f"expected one sequence, got {len(sequences.tables)}")
        [table], kv, window = sequences.tables, sequences.kv, self._kept_window
        cache = KVCache() if window is None else RotatingKVCache(window)
        if table.num_tokens:
            batch = sequences.batch_of([0]).of_group(kv.group_of(self.layer))
            rows = batch.rows(shape.kv_heads, 1, window)
            keys, values = (
                take(pools[self.layer], rows, self._wide, shape.dtype, is_keys=is_keys)
                for pools, is_keys in ((kv.keys, True), (kv.values, False))
            )
            held = keys[..., : shape.key_dim], values[..., : shape.value_dim]
            mx.eval(held)
            if window is None:
                cache.state = (*held, table.num_tokens)
            else:
                cache.state = (*held, table.num_tokens, 0, window, held[0].shape[2])
        return cache

    def check_model(self, *models: Any) -> None:
        """Raise ValueError unless the store belongs to one of the models."""
        self.sequences.memory.check_model(*models)

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model's weights."""
        model = self.sequences.memory.model()
        return None if model is None else fingerprint(model)

    def held_by(self, cache: Any) -> Content | None:
        """Return the contents of one of mlx-lm's caches; None if the layer would lack some."""
        window = self._kept_window
        if isinstance(cache, KVCache):
            arrays = list(cache.keys_and_values()) if cache.offset else []
            is_whole = all(x.shape[2] == cache.offset for x in arrays)
            return Content(cache.offset, arrays) if is_whole else None
        if window is None or not isinstance(cache, RotatingKVCache) or cache.keep:
            return None
        arrays = []
        if cache.offset:
            arrays = [
                cache._temporal_order(x)[..., -cache.offset :, :]
                for x in (cache.keys, cache.values)
            ]
            if arrays[0].shape[2] < min(cache.offset, window - 1):
                return None
            if arrays[0].shape[2] == window > 1:
                # No coming token sees the oldest, and what `unpaged` took for it may be another's.
                arrays = [x[..., 1:, :] for x in arrays]
        return Content(cache.offset, arrays)

    @property
    def _kept_window(self) -> int | None:
        """The window beyond which the layer's blocks are given back, None if they are not."""
        kv = self.sequences.kv
        return kv.groups.windows[kv.group_of(self.layer)]

    # What mlx-lm calls of a cache.

    @property
    def state(self) -> tuple[list[mx.array], NotInState]:
        """The arrays to evaluate after a pass; not the contents for a file.

        On a GPU, reading it starts the pass and returns nothing to wait for: mlx-lm evaluates it
        between the chunks of a prompt, and builds the next chunk while this one is computed.
        """
        if self.layer:
            return [], NotInState()
        self.sequences.memory.take_over()
        return self.sequences.kv.start(), NotInState()

    @classmethod
    def from_state(cls, state: Any) -> PagedLayer:
        """Refuse: `PagedStore.load` reads files."""
        raise ValueError("expected PagedStore.load: a paged cache belongs to a store")

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Refuse mlx-lm's `kv_bits`."""
        raise ValueError(
            f"expected kv_bits=None, got {bits}: a store has its own, PagedStore(model, kv_bits=8)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of this layer in the blocks that the sequences hold, a shared one counted once."""
        kv = self.sequences.kv
        group = kv.group_of(self.layer)
        ids = {block for table in self.sequences.tables for block in table.blocks[group].tolist()}
        return len(ids - {GONE}) * kv.layer_bytes(self.layer)

    def size(self) -> int:
        """Return the tokens of the longest sequence."""
        return max(self.sequences.num_tokens(self.layer), default=0)

    def empty(self) -> bool:
        """Whether there is no token yet."""
        return self.size() == 0

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back: a few always, see `trim`.

        For a cache that is kept as a prefix, any number: its user needs to trim that many.
        """
        return not self.sequences.is_spare or self.sequences.is_all_there()

    def trim(self, n: int) -> int:
        """Drop up to `n` tokens from the end of each sequence; return how many.

        Raises
        ------
        ValueError
            If it is more than `MARGIN`, and what would be seen then has left a layer's window.
        """
        if self.layer == 0:
            self.sequences.trimmed = self.sequences.trim(n)
        return self.sequences.trimmed

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        return PagedLayer(copy.deepcopy(self.sequences, memo), self.layer)

    @staticmethod
    def merge(layers: Sequence[PagedLayer]) -> PagedLayer:
        """Return one cache of the sequences of several, which stay as they are."""
        first = layers[0]
        lead = first.sequences
        if first.layer == 0:
            merged = lead.fork(range(len(lead.tables)), is_batch=True)
            for other in layers[1:]:
                merged.extend(other.sequences.fork(range(len(other.sequences.tables))))
            lead.made = weakref.ref(merged)
            return PagedLayer(merged, 0)
        return first._follow()

    def extract(self, idx: int) -> PagedLayer:
        """Return a sequence as a cache of its own."""
        if self.layer == 0:
            one = self.sequences.fork([idx])
            self.sequences.made = weakref.ref(one)
            return PagedLayer(one, 0)
        return self._follow()

    def _follow(self) -> PagedLayer:
        """Return this layer of what the first has just made."""
        made = self.sequences.made() if self.sequences.made else None
        if made is None:
            raise PagedKVError("expected the first layer's call before those of the others")
        return PagedLayer(made, self.layer)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep some of the sequences."""
        if self.layer == 0:
            self.sequences.filter([int(row) for row in batch_indices])

    def extend(self, other: PagedLayer) -> None:
        """Take over the sequences of another batch."""
        if self.layer == 0:
            self.sequences.extend(other.sequences)

    def prepare(
        self,
        *,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
        left_padding: Sequence[int] | None = None,
    ) -> None:
        """Note the lengths of prompts that are padded on the right."""
        if left_padding is not None:
            raise ValueError("expected padding on the right, got left_padding")
        if self.layer == 0 and right_padding is not None:
            if lengths is None:
                raise ValueError("expected lengths with right_padding, got none")
            self.sequences.prepare(lengths)

    def finalize(self) -> None:
        """Note the end of the padded prompts: there is no padding to remove."""
        if self.layer == 0:
            self.sequences.prepare(None)


def sequences_of(cache: Sequence[Any]) -> Sequences | None:
    """Return the sequences of a prompt cache's paged layers; None if no layer is paged."""
    return next((layer.sequences for layer in cache if isinstance(layer, PagedLayer)), None)
