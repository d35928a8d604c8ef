"""A request while it is scheduled. Host only."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pagedkv.host.block_table import BlockTable
from pagedkv.host.radix_node import RadixNode


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and how far it has come.

    Attributes
    ----------
    request_id : hashable
        Its name.
    tokens : array of int32
        The prompt and what was generated.
    prompt, limit : int
        Tokens of the prompt, and those at which the request is finished.
    order : tuple of int
        The smallest comes first.
    namespace, shares : hashable, bool
        Namespace of its cached prefixes, and whether it uses them.
    table : BlockTable
        Its blocks; without tokens while it waits.
    is_running : bool
        Whether it runs; otherwise it waits.
    is_prefilling : bool
        Whether it runs, and a token before its last is not computed yet.
    node : RadixNode or None
        The end of its cached prefix in the tree; None if it waits or does not share.
    num_shared : int
        Blocks of the table up to `node`: the tree's.
    is_dropped : bool
        Whether its request has ended.
    """

    request_id: Hashable
    tokens: array[int]
    prompt: int
    limit: int
    order: tuple[int, int]
    namespace: Hashable
    shares: bool
    table: BlockTable
    is_running: bool = False
    is_prefilling: bool = False
    node: RadixNode | None = None
    num_shared: int = 0
    is_dropped: bool = False

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


def token_ids(values: list[int]) -> array[int]:
    """Return token ids as a sequence holds them; ValueError for what is no 32-bit integer."""
    try:
        return array("i", values)
    except (TypeError, OverflowError):
        raise ValueError(f"expected 32-bit token ids, got {values}") from None


def prompt_ids(prompt: ArrayLike) -> array[int]:
    """Return a prompt's token ids, at least one; ValueError for what is no prompt."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError("expected a prompt of at least one integer token")
    if not np.array_equal(ids.astype(np.int32), ids):
        raise ValueError("expected token ids to fit in 32 bits")
    return array("i", ids.astype(np.int32).tobytes())
