"""Finds out how a model's layers use their caches, in a pass that is never computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from pagedkv.errors import UnsupportedModelError
from pagedkv.mlx_lm.routing import Routed, own_attention

TOKENS = 2  # of the pass: one alone would not tell a causal layer from one that sees everything


@dataclass(frozen=True)
class LayerShape:
    """Shape, window and dtype of a paged layer.

    Attributes
    ----------
    index : int
        Its place in the model's list of caches.
    kv_heads, key_dim, value_dim : int
        Hkv, and D of K and of V.
    window : int or None
        Tokens that a query sees at most.
    dtype : mx.Dtype
        Of K and V.
    is_shared : bool
        Whether other layers attend over its K and V, too.
    """

    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    dtype: mx.Dtype
    is_shared: bool

    @property
    def head_dim(self) -> int:
        """D of its pools: the larger one."""
        return max(self.key_dim, self.value_dim)


class _PagedCache(Routed):
    """A cache that notes what is done with it.

    Parameters
    ----------
    index : int
        Its place in the list of caches.
    masks : list of (object, int or None)
        The masks that any was asked for, with their windows.
    used : list of _PagedCache
        Itself is added whenever the model does something with it.
    """

    offset = 0

    def __init__(
        self, index: int, masks: list[tuple[object, int | None]], used: list[_PagedCache]
    ) -> None:
        self.index, self._used = index, used
        self.new: tuple[mx.array, mx.array] | None = None
        self.window: int | None = None
        self.odd = "does not keep K and V"
        self.is_shared = False
        self._masks = masks

    def __getattr__(self, name: str) -> Any:
        # An AttributeError, for models that ask whether there is one.
        self._used.append(self)
        reason = f"reads {name!r} of its cache, which a paged layer does not have"
        raise AttributeError(reason, name=name, obj=self)

    def make_mask(
        self,
        N: int,  # noqa: N803
        return_array: bool = False,
        window_size: int | None = None,
    ) -> Any:
        if window_size is None and not return_array:
            return "causal"
        mask = create_causal_mask(N, window_size=window_size)
        self._masks.append((mask, window_size))
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._used.append(self)
        self.odd = "writes K and V twice" if self.new else "does not attend through mlx-lm's base"
        self.new = keys, values
        self.give(keys)
        return keys, values

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        self.is_shared = True
        assert self.new is not None
        return own_attention(queries, *self.new, None, scale, "causal", sinks)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        windows: list[int | None]
        if isinstance(mask, str):
            windows = [None] if mask == "causal" else []
        else:
            windows = [window for made, window in self._masks if made is mask]
        if self.new is None or keys is not self.new[0] or values is not self.new[1]:
            self.odd = "attends over other K and V than its own"
        elif not windows:
            self.odd = "attends with a mask of its own"
        else:
            [self.window], self.odd = windows, ""
        return own_attention(queries, keys, values, None, scale, mask, sinks)


def layer_shapes(model: Any, caches: Sequence[Any]) -> list[LayerShape]:
    """Return the shapes of the layers that can be paged; others use mlx-lm's own caches.

    Parameters
    ----------
    model : nn.Module
        A model of mlx-lm, while attention is routed.
    caches : list
        Empty caches as the model wants them.

    Raises
    ------
    UnsupportedModelError
        If a layer that keeps K and V cannot be paged, or none does.
    """
    masks: list[tuple[object, int | None]] = []
    used: list[_PagedCache] = []
    probes: list[Any] = [
        _PagedCache(index, masks, used) if type(cache) in (KVCache, RotatingKVCache) else cache
        for index, cache in enumerate(caches)
    ]
    name = type(model).__module__.rpartition(".")[2]
    try:
        model(mx.zeros((1, TOKENS), mx.int32), cache=probes)
    except Exception as error:
        raise UnsupportedModelError(f"{name} cannot be paged: {_failure(error, used)}") from error
    shapes = []
    for index, (cache, probe) in enumerate(zip(caches, probes, strict=True)):
        if not isinstance(probe, _PagedCache):
            continue
        if probe.odd or probe.new is None:
            raise UnsupportedModelError(f"{name} cannot be paged: layer {index} {probe.odd}")
        window = probe.window
        if isinstance(cache, RotatingKVCache):
            kept = cache.max_size
            if cache.keep or window not in (None, kept):
                raise UnsupportedModelError(
                    f"{name} cannot be paged: layer {index} sees {window} tokens and keeps "
                    f"{cache.keep} and the last {kept}"
                )
            window = kept
        keys, values = probe.new
        _, heads, _, key_dim = keys.shape
        dims = key_dim, values.shape[3]
        shapes.append(LayerShape(index, heads, *dims, window, keys.dtype, probe.is_shared))
    if not shapes:
        kept = f": layer 0 keeps {type(caches[0]).__name__}" if caches else ""
        raise UnsupportedModelError(f"{name} cannot be paged: no layer of it keeps K and V{kept}")
    return shapes


def _failure(error: Exception, used: list[_PagedCache]) -> str:
    """Say in which layer a pass failed, by the caches that were used until then, and why."""
    reason = f"{type(error).__name__}: {error}"
    if not used:
        return f"its pass failed before a layer used its cache, {reason}"
    last = used[-1]
    if isinstance(error, AttributeError) and error.obj is last:
        return f"layer {last.index} {error}"
    where = "in" if last.odd else "after"
    return f"its pass failed {where} layer {last.index}, {reason}"
