"""K and V of all layers on the device: a pool of blocks for each, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from pagedkv.attention.inputs import DTYPES
from pagedkv.cache.slots import SlotMapping
from pagedkv.errors import PagedKVError
from pagedkv.limits import id_below, integers, positive_int32


class Pools:
    """K and V pools of all layers, [N, S, Hkv, D] each.

    The pools are allocated once, zeroed, and written in place. MLX writes in place only into an
    array that nobody else holds and no evaluation in flight reads; it copies all of it otherwise.
    So read `keys[layer]` anew each time instead of keeping it in a variable; the pools see to the
    rest.

    A write that fails when it is evaluated must not take what other sequences have written with
    it. On a CPU, K and V are evaluated before they are written. On a GPU that would keep the host
    from running ahead: there, a pool whose write failed is found out before the next step's
    writes and when a step is rolled back, and the pools are refused from then on.

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

    Raises
    ------
    ValueError
        If a size or the number of slots is not a positive 32-bit integer, or the dtype is another.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: mx.Dtype,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        }
        num_layers, *shape = (positive_int32(size, name) for name, size in sizes.items())
        positive_int32(shape[0] * shape[1], "num_blocks * block_size")
        if dtype not in DTYPES:
            raise ValueError(f"expected float16, bfloat16 or float32, got {dtype}")
        self._keys = [mx.zeros(shape, dtype) for _ in range(num_layers)]
        self._values = [mx.zeros(shape, dtype) for _ in range(num_layers)]
        mx.eval(self._keys, self._values)
        self._written = [False] * num_layers  # since the last wait for work in flight
        self._lost = False

    @property
    def keys(self) -> list[mx.array]:
        """K pools, one a layer, for `decode_attention`. A write replaces the entry."""
        self.check_whole()
        return self._keys

    @property
    def values(self) -> list[mx.array]:
        """V pools, as `keys`."""
        self.check_whole()
        return self._values

    @property
    def num_blocks(self) -> int:
        """N, blocks of each pool."""
        return self._keys[0].shape[0]

    @property
    def block_size(self) -> int:
        """S, tokens in a block."""
        return self._keys[0].shape[1]

    def write(self, layer: int, keys: mx.array, values: mx.array, slots: SlotMapping) -> None:
        """Write tokens into one layer's pools, in place; lazily on a GPU.

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
        PagedKVError
            If a pool is lost.
        RuntimeError
            On a CPU, if MLX cannot compute K or V. Nothing has changed then.
        """
        layer = id_below(len(self.keys), layer, "a layer")
        num_blocks, block_size, kv_heads, head_dim = self._keys[layer].shape
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
        dtype = self._keys[layer].dtype
        if not keys.dtype == values.dtype == dtype:
            raise ValueError(
                f"expected {dtype}, got keys of {keys.dtype} and values of {values.dtype}"
            )
        if _waiting_is_free():
            mx.eval(keys, values)
        if self._written[layer]:
            self.wait()
        written = [
            _scatter(pool, slots.slots, new.swapaxes(1, 2).reshape(-1, kv_heads, head_dim))
            for pool, new in ((self._keys[layer], keys), (self._values[layer], values))
        ]
        self._written[layer] = True
        self._keys[layer], self._values[layer] = written

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks in every layer, in place; `extend` and `steps` do it by themselves.

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
        PagedKVError
            If a pool is lost.
        """
        self.check_whole()
        if not copies:
            return
        sources, targets = (integers(ids, "block ids") for ids in zip(*copies, strict=True))
        for block in (*sources, *targets):
            id_below(self.num_blocks, block, "block ids")
        if len({*targets}) < len(targets) or {*targets} & {*sources}:
            raise ValueError(f"expected each target once and no source among them, got {copies}")
        self.wait()
        read = mx.array(sources)
        blocks = [[pool[read] for pool in pools] for pools in (self._keys, self._values)]
        mx.eval(blocks)  # a reader that has not run would make MLX copy the pool
        to = mx.array(targets)
        for pools, copied in zip((self._keys, self._values), blocks, strict=True):
            pools[:] = [_scatter(p, to, b) for p, b in zip(pools, copied, strict=True)]

    def check_whole(self) -> None:
        """Raise PagedKVError if a pool is lost."""
        if self._lost:
            raise PagedKVError(
                "expected pools that hold what was written, but a write failed when it was "
                "evaluated: make a new cache and compute its sequences again"
            )

    def wait(self) -> None:
        """Wait for what is in flight, so that it holds no pool.

        Raises
        ------
        PagedKVError
            If a write has failed; the pools are lost then.
        """
        try:
            mx.eval(self._keys, self._values)
        except Exception as error:
            self._lost = True
            raise PagedKVError(f"K and V are lost: a write failed with {error}") from error
        mx.synchronize()
        self._written = [False] * len(self._written)


def _waiting_is_free() -> bool:
    """Whether the host may wait for K and V: on a CPU it has nothing to run ahead of."""
    return mx.default_device().type == mx.cpu


def _scatter(pool: mx.array, indices: mx.array, rows: mx.array) -> mx.array:
    """Write rows of any number of trailing dimensions of the pool."""
    flat = pool.reshape(-1, *rows.shape[1:])
    flat[indices] = rows
    return flat.reshape(pool.shape)
