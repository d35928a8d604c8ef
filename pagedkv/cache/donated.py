"""K and V on a CPU, written in place by donation, MLX's own way if no other reference exists."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from pagedkv.attention.codes import put
from pagedkv.attention.inputs import New
from pagedkv.attention.plan import AttentionPlan
from pagedkv.attention.scores import ScoreOptions


class Donated:
    """Pools that MLX writes in place if no other reference and no work in flight uses them.

    It copies all of a pool otherwise. So a layer is written for the second time only after a wait
    for what is in flight, once for all layers. New K and V are computed before they are written:
    one that fails must not take with it what others have written. On a CPU the host has nothing to
    run ahead of, and pays nothing for either.

    Parameters
    ----------
    keys, values : sequence of mx.array
        Pools by layer, [N, S, Hkv, D] each, evaluated.
    """

    def __init__(self, keys: Sequence[mx.array], values: Sequence[mx.array]) -> None:
        self._keys, self._values = list(keys), list(values)
        self._written = [False] * len(keys)  # since the last wait

    def pools(self, layer: int) -> tuple[mx.array, mx.array]:
        """Return K and V of a layer."""
        return self._keys[layer], self._values[layer]

    def last(self, layer: int) -> None:
        """Return nothing: MLX knows of every write."""

    def settled(self) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Return K and V by layer."""
        return tuple(self._keys), tuple(self._values)

    def writes(self, plan: AttentionPlan) -> bool:
        """Whether `attend` takes `new` with this plan: never."""
        return False

    def attend(
        self,
        layer: int,
        plan: AttentionPlan,
        queries: mx.array,
        scores: ScoreOptions,
        new: New | None = None,
        tables: mx.array | None = None,
    ) -> mx.array:
        """Attend over what has been written, `new` too."""
        return plan.attend(queries, *self.pools(layer), scores, None, new, tables)[0]

    def write(self, layer: int, new: New, slots: mx.array) -> None:
        """Put tokens of K and V, [B, Hkv, L, D] each, into their slots, [B * L] int32."""
        mx.eval(new)
        if self._written[layer]:
            self.wait()
        written = [
            put(pool, slots, mx.flatten(tokens.swapaxes(1, 2), 0, 1), is_keys=is_keys)
            for pool, tokens, is_keys in zip(self.pools(layer), new, (True, False), strict=True)
        ]
        self._written[layer] = True
        self._keys[layer], self._values[layer] = written

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in every layer."""
        self.wait()
        sources, targets = (mx.array(ids) for ids in zip(*copies, strict=True))
        blocks = [[pool[sources] for pool in pools] for pools in (self._keys, self._values)]
        mx.eval(blocks)  # a reader that has not run would make MLX copy the pool
        for pools, copied in zip((self._keys, self._values), blocks, strict=True):
            pools[:] = [_replaced(p, targets, b) for p, b in zip(pools, copied, strict=True)]

    def begin(self, layer: int, out: mx.array, num_bytes: int) -> None:
        """Do nothing: on a CPU, no device runs asynchronously."""

    def start(self) -> list[mx.array]:
        """Return what to wait for."""
        return [*self._keys, *self._values]

    def wait(self) -> None:
        """Wait for what is in flight, so that it holds no pool."""
        mx.eval(self._keys, self._values)
        mx.synchronize()
        self._written = [False] * len(self._written)

    def mark(self) -> None:
        """Return nothing: what failed was not written."""

    def rewind(self, mark: object) -> None:
        """Wait."""
        self.wait()


def _replaced(pool: mx.array, ids: mx.array, blocks: mx.array) -> mx.array:
    flat = pool.reshape(pool.shape)  # whoever holds the other Python object keeps what is in it
    flat[ids] = blocks
    return flat
