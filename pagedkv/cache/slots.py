"""Where new tokens are written, slots: checked on the host, put on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.limits import integers, positive_int32


class Writing(Protocol):
    """The part of a `Step` that writes into its slots use."""

    def check_writing(self, pools: object) -> None:
        """Raise unless the step is under way in these pools."""

    def wrote(self, layer: int) -> None:
        """Note that a layer's K and V were written."""


@dataclass(frozen=True, eq=False)
class SlotMapping:
    """The slots that a step writes, checked on the host and copied to the device once.

    Made once a step and shared by every layer, as `DecodeBatch` is.

    Attributes
    ----------
    slots : mx.array
        slot = block_id * S + offset of each token, shape [T], int32.
    block_size : int
        S, tokens in a block.
    num_blocks : int
        N, blocks in the pool that the slots index.
    group : int or None
        The group of layers whose blocks these are; None if that is not known.
    step : callable or None
        A weak reference to the step that made them, None if `from_slots` did.
    """

    slots: mx.array
    block_size: int
    num_blocks: int
    group: int | None = None
    step: Callable[[], Writing | None] | None = field(default=None, repr=False)

    @classmethod
    def from_slots(
        cls, slots: Sequence[int] | NDArray[np.integer], *, block_size: int, num_blocks: int
    ) -> SlotMapping:
        """Check host-side slots and place them on the default device.

        Parameters
        ----------
        slots : sequence of int
            One slot a token, in the order in which the tokens will be written; no slot twice.
        block_size : int
            Tokens in a block.
        num_blocks : int
            Blocks in the pool. MLX does not check bounds when it writes, so slots are checked here.

        Returns
        -------
        SlotMapping
            The slots.

        Raises
        ------
        ValueError
            If there is no slot, one is not in [0, num_blocks * block_size) or occurs twice, or
            `block_size`, `num_blocks` or their product is not a positive 32-bit integer. Nothing
            has reached the device then.
        """
        block_size = positive_int32(block_size, "block_size")
        num_blocks = positive_int32(num_blocks, "num_blocks")
        num_slots = positive_int32(num_blocks * block_size, "num_blocks * block_size")
        array = integers(slots, "slots")
        if array.min() < 0 or array.max() >= num_slots:
            bad = array[(array < 0) | (array >= num_slots)][0]
            raise ValueError(f"expected slots in [0, {num_slots}), got {bad}")
        ordered = np.sort(array)
        twice = ordered[1:] == ordered[:-1]
        if twice.any():
            raise ValueError(f"expected each slot once, got {ordered[1:][twice][0]} twice")
        return cls(mx.array(array.astype(np.int32)), block_size, num_blocks)
