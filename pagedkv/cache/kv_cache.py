"""The tensors of the cache: per layer one K and one V pool, written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.inputs import DTYPES
from pagedkv.cache.step import SlotMapping, Step
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.block_table import BlockTable
from pagedkv.host.reservation import reserve
from pagedkv.limits import positive_int32


@dataclass(frozen=True)
class MemoryUsage:
    """What the pools take, in blocks and in bytes over all layers, K and V.

    Attributes
    ----------
    allocated_blocks : int
        Blocks that the pools have room for.
    live_blocks : int
        Blocks that somebody holds.
    block_bytes : int
        Bytes of one block in all layers.
    """

    allocated_blocks: int
    live_blocks: int
    block_bytes: int

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self.allocated_blocks - self.live_blocks

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pools."""
        return self.allocated_blocks * self.block_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that somebody holds."""
        return self.live_blocks * self.block_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks that nobody holds."""
        return self.free_blocks * self.block_bytes


class PagedKVCache:
    """K and V pools of all layers, [N, S, Hkv, D] each, and the bookkeeping of their blocks.

    The pools are allocated once, zeroed, and written in place. MLX writes in place only into an
    array that nobody else holds and no evaluation in flight reads; it copies all of it otherwise.
    So read `keys[layer]` anew each time instead of keeping it in a variable; the cache sees to the
    rest.

    Parameters
    ----------
    num_layers : int
        Layers of the model.
    num_blocks : int
        N, blocks of each pool.
    block_size : int
        S, tokens in a block.
    kv_heads : int
        Hkv.
    head_dim : int
        D.
    dtype : mx.Dtype
        float16, bfloat16 or float32.

    Attributes
    ----------
    pool : BlockPool
        Which blocks are held; a block is the same id in every layer.
    keys, values : list of mx.array
        The pools, one a layer, for `decode_attention`. A write replaces the entry.

    Raises
    ------
    ValueError
        If a size or the number of slots is not a positive 32-bit integer, or the dtype is another.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: mx.Dtype = mx.float16,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            positive_int32(size, name)
        positive_int32(num_blocks * block_size, "num_blocks * block_size")
        if dtype not in DTYPES:
            raise ValueError(f"expected float16, bfloat16 or float32, got {dtype}")
        shape = (num_blocks, block_size, kv_heads, head_dim)
        self.pool = BlockPool(num_blocks)
        self.keys = [mx.zeros(shape, dtype) for _ in range(num_layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(num_layers)]
        mx.eval(self.keys, self.values)
        self._written = [False] * num_layers  # since the last wait for work in flight

    @property
    def block_size(self) -> int:
        """S, tokens in a block."""
        return self.keys[0].shape[1]

    def memory_usage(self) -> MemoryUsage:
        """Return how many blocks and bytes are allocated, live and free."""
        return MemoryUsage(
            allocated_blocks=self.pool.num_blocks,
            live_blocks=self.pool.num_blocks - self.pool.num_free,
            block_bytes=2 * len(self.keys) * self.keys[0].nbytes // self.pool.num_blocks,
        )

    def new_table(self) -> BlockTable:
        """Return an empty sequence in this cache."""
        return BlockTable(self.pool, self.block_size)

    @contextmanager
    def extend(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> Iterator[Step]:
        """Append tokens to sequences: prompts, chunks of them, a decode step; all or nothing.

        To be used as ``with cache.extend(tables, counts) as step:``, with a `write` to every layer
        in the body. Blocks are taken from the pool, and a partly filled last block that other
        sequences hold is copied first, it alone, in every layer. An exception in the body leaves
        pool, tables, and the K and V of every sequence as they were before.

        Parameters
        ----------
        tables : sequence of BlockTable
            Distinct sequences of this cache, not to be changed in the body.
        counts : sequence of int
            New tokens of each, 0 or more, not all 0.

        Yields
        ------
        Step
            What `write` and `decode_attention` or `paged_attention` need.

        Raises
        ------
        OutOfBlocksError
            If the pool has too few free blocks for all of it. Nothing has changed then.
        ValueError
            If the tables are not distinct sequences of this cache, the counts are not one a table,
            negative or all 0, or a sequence stays empty. Nothing has changed then.
        """
        if any(t.pool is not self.pool or t.block_size != self.block_size for t in tables):
            raise ValueError("expected tables of this cache")
        sizes = {"block_size": self.block_size, "num_blocks": self.pool.num_blocks}
        with reserve(tables, counts) as reserved:
            step = Step(
                SlotMapping.from_slots(reserved.slots, **sizes),
                DecodeBatch.from_tables(
                    [table.block_ids for table in tables],
                    [table.num_tokens for table in tables],
                    **sizes,
                ),
                reserved.copies,
            )
            self.copy_blocks(step.copies)
            yield step

    def write(self, layer: int, keys: mx.array, values: mx.array, slots: SlotMapping) -> None:
        """Write tokens into one layer's pools, in place and lazily.

        Costs what the tokens cost, whatever the size of the pool. The second write of a layer waits
        for what is in flight on the default stream, once for all layers: a decode step still being
        computed reads the pool, and MLX would copy it to keep that step's view. A step that is not
        even being computed cannot be waited for: start it (`mx.async_eval`) before the next one.

        Slots from `extend` are the sequences' own; of others it is not checked who holds them.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        keys, values : mx.array
            Shape [B, Hkv, L, D], dtype of the pools.
        slots : SlotMapping
            Where the B * L tokens go, a sequence's L tokens together.

        Raises
        ------
        ValueError
            If there is no such layer, or shapes, dtypes, or the pool the slots were made for do
            not fit. Nothing has changed then.
        """
        if not 0 <= layer < len(self.keys):
            raise ValueError(f"expected a layer in [0, {len(self.keys)}), got {layer}")
        num_blocks, block_size, kv_heads, head_dim = self.keys[layer].shape
        if (slots.num_blocks, slots.block_size) != (num_blocks, block_size):
            raise ValueError(
                f"expected slots of {num_blocks} blocks of {block_size} tokens, "
                f"got {slots.num_blocks} of {slots.block_size}"
            )
        if keys.ndim != 4 or keys.shape[1] != kv_heads or keys.shape[3] != head_dim:
            raise ValueError(
                f"expected keys of shape [B, {kv_heads}, L, {head_dim}], got {keys.shape}"
            )
        if keys.shape[0] * keys.shape[2] != slots.slots.size:
            raise ValueError(
                f"expected {slots.slots.size} tokens, one a slot, "
                f"got {keys.shape[0]} sequences of {keys.shape[2]}"
            )
        if values.shape != keys.shape:
            raise ValueError(f"expected values of shape {keys.shape}, got {values.shape}")
        dtype = self.keys[layer].dtype
        if not keys.dtype == values.dtype == dtype:
            raise ValueError(
                f"expected {dtype}, got keys of {keys.dtype} and values of {values.dtype}"
            )
        if self._written[layer]:
            self._wait()
        written = [
            _scatter(pool, slots.slots, new.swapaxes(1, 2).reshape(-1, kv_heads, head_dim))
            for pool, new in ((self.keys[layer], keys), (self.values[layer], values))
        ]
        self.keys[layer], self.values[layer] = written
        self._written[layer] = True

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks in every layer, in place; `extend` does it by itself.

        Waits for what is in flight: a block is copied when a fork first writes, which is seldom.

        Parameters
        ----------
        copies : sequence of (int, int)
            From which block id, to which; the latter each once and not among the former.

        Raises
        ------
        ValueError
            If an id is not in the pool, or is written twice or both read and written. Nothing has
            changed then.
        """
        if not copies:
            return
        sources, targets = zip(*copies, strict=True)
        for block in (*sources, *targets):
            if not 0 <= block < self.pool.num_blocks:
                raise ValueError(f"expected block ids in [0, {self.pool.num_blocks}), got {block}")
        if len(set(targets)) < len(targets) or set(targets) & set(sources):
            raise ValueError(f"expected each target once and no source among them, got {copies}")
        blocks = [[pool[mx.array(sources)] for pool in pools] for pools in (self.keys, self.values)]
        # A reader that has not run would make MLX copy the pool.
        mx.eval(blocks)
        self._wait()
        to = mx.array(targets)
        for pools, copied in zip((self.keys, self.values), blocks, strict=True):
            pools[:] = [_scatter(p, to, b) for p, b in zip(pools, copied, strict=True)]

    def _wait(self) -> None:
        """Wait for what is in flight, so that it holds no pool."""
        mx.synchronize()
        self._written = [False] * len(self._written)


def _scatter(pool: mx.array, indices: mx.array, rows: mx.array) -> mx.array:
    """Write rows of any number of trailing dimensions of the pool."""
    flat = pool.reshape(-1, *rows.shape[1:])
    flat[indices] = rows
    return flat.reshape(pool.shape)
