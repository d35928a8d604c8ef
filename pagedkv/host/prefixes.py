"""The sequences' share of the prefix cache, and prefixes being computed. Host only."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from pagedkv.host.block_pool import BlockPool
from pagedkv.host.cache_event import Listener
from pagedkv.host.prefix_cache import RadixTree
from pagedkv.host.radix_node import PrefixMatch, RadixNode
from pagedkv.host.sequence import Sequence

Block = tuple[Hashable, bytes]  # what comes before it, and its tokens


class Prefixes:
    """Puts sequences on cached prefixes, and caches their blocks as they fill them.

    A sequence's first `shared` blocks are the tree's, up to its `node`, which it keeps locked.

    Parameters
    ----------
    pool : BlockPool
        Whose blocks these are.
    block_size : int
        S, tokens in a block.
    on_event : callable or None
        As for `RadixTree`.
    """

    def __init__(self, pool: BlockPool, block_size: int, on_event: Listener | None) -> None:
        self.tree = RadixTree(pool, block_size, on_event)
        # The next block of each prompt that is being computed: others wait until it is cached.
        self._coming: dict[Block | None, Sequence] = {}
        self._of: dict[Sequence, Block] = {}

    def match(self, sequence: Sequence) -> PrefixMatch | None:
        """Return a sequence's cached prefix; None if it does not share."""
        if not sequence.shares:
            return None
        # At least the last token is computed, for what follows it.
        known = np.frombuffer(sequence.tokens, np.int32)[:-1]
        return self.tree.match_prefix(known, sequence.namespace)

    def is_coming(self, sequence: Sequence, match: PrefixMatch | None) -> bool:
        """Whether a running sequence computes the block that follows a sequence's match."""
        if match is None:
            return False
        return self._next_block(sequence, match.node, len(match.blocks)) in self._coming

    def hold(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Note that a sequence's first blocks are those of a match, and lock it."""
        self.tree.lock(match.node)
        sequence.node, sequence.shared = match.node, len(match.blocks)

    def cache(self, sequence: Sequence) -> None:
        """Cache the blocks that a sequence has filled, and hold those that the tree has instead.

        What is in flight is not computed yet, and left out.
        """
        if not sequence.prefilling:  # then `progress` has cached what there is
            self._cache(sequence, len(sequence.tokens) - 1)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a sequence that has nothing hold what another one holds."""
        self.cache(parent)
        child.table = parent.table.fork()
        if parent.node is not None:
            self.tree.lock(parent.node)
        child.node, child.shared = parent.node, parent.shared

    def progress(self, sequence: Sequence, computed: int) -> None:
        """Cache the computed tokens of a prompt, and announce the prefix that comes next."""
        self._cache(sequence, computed)
        sequence.prefilling = computed < len(sequence.tokens)
        self.announce(sequence)

    def announce(self, sequence: Sequence) -> None:
        """Note which block of its prompt a running sequence computes next, if others may share it.

        Others wait only for the first one.
        """
        self._withdraw(sequence)
        if sequence.prefilling and sequence.node is not None:
            block = self._next_block(sequence, sequence.node, sequence.shared)
            if block is not None and block not in self._coming:
                self._coming[block], self._of[sequence] = sequence, block

    def leave(self, sequence: Sequence) -> None:
        """Announce nothing of a sequence any more."""
        sequence.prefilling = False
        self._withdraw(sequence)

    def release(self, sequence: Sequence) -> None:
        """Let a sequence give back what it holds, and wait."""
        if sequence.table.num_tokens:
            sequence.table.truncate(0)
        self.leave(sequence)
        node = sequence.node
        sequence.running, sequence.node, sequence.shared = False, None, 0
        if node is not None:
            self.tree.unlock(node)

    def check_invariants(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless what sequences have in the tree is theirs; for tests."""
        self.tree.check_invariants()
        for sequence in sequences:
            if sequence.node is not None:
                shared = sequence.table.block_ids[: sequence.shared].tolist()
                assert sequence.node.up_to() == shared, "blocks are not the tree's"
        assert {*self._of} == {*self._coming.values()}, "announced, and not to be found"
        for sequence, block in self._of.items():
            assert sequence.prefilling, "a prompt that is computed is announced"
            assert sequence.node is not None, "somebody who does not share is announced"
            assert block == self._next_block(sequence, sequence.node, sequence.shared), "outdated"

    def _cache(self, sequence: Sequence, computed: int) -> None:
        """Cache a sequence's blocks up to `computed` tokens."""
        size, first, node = self.tree.block_size, sequence.shared, sequence.node
        whole = computed // size
        if node is None or whole == first:
            return
        own = sequence.table.block_ids[first:whole]
        new = np.array(sequence.tokens[first * size : whole * size], np.int32)
        added = self.tree.extend(node, new, own)
        if added.blocks:
            if added.blocks != own.tolist():
                sequence.table.share(first, added.blocks)
            self.tree.lock(added.node)
            sequence.node, sequence.shared = added.node, whole
        else:  # the tree was reset
            sequence.node, sequence.shared = None, 0
        self.tree.unlock(node)

    def _withdraw(self, sequence: Sequence) -> None:
        block = self._of.pop(sequence, None)
        if block is not None:
            del self._coming[block]

    def _next_block(self, sequence: Sequence, node: RadixNode, shared: int) -> Block | None:
        """Name a sequence's block after `shared` cached ones, None if its tokens do not fill it."""
        size = self.tree.block_size
        tokens = sequence.tokens[shared * size : (shared + 1) * size]
        if len(tokens) < size:
            return None
        return (node if shared else (sequence.namespace,)), tokens.tobytes()
