"""A run of blocks in the tree of cached prefixes: its tokens and its place. Host only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

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


class Origin(NamedTuple):
    """What a node has in common with all that hangs together with it."""

    namespace: Hashable
    resets: int  # of the tree, before this was cached


class RadixNode:
    """A run of blocks that every prefix through it shares. Opaque: for `lock` and `unlock`."""

    __slots__ = ("blocks", "children", "key", "locks", "origin", "parent", "queued", "used")

    def __init__(
        self, key: bytes, blocks: list[int], parent: RadixNode | None, origin: Origin
    ) -> None:
        self.key = key  # the tokens of the run, whole blocks; more of them while it is evicted
        self.blocks = blocks
        self.parent = parent  # None where a namespace begins: there are no tokens, no blocks
        self.origin = origin
        self.children: dict[bytes, RadixNode] = {}  # by the tokens of their first block
        self.locks = 0  # locks on this run, and one more for each child that has some
        self.used = 0  # when it was last looked up
        self.queued = False  # whether it waits in line to be evicted

    def below(self) -> Iterator[RadixNode]:
        """Go through the node and all below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    def up_to(self) -> list[int]:
        """Return the blocks from the beginning of the prompt to the end of the run."""
        runs: list[list[int]] = []
        node: RadixNode | None = self
        while node is not None:
            runs.append(node.blocks)
            node = node.parent
        return [block for run in reversed(runs) for block in run]

    def check_invariants(self, width: int) -> None:
        """Raise AssertionError if the node, or what is right below it, is broken."""
        assert len(self.key) >= len(self.blocks) * width, "blocks without tokens"
        assert bool(self.blocks) == (self.parent is not None), "an empty node"
        assert self.locks >= sum(child.locks > 0 for child in self.children.values())
        for first, child in self.children.items():
            assert child.parent is self, "a child of another"
            assert child.key.startswith(first), "a child under another's tokens"
            assert self.locks or child.used <= self.used, "used later than its parent"

    def common_bytes(self, key: bytes, start: int, width: int) -> int:
        """How much of the run lies in `key` at `start`, in whole blocks of `width` bytes."""
        count = min(len(self.key), len(key) - start) // TOKEN.itemsize
        differ = np.frombuffer(self.key, TOKEN, count) != np.frombuffer(key, TOKEN, count, start)
        same = int(differ.argmax()) if differ.any() else count
        return same * TOKEN.itemsize // width * width

    def split(self, at: int, width: int) -> RadixNode:
        """Put the first `at` bytes into a new node above this one, and return that.

        This node goes on ending where it ended, with the locks that were on that end.
        """
        assert self.parent is not None
        first, key, blocks = self.key[:width], self.key[at:], at // width
        upper = RadixNode(self.key[:at], self.blocks[:blocks], self.parent, self.origin)
        upper.locks, upper.used = int(self.locks > 0), self.used
        upper.children[key[:width]] = self
        rest = self.blocks[blocks:]
        # One statement: nothing is there twice or not at all.
        self.parent.children[first], self.key, self.blocks, self.parent = upper, key, rest, upper
        return upper


class Cached:
    """Blocks of a tree's runs, for the time after the tree; see `Held`."""

    def __init__(self, roots: dict[Hashable, RadixNode]) -> None:
        self._roots = roots

    def __getitem__(self, part: slice, /) -> list[int]:
        """Return some of them, in no order."""
        nodes = [node for root in self._roots.values() for node in root.below()]
        return [block for node in nodes for block in node.blocks][part]


class PrefixMatch(NamedTuple):
    """A cached prefix.

    Attributes
    ----------
    blocks : list of int
        Its blocks, in the order of the tokens: the first len(blocks) * S of them.
    node : RadixNode
        Where it ends in the tree.
    """

    blocks: list[int]
    node: RadixNode
