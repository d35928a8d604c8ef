"""Cached prefixes: a radix tree from tokens to the blocks that hold their K and V. Host only."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable

import numpy as np

from pagedkv.host.block_pool import BlockPool
from pagedkv.host.cache_event import CacheEvent, Listener
from pagedkv.host.radix_node import (
    TOKEN,
    Cached,
    Integers,
    Origin,
    PrefixMatch,
    RadixNode,
    whole_blocks,
)
from pagedkv.limits import count_of, integers, positive_int32

_Entry = tuple[int, int, RadixNode]  # when it was used, a serial number


class RadixTree:
    """Finds the longest cached prefix of a prompt, in whole blocks, and evicts cold ones.

    The tree holds its own reference to every block in it, until the tree is dropped. A hit adds
    references to the matched blocks and copies nothing. Tokens are compared exactly. Edges are runs
    of blocks, as in SGLang's RadixAttention; a comparison costs one `memcmp` per run.

    One thread at a time may use a tree and its pool. An exception at any point, including
    KeyboardInterrupt, leaves the tree consistent; one inside `lock` or `unlock` may leave runs
    locked.

    Parameters
    ----------
    pool : BlockPool
        The pool of the blocks.
    block_size : int
        S, tokens in a block.
    on_event : callable
        Called with a `CacheEvent` after each complete change; may be set at any time. It must not
        call the tree. Its exceptions reach the caller, and end a call that evicts.

    Raises
    ------
    ValueError
        If `block_size` is not a positive integer.
    """

    def __init__(self, pool: BlockPool, block_size: int, on_event: Listener | None = None) -> None:
        self.pool, self.on_event = pool, on_event
        pool.remember()
        self.block_size = positive_int32(block_size, "block_size")
        self._width = self.block_size * TOKEN.itemsize  # bytes of a block's tokens
        self._roots: dict[Hashable, RadixNode] = {}
        self._held = pool.held_by(self)
        self._held.ids = Cached(self._roots)
        self._num_blocks = self._num_locked = self._resets = 0
        self._clock = itertools.count(1)
        # Leaves, least recently used first. What is out of date is put right when its turn comes.
        self._line: list[_Entry] = []
        self._aside: list[_Entry] = []  # what the last eviction left out, in no order
        self._serial = itertools.count()

    @property
    def num_blocks(self) -> int:
        """Blocks in the tree."""
        return self._num_blocks

    @property
    def num_evictable(self) -> int:
        """Blocks in the tree that are not locked."""
        return self._num_blocks - self._num_locked

    def num_blocks_of(self, namespace: Hashable) -> int:
        """Return how many blocks of a namespace are in the tree, in time linear in its runs."""
        return sum(len(node.blocks) for node in self._root(namespace).below())

    def blocks(self) -> list[int]:
        """Return the blocks that can be matched, in no order, in linear time."""
        nodes = itertools.chain(*(root.below() for root in self._roots.values()))
        return [block for node in nodes for block in node.blocks]

    def match_prefix(self, tokens: Integers, namespace: Hashable = None) -> PrefixMatch:
        """Return the longest cached prefix of `tokens`, and note that it was used.

        A run is split where a match ends inside it; `insert` and `extend` do that, too. No
        reference is taken: add them (`BlockPool.retain`) and lock the node before anything is
        evicted.

        Parameters
        ----------
        tokens : sequence of int
            The prompt, 32-bit token ids. An int32 array is read without a conversion.
        namespace : hashable
            Namespaces (tenants, adapters, models) share no prefixes.

        Returns
        -------
        PrefixMatch
            Without blocks if nothing is cached. In a `FramePool` the match ends where the blocks
            that the next token sees still have their frames.

        Raises
        ------
        ValueError
            If `tokens` are not 32-bit integers in one dimension.
        """
        root, key = self._root(namespace), whole_blocks(tokens, self.block_size)
        match = self._walk(root, key)
        count = self.pool.reusable(match.blocks)
        return match if count == len(match.blocks) else self._walk(root, key[: count * self._width])

    def insert(self, tokens: Integers, blocks: Integers, namespace: Hashable = None) -> PrefixMatch:
        """Cache the whole blocks of `tokens`.

        Tokens that are cached already keep their blocks; the tree adds a reference to each of the
        other blocks. The caller keeps its own references.

        Parameters
        ----------
        tokens : sequence of int
            Token ids; those past the last whole block are left out.
        blocks : sequence of int
            The blocks that hold them, in order, at least one for each whole block of tokens.
        namespace : hashable
            As for `match_prefix`.

        Returns
        -------
        PrefixMatch
            The tokens' whole blocks as the tree has them now.

        Raises
        ------
        ValueError
            If `tokens` are not 32-bit integers in one dimension, there are too few blocks, or one
            of those to be added is unknown or free. Nothing is cached then.
        """
        return self.extend(self._root(namespace), tokens, blocks)

    def extend(self, node: RadixNode, tokens: Integers, blocks: Integers) -> PrefixMatch:
        """Cache the whole blocks of `tokens` after a match, in time linear in these tokens.

        The tokens before them count as used when the node is unlocked.

        Parameters
        ----------
        node : RadixNode
            The end of the tokens before these: locked, or an empty match.
        tokens, blocks : sequence of int
            As for `insert`, without the tokens before them.

        Returns
        -------
        PrefixMatch
            The whole blocks of `tokens` as the tree has them now. They are other blocks than the
            caller's where the same tokens were cached before.

        Raises
        ------
        ValueError
            As for `insert`, or if the node is not locked. Nothing is cached then.
        """
        if node.parent is None:
            node = self._root(node.origin.namespace)
        elif not node.locks:
            raise ValueError("expected a locked node, got one that may have been evicted")
        elif node.origin.resets != self._resets:
            return PrefixMatch([], node)
        key = whole_blocks(tokens, self.block_size)
        count = len(key) // self._width
        if len(blocks) < count:
            raise ValueError(f"expected at least {count} blocks, got {len(blocks)}")
        match = self._walk(node, key)
        cached, node = match
        if len(cached) == count:
            return match
        added = blocks[len(cached) : count]
        if not isinstance(added, list) or {*map(type, added)} != {int}:
            added = integers(added, "blocks").tolist()
        leaf = RadixNode(key[len(cached) * self._width :], added, node, node.origin)
        leaf.used = node.used
        total = self._num_blocks
        try:
            self._wait(leaf)
            self._num_blocks = total + len(added)
            self._attach(leaf)
            self.pool.retain(added)  # last, since it is all or nothing
        except BaseException:
            self._detach(leaf)
            self._num_blocks, leaf.blocks = total, []
            raise
        if self.on_event:
            last, ids = node.blocks[-1] if node.blocks else None, np.frombuffer(leaf.key, TOKEN)
            self.on_event(CacheEvent("stored", node.origin.namespace, tuple(added), last, ids))
        return PrefixMatch(cached + added, leaf)

    def lock(self, node: RadixNode) -> None:
        """Keep a match from being evicted until `unlock` is called as often.

        Visits the nodes up to the first that is locked already: a growing sequence locks its new
        end, then unlocks the old one, in time that does not depend on its length.
        """
        path = [node]
        while not path[-1].locks and path[-1].parent:
            path.append(path[-1].parent)
        for up in reversed(path):  # so that what an interrupt leaves locked is too much
            size = 0 if up.locks else len(up.blocks)
            up.locks, self._num_locked = up.locks + 1, self._num_locked + size

    def unlock(self, node: RadixNode) -> None:
        """Undo one `lock`.

        Raises
        ------
        ValueError
            If the node is not locked. Nothing has changed then.
        """
        if node.locks < 1:
            raise ValueError("expected a locked node, got one without locks")
        forgotten = node.origin.resets != self._resets
        up: RadixNode | None = node
        while up is not None:
            if up.locks > 1:
                up.locks -= 1
                break
            if forgotten:
                self._let_go(up)
                up.locks = 0
            else:
                if up.parent and up.parent.used < up.used:
                    up.parent.used = up.used
                if not up.children:
                    self._wait(up)
                up.locks, self._num_locked = 0, self._num_locked - len(up.blocks)
            up = up.parent

    def evict(self, num_blocks: int) -> int:
        """Evict the least recently used prefixes, from their ends, until enough blocks are free.

        A run is evicted after all runs that continue it, and never while it is locked. A lookup or
        insertion marks all blocks on its path as used at once; they are evicted from the end. Two
        ends never have the same last use. Blocks that a sequence still holds are evicted in turn,
        too, but not counted.

        Parameters
        ----------
        num_blocks : int
            Blocks to free; none if it is negative.

        Returns
        -------
        int
            Blocks that became free: `num_blocks`, or fewer if nothing more can be evicted.

        Raises
        ------
        ValueError
            If `num_blocks` is not an integer. Nothing has changed then.
        """
        if self._aside:
            self._arrange(self._line + self._aside, [])
        num_blocks = count_of(max(num_blocks, 0), "num_blocks")
        freed = self.pool.reclaim(num_blocks, asked_for=False)
        freed += self._evict(num_blocks - freed)
        return freed + self.pool.reclaim(num_blocks - freed, asked_for=True)

    def evict_from(self, namespace: Hashable, num_blocks: int) -> int:
        """Evict prefixes of one namespace as `evict` does, in time linear in the tree's leaves."""
        line = self._line + self._aside
        theirs = [entry for entry in line if entry[2].origin.namespace == namespace]
        self._arrange(theirs, [entry for entry in line if entry[2].origin.namespace != namespace])
        return self._evict(count_of(max(num_blocks, 0), "num_blocks"))

    def reset(self) -> int:
        """Forget all prefixes, for example after the weights change: their K and V are wrong.

        Locked prefixes are no longer matched or counted, and are dropped when they are unlocked:
        sequences that hold them keep running, but `extend` caches nothing for them.

        Returns
        -------
        int
            Blocks that became free.
        """
        self._arrange(self._line + self._aside, [])
        freed = self._evict(self.pool.num_blocks + 1)  # all there is
        self._roots, self._num_blocks, self._num_locked, self._resets = {}, 0, 0, self._resets + 1
        self._held.ids = Cached(self._roots)
        if self.on_event:
            self.on_event(CacheEvent("cleared"))
        return freed

    def check_invariants(self) -> None:
        """Raise AssertionError if an invariant does not hold; for tests, in linear time."""
        seen, uses, locked = list[int](), list[int](), 0
        # Its parent comes after a node that is wholly evicted.
        line = {id(node if node.blocks else node.parent) for _, _, node in self._line + self._aside}
        assert all(root.children for root in self._roots.values()), "an empty namespace is kept"
        for node in itertools.chain(*(root.below() for root in self._roots.values())):
            node.check_invariants(self._width)
            if node.parent and not node.children and not node.locks:
                assert id(node) in line, "a leaf is not in line"
                uses.append(node.used)
            assert self._roots[node.origin.namespace].origin is node.origin, "in a wrong namespace"
            seen += node.blocks
            locked += len(node.blocks) if node.locks else 0
        assert len(seen) == len(set(seen)) == self._num_blocks, "a block is lost or twice in here"
        assert len(uses) == len(set(uses)), "two leaves were used last at once"
        assert locked == self._num_locked, "locked blocks are miscounted"
        assert all(self.pool.reference_count(block) > 0 for block in seen), "a free block"

    def _arrange(self, line: list[_Entry], aside: list[_Entry]) -> None:
        """Let `line` be evicted in its order, and nothing of `aside`."""
        heapq.heapify(line)
        self._line, self._aside = line, aside

    def _evict(self, num_blocks: int) -> int:
        freed = 0
        while freed < num_blocks and self._line:
            used, _, node = self._line[0]
            if node.children or node.locks or not node.blocks:
                if node.parent and not node.blocks:
                    self._wait(node.parent)
                heapq.heappop(self._line)[2].queued = False
            elif node.used != used:
                heapq.heapreplace(self._line, (node.used, next(self._serial), node))
            else:
                freed += self._trim(node, num_blocks - freed)
        return freed

    def _root(self, namespace: Hashable) -> RadixNode:
        """Return where a namespace begins: in the tree, or a new one if nothing is cached."""
        if root := self._roots.get(namespace):
            return root
        return RadixNode(b"", [], None, Origin(namespace, self._resets))

    def _walk(self, node: RadixNode, key: bytes) -> PrefixMatch:
        """Go down from `node` as far as `key` is cached, splitting the last node if need be."""
        position, now, width = 0, next(self._clock), self._width
        blocks: list[int] = []
        node.used = now
        while child := node.children.get(key[position : position + width]):
            size = len(child.blocks) * width
            if not key.startswith(child.key, position):
                common = child.common_bytes(key, position, width)
                if common < size:
                    child, size = child.split(common, width), common
            node = child
            node.used = now
            position += size
            blocks += node.blocks
        return PrefixMatch(blocks, node)

    def _wait(self, node: RadixNode) -> None:
        """Put a node in line to be evicted if it is a leaf and not there yet."""
        if node.parent and not (node.queued or node.children):
            heapq.heappush(self._line, (node.used, next(self._serial), node))
            node.queued = True

    def _attach(self, leaf: RadixNode) -> None:
        assert leaf.parent is not None
        leaf.parent.children[leaf.key[: self._width]] = leaf
        if leaf.parent.parent is None:
            self._roots[leaf.origin.namespace] = leaf.parent

    def _detach(self, leaf: RadixNode) -> None:
        assert leaf.parent is not None
        leaf.parent.children.pop(leaf.key[: self._width], None)
        if leaf.parent.parent is None and not leaf.parent.children:
            self._roots.pop(leaf.origin.namespace, None)

    def _let_go(self, node: RadixNode) -> None:
        """Give back the blocks of a node that is forgotten."""
        blocks = node.blocks
        try:
            node.blocks = []
            self.pool.release(blocks)
        except BaseException:
            node.blocks = blocks
            raise

    def _trim(self, node: RadixNode, wanted: int) -> int:
        """Forget up to `wanted` blocks from the end of a leaf, and return how many became free."""
        kept = max(len(node.blocks) - wanted, 0)
        dropped, total, free = node.blocks[kept:], self._num_blocks, self.pool.num_free
        try:
            self._num_blocks = total - len(dropped)
            del node.blocks[kept:]
            if not kept:
                self._detach(node)
            self.pool.release(dropped)  # last, since it is all or nothing
        except BaseException:
            self._num_blocks, node.blocks[kept:] = total, dropped
            self._attach(node)
            raise
        if len(node.key) > 2 * kept * self._width:  # seldom: the cost of a copy is by what goes
            node.key = node.key[: kept * self._width]
        freed = self.pool.num_free - free
        if self.on_event:
            self.on_event(CacheEvent("removed", node.origin.namespace, tuple(dropped)))
        return freed
