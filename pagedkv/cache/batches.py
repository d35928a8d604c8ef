"""The batches of steps that follow each other: on the device, only what changed is new."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx

from pagedkv.attention.batch import DecodeBatch
from pagedkv.host.block_table import BlockTable
from pagedkv.host.rows import Rows


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
            block_tables = self._block_tables = mx.array(rows.block_tables)
            rows.changed = False
        grown = lens - self._lens
        by = int(grown[0])
        if (grown != by).any():
            self._carried, self._position, by = {}, 0, 0
        self._lens = lens
        self._position += by
        return DecodeBatch(block_tables, *self._sizes, lens, self._carried, self._position)
