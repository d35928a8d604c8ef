"""Changes of a prefix cache, for a listener that mirrors it, such as a router. Host only."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray


class CacheEvent(NamedTuple):
    """A change of the cached prefixes.

    A block id names a cached block from the event that stores it to the one that removes it or
    clears all. A block is stored after the one before it, and removed before that.

    Attributes
    ----------
    kind : str
        "stored" or "removed", blocks of one namespace; "cleared", all of them.
    namespace : hashable
        Namespace of the blocks.
    blocks : tuple of int
        Their ids, in the order of their tokens, each the continuation of the one before.
    parent : int or None
        The block before the first that is stored; None at the beginning of a prompt.
    tokens : numpy.ndarray or None
        The tokens of the blocks that are stored, shape [len(blocks) * S], int32, read-only.
    """

    kind: Literal["stored", "removed", "cleared"]
    namespace: Hashable = None
    blocks: tuple[int, ...] = ()
    parent: int | None = None
    tokens: NDArray[np.int32] | None = None


Listener = Callable[[CacheEvent], object]
