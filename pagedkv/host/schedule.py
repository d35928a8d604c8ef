"""The schedule of a step: plain data. Host only."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pagedkv.host.block_table import BlockTable


@dataclass(eq=False)
class Schedule:
    """The tokens that the model computes next: prompts or chunks of them, else one per sequence.

    `PagedKVCache.step` turns it into device calls.

    Attributes
    ----------
    request_ids : list
        The requests, in order.
    tables : list of BlockTable
        Their blocks, with room for the tokens that are computed now, the last ones of each. They
        are the scheduler's own, to be read until the next schedule is chosen or this one is over.
    counts : list of int
        How many tokens of each are computed now.
    tokens : numpy.ndarray
        The tokens to compute, sequence by sequence, shape [sum(counts)], int32; 0 for `unknown`.
    copies : list of (int, int)
        Blocks to copy before anything is written: from which id, to which id.
    samples : list
        The requests whose next token this step samples; `Scheduler.update` takes those tokens.
    preempted : list
        The requests that gave up their blocks for this. They are computed again later.
    unknown : dict of int to int
        Tokens that a schedule in flight samples, which only the device knows: their position in
        `tokens`, and in `samples_before`.
    samples_before : list
        The `samples` of the schedule that was in flight when this was made; empty if none was.
    state : str
        "new", "stepped" when `PagedKVCache.step` has made a step of it, "late" if the next schedule
        was made before that, "over" after `update` or `retract`.
    """

    request_ids: list[Hashable]
    tables: list[BlockTable]
    counts: list[int]
    tokens: NDArray[np.int32]
    copies: list[tuple[int, int]]
    samples: list[Hashable]
    preempted: list[Hashable]
    unknown: dict[int, int]
    samples_before: list[Hashable]
    state: Literal["new", "stepped", "late", "over"] = "new"
