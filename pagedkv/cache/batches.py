"""The batches of steps that follow each other: on the device, only what changed is new."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.attention.batch import DecodeBatch
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
        self._block_tables: mx.array | None = None
        self._on_device = self.rows.block_tables  # what the device has, once it has something
        self._lens = self.rows.seen.lens  # of the batch before
        self._carried: dict[Hashable, tuple[Any, int]] = {}
        self._position = 0

    def next(self) -> DecodeBatch:
        """Return the batch of what `rows` has seen last.

        If all sequences have grown by as many tokens since the batch before, its plans go on.
        """
        rows, lens = self.rows, self.rows.seen.lens
        block_tables = self._block_tables
        if block_tables is None or rows.changed:
            block_tables = self._block_tables = self._sent(rows.block_tables)
            rows.changed = False
        grown = lens - self._lens
        by = int(grown[0])
        if (grown != by).any():
            self._carried, self._position, by = {}, 0, 0
        self._lens = lens
        if len(self._carried) > KINDS:
            carried = self._carried.items()
            self._carried = {kind: made for kind, made in carried if made[1] == self._position}
        self._position += by
        return DecodeBatch(block_tables, *self._sizes, lens, self._carried, self._position)

    def _sent(self, ids: NDArray[np.int32]) -> mx.array:
        """Return block ids on the device, which has most of them already.

        MLX on CUDA moves memory from the host by page faults: the less the better.
        """
        before, self._on_device = self._on_device, ids.copy()
        if self._block_tables is not None and before.shape == ids.shape:
            changed = np.flatnonzero(before != ids)
            if 0 < changed.size <= FEW:
                where, what = mx.array(np.stack([changed, ids.ravel()[changed]]).astype(np.int32))
                flat = self._block_tables.reshape(-1)
                flat[where] = what
                return flat.reshape(ids.shape)
        return mx.array(ids)
