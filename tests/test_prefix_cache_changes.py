"""Sequences that go on, resets, events and interrupts of the radix tree."""

import numpy as np
import pytest
from prefixes import cache, tree

from pagedkv import BlockPool, RadixTree


def test_a_sequence_goes_on_from_its_end():
    radix = tree()
    first = cache(radix, [1, 1, 2, 2])
    blocks = radix.pool.allocate(3)
    assert blocks == [2, 3, 4]
    second = radix.extend(first.node, [3, 3, 4, 4, 5], blocks[:2])
    assert second.blocks == [2, 3]
    third = radix.extend(second.node, np.array([5, 5], np.int32), np.array(blocks[2:]))
    assert third.blocks == [4]
    match = radix.match_prefix([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6])
    assert (match.blocks, match.node) == ([0, 1, 2, 3, 4], third.node)
    assert (radix.num_blocks, radix.num_evictable) == (5, 2)
    radix.check_invariants()
    assert radix.extend(third.node.parent, [], []).node is second.node


def test_going_on_where_somebody_else_did_keeps_the_blocks_of_the_tree():
    radix = tree()
    mine = cache(radix, [1, 1])
    cache(radix, [1, 1, 2, 2, 3, 3, 4, 4])
    blocks = radix.pool.allocate(3)
    assert blocks == [1, 5, 6]
    match = radix.extend(mine.node, [2, 2, 3, 3, 9, 9], blocks)
    assert match.blocks == [2, 3, 6]
    assert [radix.pool.reference_count(block) for block in blocks] == [1, 1, 2]
    assert radix.match_prefix([1, 1, 2, 2, 3, 3, 4, 4]).blocks == [0, 2, 3, 4]
    radix.check_invariants()


def test_going_on_from_a_match_of_nothing_is_to_insert():
    radix = tree()
    nothing = radix.match_prefix([1, 1], "alice").node
    also = radix.match_prefix([1, 1], "alice").node
    assert radix.extend(nothing, [1, 1], radix.pool.allocate(1)).blocks == [0]
    match = radix.extend(also, [1, 1, 2, 2], radix.pool.allocate(2))
    assert match.blocks == [0, 2]
    assert (match.num_blocks, radix.num_blocks, radix.num_evictable) == (2, 2, 0)
    radix.check_invariants()


def test_nothing_goes_on_from_what_was_evicted():
    radix = tree()
    match = cache(radix, [1, 1, 2, 2])
    assert radix.evict(2) == 2
    assert radix.extend(match.node, [3, 3], radix.pool.allocate(1)).blocks == []
    assert radix.num_blocks == 0
    radix.check_invariants()


def test_nothing_goes_on_from_a_run_whose_end_was_evicted():
    radix = tree(num_blocks=8)
    cache(radix, [1, 1, 2, 2])
    own = radix.pool.allocate(4)
    match = radix.insert([1, 1, 2, 2, 3, 3, 4, 4], own)
    assert radix.evict(1) == 1  # the end is in use, the blocks before it are not
    assert radix.extend(match.node, [5, 5], radix.pool.allocate(1)).blocks == []
    assert radix.match_prefix([1, 1, 2, 2, 5, 5]).num_blocks < 3
    radix.check_invariants()


def test_a_reset_forgets_all_and_sequences_keep_what_they_hold():
    radix = tree()
    cache(radix, [1, 1, 2, 2, 3, 3])
    cache(radix, [4, 4], "alice")
    match = radix.match_prefix([1, 1, 2, 2])
    radix.pool.retain(match.blocks)
    assert radix.reset() == 2
    radix.check_invariants()
    assert (radix.num_blocks, radix.num_evictable, radix.pool.num_free) == (0, 0, 30)
    assert radix.match_prefix([1, 1, 2, 2]).blocks == []
    assert radix.match_prefix([4, 4], "alice").blocks == []
    # Another run of the same tokens, beside what the sequence holds.
    (block,) = radix.pool.allocate(1)
    assert radix.extend(match.node, [3, 3], [block]).blocks == []
    again = radix.insert([1, 1, 3, 3], [block, *radix.pool.allocate(1)])
    assert radix.match_prefix([1, 1, 2, 2]).blocks == again.blocks[:1] == [block]
    assert radix.evict(9) == 0  # the caller holds both
    radix.pool.release(match.blocks)
    assert radix.pool.num_free == 30
    radix.check_invariants()
    radix.pool.check_invariants()


def test_a_sequence_without_a_match_goes_on_after_a_reset():
    radix = tree()
    nothing = radix.match_prefix([1, 1]).node
    cache(radix, [2, 2])
    assert radix.reset() == 1
    match = radix.extend(nothing, [1, 1], radix.pool.allocate(1))
    assert radix.match_prefix([1, 1]).blocks == match.blocks
    radix.check_invariants()
    assert (radix.evict(1), radix.reset(), radix.reset()) == (0, 0, 0)
    assert radix.pool.reference_count(match.blocks[0]) == 1


def test_events_tell_a_router_what_can_be_matched():
    events = []
    radix = RadixTree(BlockPool(32), 2, on_event=events.append)

    def told():
        """Return what was told since the last time, tokens as a list."""
        found = [
            (kind, whose, blocks, parent, tokens if tokens is None else tokens.tolist())
            for kind, whose, blocks, parent, tokens in events
        ]
        events.clear()
        return found

    cache(radix, [1, 1, 2, 2, 3], "alice")
    assert told() == [("stored", "alice", (0, 1), None, [1, 1, 2, 2])]
    cache(radix, [1, 1, 2, 2], "alice")
    assert told() == []
    cache(radix, [1, 1, 4, 4, 5, 5], "alice")
    cache(radix, [6, 6])
    (stored, other) = told()
    assert stored == ("stored", "alice", (2, 4), 0, [4, 4, 5, 5])
    assert other == ("stored", None, (3,), None, [6, 6])
    assert radix.evict(2) == 2
    assert told() == [
        ("removed", "alice", (1,), None, None),
        ("removed", "alice", (4,), None, None),
    ]
    assert radix.evict(1) == 1
    assert told() == [("removed", "alice", (2,), None, None)]
    assert radix.reset() == 2
    assert told() == [("cleared", None, (), None, None)]
    radix.on_event = None
    cache(radix, [1, 1])
    assert told() == []


def test_a_listener_that_raises_finds_the_change_complete():
    def listen(event):
        radix.check_invariants()
        radix.pool.check_invariants()
        seen.append((event.kind, radix.num_blocks, radix.pool.num_free))
        raise RuntimeError("nobody is there")

    seen = []
    radix = RadixTree(BlockPool(8), 2, listen)
    blocks = radix.pool.allocate(3)
    for call in (
        lambda: radix.insert([1, 1, 2, 2], blocks),
        lambda: radix.insert([3, 3], blocks[2:], "alice"),
        lambda: radix.pool.release(blocks) or radix.evict(1),
        lambda: radix.evict(5),
        lambda: radix.evict(5),
        lambda: radix.reset(),
    ):
        with pytest.raises(RuntimeError, match="nobody is there"):
            call()
        radix.check_invariants()
    assert seen == [
        ("stored", 2, 5),
        ("stored", 3, 5),
        ("removed", 2, 6),
        ("removed", 1, 7),
        ("removed", 0, 8),
        ("cleared", 0, 8),
    ]
