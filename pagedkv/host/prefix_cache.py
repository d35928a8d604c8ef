"""Cached prefixes: a radix tree from tokens to the blocks that hold their K and V. Host only."""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections.abc import Hashable, Iterator

import numpy as np
from numpy.typing import NDArray

from pagedkv.host.block_pool import BlockPool, Ids
from pagedkv.host.cache_event import CacheEvent, Listener
from pagedkv.host.interrupts import Uninterrupted
from pagedkv.host.radix_node import TOKEN, Integers, PrefixMatch, RadixNode, whole_blocks
from pagedkv.limits import count_of

_Entry = tuple[int, int, RadixNode]  # when it was used, a serial number


class RadixTree:
    """Finds the longest cached prefix of a prompt, in whole blocks, and evicts cold ones.

    The tree holds a reference to every block in it, until the tree is dropped. A hit copies
    nothing. Tokens are compared exactly. Edges are runs of blocks, as in SGLang's RadixAttention; a
    comparison costs one `memcmp` per run. What nothing but the tree holds is evicted when blocks
    run out.

    One thread at a time may use a tree and its pool.

    Parameters
    ----------
    pool : BlockPool
        The pool of the blocks.
    block_size : int
        S, tokens in a block.
    on_event : callable
        Called with a `CacheEvent` after each complete change; may be set at any time. It must not
        call the tree. Its exceptions reach the caller; the change stays.

    Attributes
    ----------
    evicted_blocks : int
        Blocks that were freed since the beginning.

    Raises
    ------
    ValueError
        If `block_size` is not a positive integer.
    """

    def __init__(self, pool: BlockPool, block_size: int, on_event: Listener | None = None) -> None:
        self.pool, self.on_event = pool, on_event
        pool.keeps_windows = True
        self.block_size = pool.use_block_size(block_size)
        self._width = self.block_size * TOKEN.itemsize  # bytes of a block's tokens
        self._roots: dict[Hashable, RadixNode] = {}
        self._own = np.zeros(pool.num_blocks, np.int32)  # the tree's references to each block
        self._resets = self.evicted_blocks = 0
        self._clock, self._serial = itertools.count(1), itertools.count()
        # Leaves, least recently used first. What is out of date is put right when its turn comes.
        self._queue: list[_Entry] = []
        roots, tree = self._roots, weakref.ref(self)

        def reclaim(num_blocks: int) -> int:
            own = tree()
            return own.evict(num_blocks) if own else 0

        def give_back() -> None:
            if reclaim in pool.reclaimers:
                pool.reclaimers.remove(reclaim)
            _forget(roots, pool)

        pool.reclaimers.append(reclaim)
        pool.on_drop(self, give_back)

    @property
    def num_blocks(self) -> int:
        """Blocks in the tree."""
        return int(self._own.sum())

    @property
    def num_evictable(self) -> int:
        """Blocks that nothing but the tree holds; in linear time."""
        return int(np.count_nonzero((self._own > 0) & (self.pool.refs == self._own)))

    def match_prefix(self, tokens: Integers, namespace: Hashable = None) -> PrefixMatch:
        """Return the longest cached prefix of `tokens`, and note that it was used.

        A run is split where a match ends inside it; `insert` and `extend` do that, too. The caller
        has to take references (`BlockTable.adopt`) before blocks are next taken.

        Parameters
        ----------
        tokens : sequence of int
            The prompt, 32-bit token ids. An int32 array is read without a conversion.
        namespace : hashable
            Namespaces (tenants, adapters, models) share no prefixes.

        Returns
        -------
        PrefixMatch
            Empty if nothing is cached. Where groups of layers have windows it ends where the next
            token finds all that it sees.

        Raises
        ------
        ValueError
            If `tokens` are not 32-bit integers in one dimension.
        """
        root, key = self._root(namespace), whole_blocks(tokens, self.block_size)
        blocks, node = self._walk(root, key)
        count = self._usable(blocks)
        if count < blocks.shape[1]:
            blocks, node = self._walk(root, key[: count * self._width])
        return PrefixMatch(blocks, node)

    def insert(self, tokens: Integers, blocks: Ids, namespace: Hashable = None) -> PrefixMatch:
        """Cache the whole blocks of `tokens`.

        Tokens that are cached already keep their blocks; the tree adds a reference to each of the
        other blocks. The caller keeps its own references.

        Parameters
        ----------
        tokens : sequence of int
            Token ids; those past the last whole block are left out.
        blocks : sequence of int
            The blocks that hold them, in order, at least one for each whole block of tokens; of
            several groups [G, n], see `BlockTable.blocks`.
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
            is unknown or free. Nothing is cached then.
        """
        return self.extend(self._root(namespace), tokens, blocks)

    def extend(self, node: RadixNode, tokens: Integers, blocks: Ids) -> PrefixMatch:
        """Cache the whole blocks of `tokens` after a match, in time linear in these tokens.

        Parameters
        ----------
        node : RadixNode
            The end of the tokens before these, whose blocks the caller holds, or an empty match.
        tokens, blocks : sequence of int
            As for `insert`, without the tokens before them.

        Returns
        -------
        PrefixMatch
            The whole blocks of `tokens` as the tree has them now. They are other blocks than the
            caller's where the same tokens were cached before. Empty if the node was evicted, or the
            tree was reset since the match: nothing is cached then.

        Raises
        ------
        ValueError
            As for `insert`. Nothing is cached then.
        """
        key, held = whole_blocks(tokens, self.block_size), self.pool.by_group(blocks)
        if node.parent is None:
            node = self._root(node.namespace)
        elif node.resets != self._resets or not node.blocks.shape[1]:
            return PrefixMatch(held[:, :0], node)
        count = len(key) // self._width
        if held.shape[1] < count:
            raise ValueError(f"expected at least {count} blocks, got {held.shape[1]}")
        held = held[:, :count]
        with Uninterrupted():
            cached, node = self._walk(node, key)
            first = cached.shape[1]
            if len(held) > 1:
                cached = self._fill(node, cached, held[:, :first])
            added = held[:, first:]
            if first < count:
                last = node
                node = RadixNode(
                    key[first * self._width :], added.copy(), last, last.namespace, self._resets
                )
                node.used = last.used
                last.children[node.key[: self._width]] = node
                if last.parent is None:
                    self._roots[last.namespace] = last
                self._hold(added[added >= 0])
                self._enqueue(node)
            if first < count and self.on_event:
                before, own = last.blocks[0, -1:].tolist(), tuple(added[0].tolist())
                ids = np.frombuffer(key, TOKEN)[first * self.block_size :]
                parent = before[0] if before else None
                self.on_event(CacheEvent("stored", node.namespace, own, parent, ids))
        return PrefixMatch(np.concatenate([cached, added], axis=1), node)

    def evict(self, num_blocks: int) -> int:
        """Evict the least recently used prefixes, from their ends, until enough blocks are free.

        Blocks that something besides the tree holds stay. Where groups of layers have windows, the
        blocks that only a prompt parting inside of a run would need go first.

        Parameters
        ----------
        num_blocks : int
            Blocks to free; none if it is negative.

        Returns
        -------
        int
            Blocks that became free: `num_blocks` or more, or fewer if nothing more can be evicted.

        Raises
        ------
        ValueError
            If `num_blocks` is not an integer. Nothing has changed then.
        """
        wanted = count_of(max(num_blocks, 0), "num_blocks")
        with Uninterrupted():  # until the listener knows
            freed = self._drop_windows(wanted, inside=True)
            freed += self._evict(wanted - freed)
            return freed + self._drop_windows(wanted - freed, inside=False)

    def reset(self) -> int:
        """Forget all prefixes, for example after the weights change: their K and V are wrong.

        Sequences keep the blocks that they hold; `extend` caches nothing after an earlier match.

        Returns
        -------
        int
            Blocks that became free.
        """
        free = self.pool.num_free
        with Uninterrupted():
            _forget(self._roots, self.pool)
            self._own[:] = 0
            self._queue, self._resets = [], self._resets + 1
            if self.on_event:
                self.on_event(CacheEvent("cleared"))
        return self.pool.num_free - free

    def check_invariants(self) -> None:
        """Raise AssertionError if an invariant does not hold; for tests, in linear time."""
        queued, own = {id(node) for _, _, node in self._queue}, np.zeros_like(self._own)
        assert all(root.children for root in self._roots.values()), "an empty namespace is kept"
        for node in self.nodes():
            ids = node.blocks[node.blocks >= 0]
            np.add.at(own, ids, 1)
            assert node.resets == self._resets, "a node from before a reset"
            assert node.is_queued == (id(node) in queued), "wrong about the queue"
            if node.parent:
                assert len(node.key) >= node.blocks.shape[1] * self._width > 0, "an empty run"
                assert (node.blocks[0] >= 0).all(), "a run lacks blocks that all tokens see"
                assert node.children or node.is_queued, "a leaf is not in the queue"
            for first, child in node.children.items():
                assert child.parent is node, "a child of another"
                assert child.key.startswith(first), "a child under another's tokens"
        assert (own == self._own).all(), "blocks of the tree are miscounted"
        assert (self.pool.refs >= own).all(), "a block in the tree without its reference"

    def nodes(self) -> Iterator[RadixNode]:
        """Go through all runs."""
        return itertools.chain(*(root.below() for root in list(self._roots.values())))

    def _root(self, namespace: Hashable) -> RadixNode:
        """Return where a namespace begins: in the tree, or a new one if nothing is cached."""
        empty = np.empty((len(self.pool.windows), 0), np.int32)
        return self._roots.get(namespace) or RadixNode(b"", empty, None, namespace, self._resets)

    def _walk(self, node: RadixNode, key: bytes) -> tuple[NDArray[np.int32], RadixNode]:
        """Go down from `node` as far as `key` is cached, splitting the last node if need be."""
        position, now, width = 0, next(self._clock), self._width
        found = [self._root(None).blocks]
        node.used = now
        while child := node.children.get(key[position : position + width]):
            size = child.blocks.shape[1] * width
            if not key.startswith(child.key, position):
                common = child.common_bytes(key, position, width)
                if common < size:
                    with Uninterrupted():
                        child, size = child.split(common, width), common
            node = child
            node.used = now
            position += size
            found.append(node.blocks)
        return (found[1] if len(found) == 2 else np.concatenate(found, axis=1)), node

    def _usable(self, blocks: NDArray[np.int32]) -> int:
        """Return with how many blocks, [G, n], a sequence can begin: its windows are all there."""
        counts = np.arange(blocks.shape[1] + 1)
        possible = np.ones(len(counts), bool)
        for group in np.flatnonzero(~self.pool.sees_all_tokens).tolist():
            # Up to each block, how many from the first on are gone.
            gone = np.concatenate([[0], np.cumsum(blocks[group] < 0)])
            possible &= gone == gone[self.pool.first_seen(counts * self.block_size, group)]
        return int(np.flatnonzero(possible)[-1])

    def _fill(
        self, node: RadixNode, cached: NDArray[np.int32], own: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Take a sequence's blocks, [G, n], where the runs up to a node have lost theirs."""
        if not ((cached < 0) & (own >= 0)).any():
            return cached
        end, up = cached.shape[1], node
        while end > 0:
            begin = end - up.blocks.shape[1]
            given = own[:, max(begin, 0) : end]
            held = up.blocks[:, -given.shape[1] :]
            lacks = (held < 0) & (given >= 0)
            up.blocks = up.blocks.copy()  # a run that was split shares its array
            up.blocks[:, -given.shape[1] :][lacks] = given[lacks]
            self._hold(given[lacks])
            assert up.parent is not None
            end, up = begin, up.parent
        return np.where(cached < 0, own, cached)

    def _hold(self, ids: NDArray[np.int32]) -> None:
        np.add.at(self.pool.refs, ids, 1)
        np.add.at(self._own, ids, 1)

    def _let_go(self, ids: NDArray[np.int32]) -> None:
        ids = ids[ids >= 0]
        if len(ids) == 1:
            self._own[ids[0]] -= 1
        else:
            np.subtract.at(self._own, ids, 1)
        self.pool.unref(ids)

    def _enqueue(self, node: RadixNode) -> None:
        """Put a leaf into the queue."""
        if node.parent and not node.is_queued and not node.children:
            heapq.heappush(self._queue, (node.used, next(self._serial), node))
            node.is_queued = True

    def _evict(self, wanted: int) -> int:
        freed, now = 0, next(self._clock)
        while freed < wanted and self._queue:
            used, _, node = self._queue[0]
            if node.children:
                heapq.heappop(self._queue)[2].is_queued = False
            elif node.used != used:
                heapq.heapreplace(self._queue, (node.used, next(self._serial), node))
            elif used <= now:
                freed += self._trim(node, wanted - freed)
            elif self._has_idle_run():
                # All ends are in use, by sequences that hold other blocks for what is before them.
                freed += self._trim(node, wanted - freed, in_use=True)
            else:
                break
        return freed

    def _has_idle_run(self) -> bool:
        """Whether nothing but the tree holds some block that all tokens see."""
        idle = np.flatnonzero((self._own > 0) & (self.pool.refs == self._own))
        return bool(self.pool.sees_all_tokens[self.pool.group_of[idle]].any())

    def _trim(self, leaf: RadixNode, wanted: int, *, in_use: bool = False) -> int:
        """Evict blocks from the end of a leaf, `in_use` or not; return how many became free."""
        most = -(-wanted // len(leaf.blocks))
        tail = leaf.blocks[0, -most:]
        count = len(tail)
        if self.pool.refs[tail[-1]] > self._own[tail[-1]] and not in_use:
            count = 0
        elif count > 1 and not in_use:
            held = np.flatnonzero(self.pool.refs[tail] > self._own[tail])
            count -= int(held[-1]) + 1 if len(held) else 0
        if not count:
            leaf.used = next(self._clock)  # in use
            return 0
        kept, free = leaf.blocks.shape[1] - count, self.pool.num_free
        dropped = leaf.blocks[:, kept:]
        with Uninterrupted():
            self._let_go(dropped.T.ravel())
            parent, first, blocks, key = leaf.parent, leaf.key[: self._width], leaf.blocks, leaf.key
            assert parent is not None
            # Another node in its place: `extend` must know that this one's end is gone.
            leaf.blocks, leaf.is_queued = blocks[:, :0], False
            if kept:
                if 2 * kept * self._width < len(key):  # seldom: it costs a copy
                    blocks, key = blocks[:, :kept].copy(), key[: kept * self._width]
                rest = RadixNode(key, blocks[:, :kept], parent, leaf.namespace, leaf.resets)
                parent.children[first], rest.used, rest.is_queued = rest, leaf.used, True
                heapq.heapreplace(self._queue, (rest.used, next(self._serial), rest))
            else:
                heapq.heappop(self._queue)
                del parent.children[first]
                parent.used = max(parent.used, leaf.used)
                self._enqueue(parent)
                if parent.parent is None and not parent.children:
                    self._roots.pop(parent.namespace, None)
        freed = self.pool.num_free - free
        self.evicted_blocks += freed
        if self.on_event:
            self.on_event(CacheEvent("removed", leaf.namespace, tuple(dropped[0].tolist())))
        return freed

    def _drop_windows(self, wanted: int, *, inside: bool) -> int:
        """Drop blocks of groups with windows, of least recently used runs first.

        A 64th of the pool at once: it looks at every run. `inside`: only what no prompt needs that
        parts at the end of a run.
        """
        if len(self.pool.windows) == 1 or wanted <= 0:
            return 0
        wanted, free = max(wanted, self.pool.num_blocks // 64), self.pool.num_free
        for node in sorted(self.nodes(), key=lambda node: node.used):
            count = node.blocks.shape[1]
            for group, window in enumerate(self.pool.windows):
                if window is None or not count:
                    continue
                # What the end of the run sees, wherever in the prompt that is.
                first = max(count - -(-(window - 1) // self.block_size), 0) if inside else count
                own = node.blocks[group, :first]
                idle = (own >= 0) & (self.pool.refs[own] == self._own[own])
                if idle.any():
                    with Uninterrupted():
                        node.blocks = node.blocks.copy()
                        node.blocks[group, :first][idle] = -1
                        self._let_go(own[idle])
            if self.pool.num_free - free >= wanted:
                break
        freed = self.pool.num_free - free
        self.evicted_blocks += freed
        return freed


def _forget(roots: dict[Hashable, RadixNode], pool: BlockPool) -> None:
    """Give back all blocks of a tree."""
    for root in roots.values():
        for node in root.below():
            pool.unref(node.blocks.ravel())
    roots.clear()
