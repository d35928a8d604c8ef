"""Pools and cached prefixes of a model, and the blocks that its caches use."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.attention.codes import has_codes, row_bytes
from pagedkv.cache.groups import Groups
from pagedkv.cache.kv_cache import PagedKVCache
from pagedkv.cache.step import Extension
from pagedkv.errors import OutOfBlocksError, PagedKVError, UnsupportedModelError
from pagedkv.host.block_table import BlockTable
from pagedkv.host.prefix_cache import RadixTree
from pagedkv.host.turns import FairLock
from pagedkv.limits import integers, positive_int32
from pagedkv.mlx_lm.probe import LayerShape
from pagedkv.mlx_lm.routing import RoutedMaker

MARGIN = 16  # tokens that a draft model may have had wrong


def pools_of(
    shapes: list[LayerShape],
    block_size: int,
    *,
    num_blocks: int | None,
    num_bytes: int,
    bits: tuple[int | None, int | None],
) -> PagedKVCache:
    """Return pools for paged layers under a budget, of blocks or else of bytes.

    Layers with a window are in groups of their own if all layers have one shape.

    Raises
    ------
    UnsupportedModelError
        If K and V are not of one dtype, or cannot be quantized to these bits.
    ValueError
        If there is no room for a block.
    """
    kv_heads = [shape.kv_heads for shape in shapes]
    head_dims = [shape.head_dim for shape in shapes]
    dtypes = {shape.dtype for shape in shapes}
    if len(dtypes) > 1:
        raise UnsupportedModelError(f"expected K and V of one dtype, got {dtypes}")
    [dtype] = dtypes
    if any(bits) and not all(map(has_codes, head_dims)):
        raise UnsupportedModelError(
            f"expected kv_bits=None, or head dims of 8, 16, ... 256, got {head_dims}"
        )
    block_size = positive_int32(block_size, "block_size")
    is_one = len({*zip(kv_heads, head_dims, strict=True)}) == 1
    windows = [shape.window for shape in shapes] if is_one else None
    groups = Groups.of(windows or [None] * len(shapes))
    if num_blocks is None:
        slabs = shapes[: groups.num_slabs]
        rows = [x.kv_heads * row_bytes(x.head_dim, each, dtype) for x in slabs for each in bits]
        block_bytes = len(groups.windows) * block_size * sum(rows)
        num_blocks = num_bytes // block_bytes
        if num_blocks < 1:
            raise ValueError(f"expected memory for a block, {block_bytes} bytes at least")
    return PagedKVCache(
        num_layers=len(shapes),
        num_blocks=num_blocks,
        block_size=block_size,
        kv_heads=kv_heads,
        head_dim=head_dims,
        dtype=dtype,
        windows=windows,
        margin=MARGIN,
        bits=bits,
    )


class Memory:
    """The blocks of a store, while it is open.

    Parameters
    ----------
    model : nn.Module
        The model whose K and V are stored; a weak reference.
    shapes : list of LayerShape
        The paged layers.
    block_size : int
        S, tokens in a block.
    num_blocks, num_bytes : int or None
        The budget, one of them.
    bits : tuple of (int or None, int or None)
        Bits of K and of V; None where they are not quantized.
    is_whole : bool
        Whether all layers are paged: otherwise a cached prefix would lack the others.

    Attributes
    ----------
    endings : deque of callable
        Ends of generations that the caller dropped, for `collect` to run: the garbage collector may
        run while the pool is being changed. An interrupted call is made again.
    live : WeakSet
        The `Sequences` that hold blocks of it and are still referenced.
    peak : int
        The most blocks held at once.
    lock : FairLock
        Its owner may read and change everything here, and evaluate what it computes with the pools.

    Raises
    ------
    UnsupportedModelError
        If K and V are not of one dtype, or cannot be quantized to these bits.
    ValueError
        If there is no room for a block.
    """

    def __init__(
        self,
        model: Any,
        shapes: list[LayerShape],
        block_size: int,
        *,
        num_blocks: int | None,
        num_bytes: int,
        bits: tuple[int | None, int | None],
        is_whole: bool,
    ) -> None:
        self.model = weakref.ref(model)
        self.shapes, self.bits, self.is_whole = shapes, bits, is_whole
        self.kv = pools_of(
            shapes, block_size, num_blocks=num_blocks, num_bytes=num_bytes, bits=bits
        )
        self.tree = RadixTree(self.kv.pool, self.kv.block_size)
        self.endings: deque[Callable[[], None]] = deque()
        self.live: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peak = 0
        self.is_open = True
        self.lock = FairLock()
        self._thread: threading.Thread | None = None  # that computed last
        self._last: weakref.ref[Any] | None = None  # whose pass was the last, maybe under way

    def settle(self) -> None:
        """Evaluate what this thread wrote and left unevaluated, for example when a pass failed."""
        if self.is_open:
            with suppress(Exception):  # the same failure
                mx.async_eval(self._written())  # type: ignore[no-untyped-call]

    def begin(self, sequences: Any) -> None:
        """Note that a pass of this thread begins, see `take_over`."""
        self.take_over()
        self._last = weakref.ref(sequences)

    def take_over(self) -> None:
        """Let this thread compute with the pools.

        Raises
        ------
        PagedKVError
            If another thread is computing, or has left results unevaluated: MLX evaluates an array
            only in the thread that made it. Nothing has changed then.
        """
        self.check_open()
        me, other = threading.current_thread(), self._thread
        if other is not None and other is not me:
            last = None if self._last is None else self._last()
            is_passing = last is not None and last.step is not None and other.is_alive()
            if is_passing or not self.lock.is_free():
                raise PagedKVError(
                    "expected no other thread in a forward pass with this store; a loop of your "
                    "own takes each step within `PagedStore.exclusive`"
                )
            try:
                mx.eval(self._written())
            except Exception as error:
                raise PagedKVError(
                    "expected the thread that computed last to evaluate the `state` of its caches "
                    f"before another computes: {error}"
                ) from error
        self._thread = me

    def _written(self) -> list[list[mx.array]]:
        return [self.kv.written(layer) for layer in range(self.kv.num_layers)]

    def check_open(self) -> None:
        """Raise PagedKVError if the store was closed."""
        if not self.is_open:
            raise PagedKVError("expected an open store, this one was closed")

    def check_model(self, *models: Any) -> None:
        """Raise ValueError unless K and V of the store are those of one of some models.

        Copies of the store's model share the store, and so do models that contain it and parts of
        it. A model that is not an `nn.Module` is not checked.
        """
        own: Any = self.model()
        for model in models:
            maker = getattr(model, "make_cache", None)
            if isinstance(maker, RoutedMaker) and maker.is_open:
                is_own = maker.memory is self
            elif own is None or not hasattr(model, "modules"):
                is_own = True
            else:
                is_own = any(x is own for x in model.modules())
                is_own = is_own or any(x is model for x in own.modules())
            if is_own:
                return
        raise ValueError("expected a prompt cache of this model, got one of another model's store")

    def extend(self, tables: list[BlockTable], counts: list[int]) -> Extension:
        """Begin a step, see `PagedKVCache.extend`."""
        self.check_open()
        try:
            step = self.kv.extend(tables, counts)
        except OutOfBlocksError:
            gc.collect()  # caches in a circle
            self.collect()
            step = self.kv.extend(tables, counts)
        self.peak = max(self.peak, self.kv.pool.num_blocks - self.kv.pool.num_free)
        return step

    def collect(self) -> None:
        """End generations that the caller dropped, and free the blocks of dropped caches.

        It can be called again after an interrupt.

        Raises
        ------
        PagedKVError
            If the store was closed.
        """
        self.check_open()
        while self.endings:
            try:
                self.endings[0]()
            except Exception:
                self.endings.popleft()  # it would fail again
                raise
            self.endings.popleft()
        self.kv.pool.collect()

    def keep(
        self,
        table: BlockTable,
        tokens: Sequence[int] | NDArray[np.integer],
        namespace: Hashable,
    ) -> int:
        """Cache the whole blocks of a sequence that holds `tokens`; return how many tokens."""
        self.check_open()
        if not self.is_whole:
            return 0
        held: Any = integers(tokens, "tokens")[: table.num_tokens] if len(tokens) else []
        match = self.tree.insert(held, table.blocks, namespace)
        self.kv.pool.share(table.row, 0, match.ids)
        return match.num_blocks * self.kv.block_size

    def close(self) -> None:
        """Free the pools' memory; can be called again after an interrupt."""
        self.is_open = False
        if "kv" in vars(self):
            self.kv.pool.reclaimers.clear()
        for sequences in list(self.live):
            sequences.step = None  # of a pass that never ended
        for name in ("kv", "tree"):
            vars(self).pop(name, None)
