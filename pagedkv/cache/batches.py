"""The batches of steps that follow each other: on the device, only what changed is new."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv import kernels
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.paths import backend_of
from pagedkv.host.block_table import BlockTable
from pagedkv.host.rows import Rows

KINDS = 32  # of calls whose plans are carried on; beyond, those of the batch before
FEW = 64  # ids: so many are put into what the device has, sooner than all of them anew


class Batches:
    """Makes the batch of each step of the same sequences.

    Nothing is checked: block ids of tables come from the pool.

    Parameters
    ----------
    tables : list of BlockTable
        The sequences.
    num_blocks : int
        N, blocks in the pool.

    Attributes
    ----------
    rows : Rows
        Their block ids on the host.
    """

    def __init__(self, tables: list[BlockTable], num_blocks: int) -> None:
        self.rows = Rows(tables)
        self._sizes = tables[0].block_size, num_blocks
        self._pool = tables[0].pool
        # Where the blocks lie, [groups, B, M]: what the device has, once it has something, and the
        # same here; the first group's by itself, and each group's if there are several.
        self._sent: mx.array
        self._places = np.empty((0, 0, 0), np.int32)
        self._lead: mx.array
        self._groups: tuple[mx.array, ...] = ()
        self._lens = self.rows.seen.lens  # of the batch before
        self._carried: dict[Hashable, tuple[Any, int]] = {}
        self._position = 0

    def next(self) -> DecodeBatch:
        """Return the batch of what `rows` has seen last.

        If all sequences have grown by the same number of tokens, the plans of the last batch are
        reused.
        """
        rows, lens = self.rows, self.rows.seen.lens
        if rows.changed:
            self._send(rows.room, rows.changed)
            rows.changed = []
        grown = lens - self._lens
        by = int(grown[0])
        if (grown != by).any():
            self._carried, self._position, by = {}, 0, 0
        self._lens = lens
        if len(self._carried) > KINDS:
            carried = self._carried.items()
            self._carried = {kind: made for kind, made in carried if made[1] == self._position}
        self._position += by
        going_on = self._carried, self._position
        return DecodeBatch(self._lead, *self._sizes, lens, self._groups, *going_on)

    def _send(self, ids: NDArray[np.int32], rows: list[int]) -> None:
        """Bring the device's tables to block ids that have changed in some rows.

        MLX on CUDA moves memory from the host by page faults: the less the better.
        """
        before, backend = self._places, backend_of(mx.default_device())
        if before.shape[1:] != ids.shape:
            self._places = self._pool.places(ids).copy()
            sent = kernels.array_of(self._places, backend).reshape(self._places.shape)
        else:
            sent = self._sent
            rows = sorted(set(rows))
            places = self._pool.places(ids[rows])
            groups, which, columns = (places != before[:, rows]).nonzero()
            which = np.array(rows)[which]
            before[:, rows] = places
            if 0 < len(groups) <= FEW:
                where = np.ravel_multi_index((groups, which, columns), before.shape)
                what, flat = before[groups, which, columns], sent.reshape(-1)
                if backend == "cuda":
                    flat = kernels.patched(flat, where, what)
                else:
                    flat[mx.array(where.astype(np.int32))] = mx.array(what)
                sent = flat.reshape(before.shape)
            elif len(groups):
                sent = mx.array(before)
        self._sent = sent
        if len(self._places) == 1:
            self._lead = sent.reshape(ids.shape)
        else:
            self._lead, *_ = self._groups = tuple(sent)
