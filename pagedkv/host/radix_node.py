"""A run of blocks in the tree of cached prefixes: its tokens and its place. Host only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = Sequence[int] | NDArray[np.integer]
TOKEN = np.dtype(np.int32)


def whole_blocks(tokens: Integers, block_size: int) -> bytes:
    """Return the tokens' whole blocks as bytes; ValueError if they are not 32-bit integers."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        got = f"{array.dtype} in {array.ndim}"
        raise ValueError(f"expected tokens to be integers in one dimension, got {got}")
    ids = array.astype(TOKEN, copy=False)
    if array.dtype != TOKEN and not np.array_equal(ids, array):
        raise ValueError("expected token ids to fit in 32 bits")
    return ids[: ids.size // block_size * block_size].tobytes()


class RadixNode:
    """A run of blocks that every prefix through it shares.

    Attributes
    ----------
    key : bytes
        The tokens of the run, whole blocks.
    blocks : ndarray
        Block ids by group of layers, int32, shape [G, n].
    parent : RadixNode or None
        None at the root of a namespace, which has no tokens.
    children : dict
        By the tokens of their first block.
    namespace : hashable
        Namespace of the prefix.
    resets : int
        Resets of the tree before this was cached.
    used : int
        When it was last looked up.
    is_queued : bool
        Whether it is in the queue of leaves.
    """

    __slots__ = (
        *("blocks", "children", "is_queued", "key", "namespace", "parent", "resets", "used"),
    )

    def __init__(
        self,
        key: bytes,
        blocks: NDArray[np.int32],
        parent: RadixNode | None,
        namespace: Hashable,
        resets: int,
    ) -> None:
        self.key, self.blocks, self.parent = key, blocks, parent
        self.namespace, self.resets = namespace, resets
        self.children: dict[bytes, RadixNode] = {}
        self.used = 0
        self.is_queued = False

    def below(self) -> Iterator[RadixNode]:
        """Go through the node and all below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    def common_bytes(self, key: bytes, start: int, width: int) -> int:
        """Return how much of the run is in `key` at `start`, in whole blocks of `width` bytes."""
        count = min(len(self.key), len(key) - start) // TOKEN.itemsize
        differ = np.frombuffer(self.key, TOKEN, count) != np.frombuffer(key, TOKEN, count, start)
        same = int(differ.argmax()) if differ.any() else count
        return same * TOKEN.itemsize // width * width

    def split(self, at: int, width: int) -> RadixNode:
        """Put the first `at` bytes into a new node above this one, and return that.

        This node keeps its end.
        """
        assert self.parent is not None
        blocks, first = at // width, self.key[:width]
        upper = RadixNode(
            self.key[:at], self.blocks[:, :blocks], self.parent, self.namespace, self.resets
        )
        upper.used = self.used
        upper.children[self.key[at : at + width]] = self
        self.parent.children[first] = upper
        self.key, self.blocks, self.parent = self.key[at:], self.blocks[:, blocks:], upper
        return upper


@dataclass(frozen=True, eq=False)
class PrefixMatch:
    """A cached prefix.

    Attributes
    ----------
    ids : ndarray
        Ids of its blocks by group of layers, in the order of the tokens, int32, shape [G, n].
    node : RadixNode
        Where it ends in the tree.
    """

    ids: NDArray[np.int32]
    node: RadixNode

    @property
    def num_blocks(self) -> int:
        """Blocks of it in a group that sees all tokens: n."""
        return int(self.ids.shape[1])

    @property
    def blocks(self) -> list[int]:
        """Ids of its blocks in the first group of layers."""
        ids: list[int] = self.ids[0].tolist()
        return ids
