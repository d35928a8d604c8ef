"""The radix tree: literal blocks, order of eviction, namespaces, and a machine against a dict."""

import tracemalloc
from array import array
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from interrupts import interrupted

from pagedkv import BlockPool, BlockTable, PrefixMatch, RadixTree, reserve


def tree(num_blocks=32, block_size=2):
    return RadixTree(BlockPool(num_blocks), block_size)


def cache(radix, tokens, namespace=None):
    """Insert tokens in new blocks that only the tree holds; return the match.

    Blocks for what was cached already are taken too, and are free again afterwards.
    """
    blocks = radix.pool.allocate(len(tokens) // radix.block_size)
    match = radix.insert(tokens, blocks, namespace)
    radix.pool.release(blocks)
    return match


def test_match_is_the_longest_prefix_in_whole_blocks():
    radix = tree()
    assert cache(radix, [1, 2, 3, 4, 5, 6, 7]).blocks == [0, 1, 2]
    for tokens, blocks in [
        ([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2]),
        ([1, 2, 3, 4, 5, 6], [0, 1, 2]),
        ([1, 2, 3, 4, 5], [0, 1]),
        ([1, 2, 3, 9], [0]),
        ([1, 2], [0]),
        ([1], []),
        ([], []),
        ([2, 1], []),
        ([3, 4], []),
    ]:
        assert radix.match_prefix(tokens).blocks == blocks
        radix.check_invariants()


def test_what_is_cached_keeps_its_blocks():
    radix = tree()
    cache(radix, [1, 2, 3, 4])
    blocks = radix.pool.allocate(3)
    assert blocks == [2, 3, 4]
    assert radix.insert([1, 2, 3, 4, 5, 6], blocks).blocks == [0, 1, 4]
    assert [radix.pool.reference_count(block) for block in range(5)] == [1, 1, 1, 1, 2]
    radix.pool.release(blocks)
    assert radix.pool.num_free == 32 - 3
    # Going another way after a common block:
    assert cache(radix, [1, 2, 8, 8]).blocks == [0, 2]
    assert radix.match_prefix([1, 2, 3, 4, 5, 6]).blocks == [0, 1, 4]
    assert radix.num_blocks == 4
    radix.check_invariants()


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: np.array(x, np.uint16)])
def test_tokens_of_any_kind_are_the_same(kind):
    radix = tree()
    cache(radix, [1, 2, 3, 4])
    assert radix.match_prefix(kind([1, 2, 3, 4])).blocks == [0, 1]


def test_tokens_that_share_bytes_or_hashes_are_told_apart():
    radix = tree(block_size=1)
    cache(radix, [256, 1])
    for tokens in ([1], [65536, 256], [-1], [0, 1, 256], [2**31 - 1]):
        assert radix.match_prefix(tokens).blocks == []
    assert hash(-1) == hash(-2)
    assert cache(radix, [-1]).blocks == [2]
    assert radix.match_prefix([-2]).blocks == []


def test_eight_requests_with_one_prefix_hold_one_copy():
    """Together: 8 prompts of the same 4096 tokens and 3 of their own, blocks of 16."""
    pool = BlockPool(400)
    radix = RadixTree(pool, 16)
    prefix = list(range(4096))
    first = BlockTable(pool, 16)
    first.append(4096)
    radix.insert(prefix, first.block_ids)
    tables = []
    for request in range(8):
        match = radix.match_prefix([*prefix, 9000 + request, 1, 2])
        table = BlockTable(pool, 16)
        table.adopt(match.blocks, 4096)
        radix.lock(match.node)
        tables.append(table)
    assert pool.num_blocks - pool.num_free == 256
    assert {pool.reference_count(block) for block in range(256)} == {10}
    with reserve(tables, [3] * 8) as step:
        assert step.copies == []
    assert pool.num_blocks - pool.num_free == 256 + 8


def test_a_wholly_cached_prompt_forks_the_block_of_its_last_token():
    """The last token is computed again for its logits: its block is shared, so it is copied."""
    pool = BlockPool(40)
    radix = RadixTree(pool, 4)
    prompt = list(range(16))
    cache(radix, prompt)
    tables = []
    for _ in range(8):
        table = BlockTable(pool, 4)
        table.adopt(radix.match_prefix(prompt).blocks, 15)
        tables.append(table)
    with reserve(tables, [1] * 8) as step:
        assert step.copies == [(3, block) for block in range(4, 12)]
    assert [pool.reference_count(block) for block in range(5)] == [9, 9, 9, 1, 1]


def test_the_least_recently_used_leaf_goes_first():
    radix = tree()
    cache(radix, [1, 2, 3, 4])
    cache(radix, [1, 2, 5, 6])
    cache(radix, [7, 8, 9, 9])
    radix.match_prefix([1, 2, 3, 4])
    assert radix.evict(1) == 1
    assert radix.match_prefix([1, 2, 5, 6]).blocks == [0]
    assert radix.evict(1) == 1  # the end of the oldest run first
    assert radix.match_prefix([7, 8, 9, 9]).blocks == [2]
    radix.match_prefix([1, 2])
    # [3, 4] below [1, 2] was used before [7, 8], and [1, 2] itself last.
    assert radix.evict(1) == 1
    assert radix.match_prefix([1, 2, 3, 4]).blocks == [0]
    assert radix.match_prefix([7, 8]).blocks == [2]
    radix.check_invariants()
    assert radix.evict(5) == 2
    assert (radix.num_blocks, radix.pool.num_free) == (0, 32)
    radix.check_invariants()


def test_what_was_used_at_once_goes_from_its_end():
    radix = tree()
    cache(radix, [1, 1, 2, 2])
    cache(radix, [1, 1, 2, 2, 3, 3, 4, 4])
    cache(radix, [5, 5])
    match = radix.match_prefix([1, 1, 2, 2, 3, 3])
    assert match.blocks == [0, 1, 4]
    gone = []
    while radix.num_blocks:
        held = {block for block in range(32) if radix.pool.reference_count(block)}
        assert radix.evict(1) == 1
        gone += held - {block for block in range(32) if radix.pool.reference_count(block)}
    # [4, 4], [5, 5], and what the look-up used: its last block first, although it is three runs.
    assert gone == [5, 3, 4, 1, 0]


def test_an_inner_run_is_kept_until_its_children_are_gone():
    radix = tree()
    cache(radix, [1, 1, 2, 2])
    cache(radix, [1, 1, 3, 3])
    freed = []
    for _ in range(3):
        before = {b for b in range(32) if radix.pool.reference_count(b)}
        assert radix.evict(1) == 1
        freed += before - {b for b in range(32) if radix.pool.reference_count(b)}
    assert freed == [1, 3, 0]


def test_a_locked_path_stays():
    radix = tree()
    cache(radix, [1, 2, 3, 4, 5, 6])
    cache(radix, [1, 2, 9, 9])
    match = radix.match_prefix([1, 2, 3, 4])
    radix.lock(match.node)
    radix.lock(match.node)
    assert radix.num_evictable == 2
    assert radix.evict(10) == 2  # [5, 6] and [9, 9]
    assert radix.match_prefix([1, 2, 3, 4, 5, 6]).blocks == [0, 1]
    radix.unlock(match.node)
    assert radix.evict(10) == 0
    radix.unlock(match.node)
    assert radix.num_evictable == 2
    assert radix.evict(10) == 2
    with pytest.raises(ValueError, match="expected a locked node"):
        radix.unlock(match.node)


def test_a_lock_outlives_a_split():
    radix = tree()
    match = cache(radix, [1, 2, 3, 4])
    radix.lock(match.node)
    assert radix.match_prefix([1, 2]).blocks == [0]  # splits
    radix.check_invariants()
    assert (radix.num_evictable, radix.evict(2)) == (0, 0)
    radix.unlock(match.node)
    radix.check_invariants()
    assert (radix.num_evictable, radix.evict(2)) == (2, 2)


def test_a_lock_moves_down_and_up_a_path():
    radix = tree()
    ends = [cache(radix, [1, 1, 2, 2, 3, 3][:end]).node for end in (2, 4, 6)]
    radix.lock(ends[0])
    for old, new, evictable in [(0, 2, 0), (2, 1, 1), (1, 2, 0), (2, 0, 2)]:
        radix.lock(ends[new])
        radix.unlock(ends[old])
        radix.check_invariants()
        assert radix.num_evictable == evictable
    radix.lock(ends[2])
    radix.unlock(ends[0])
    assert (radix.num_evictable, radix.evict(9)) == (0, 0)
    radix.unlock(ends[2])
    assert (radix.num_evictable, radix.evict(9)) == (3, 3)


def test_blocks_that_a_sequence_holds_are_not_counted_as_freed():
    radix = tree()
    match = cache(radix, [1, 2, 3, 4])
    radix.pool.retain(match.blocks)
    cache(radix, [5, 6])
    assert radix.evict(1) == 1
    assert (radix.num_blocks, radix.pool.num_free) == (0, 30)


def test_nothing_is_read_across_namespaces():
    radix = tree()
    secret = [1, 2, 3, 4]
    cache(radix, secret, "alice")
    for namespace in (None, "bob", "", 0, ("alice",)):
        assert radix.match_prefix(secret, namespace).blocks == []
    theirs = cache(radix, secret, "bob")
    mine = radix.match_prefix(secret, "alice")
    assert not set(theirs.blocks) & set(mine.blocks)
    assert radix.insert(secret, radix.pool.allocate(2), "alice").blocks == mine.blocks
    # Looking does not leave anything behind either.
    radix.match_prefix(secret, "carol")
    assert radix.evict(4) == 4
    radix.check_invariants()


def test_a_namespace_is_counted_and_evicted_by_itself():
    radix = tree()
    cache(radix, [1, 1, 2, 2], "alice")
    cache(radix, [1, 1, 3, 3], "bob")
    cache(radix, [1, 1, 4, 4, 5, 5], "alice")
    cache(radix, [6, 6])
    counts = {name: radix.num_blocks_of(name) for name in ("alice", "bob", None, "carol")}
    assert counts == {"alice": 4, "bob": 2, None: 1, "carol": 0}
    assert radix.evict_from("carol", 9) == 0
    radix.lock(radix.match_prefix([1, 1, 2, 2], "alice").node)
    assert radix.evict_from("alice", 1) == 1
    radix.check_invariants()
    assert radix.match_prefix([1, 1, 4, 4, 5, 5], "alice").blocks == [0, 5]
    assert radix.evict_from("alice", 9) == 1
    assert radix.match_prefix([1, 1, 2, 2], "alice").blocks == [0, 1]
    assert radix.evict_from(None, 9) == 1
    # The others' order is as it was, and they are evicted after that.
    assert (radix.num_blocks_of("bob"), radix.evict(9)) == (2, 2)
    assert (radix.num_blocks, radix.num_blocks_of("alice")) == (2, 2)
    radix.check_invariants()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1.5, 2.0], "tokens to be integers in one dimension, got float64"),
        ([[1, 2], [3, 4]], "tokens to be integers in one dimension"),
        (["a", "b"], "tokens to be integers in one dimension"),
        ([1, 2**31], "token ids to fit in 32 bits"),
        ([True, False], "tokens to be integers in one dimension"),
    ],
)
def test_tokens_refused(tokens, message):
    radix = tree()
    for call in (radix.match_prefix, lambda t: radix.insert(t, [0, 1])):
        with pytest.raises(ValueError, match=message):
            call(tokens)
    assert radix.num_blocks == 0


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda b: np.array(b, np.int32), lambda b: array("i", b)]
)
def test_blocks_of_any_kind_are_the_same(kind):
    radix = tree()
    blocks = radix.pool.allocate(3)
    match = radix.insert([1, 2, 3, 4, 5, 6], kind(blocks))
    assert match.blocks == [0, 1, 2]
    assert {type(block) for block in match.blocks} == {int}
    assert [radix.pool.reference_count(block) for block in range(4)] == [2, 2, 2, 0]


@pytest.mark.parametrize(
    ("tokens", "blocks", "message"),
    [
        ([1, 2, 3, 4], [0], "at least 2 blocks, got 1"),
        ([1, 2, 3, 4], [0, 5], "block 5 to have at least 1 holders, got 0"),
        ([1, 2, 3, 4], [0, 99], "got 99"),
        ([1, 2, 3, 4], [0, -1], "got -1"),
        ([1, 2, 3, 4], array("q", [0, 2**40]), "got 1099511627776"),
        ([1, 2, 3, 4], [0, 1.0], "blocks to hold integers, got float64"),
        ([1, 2, 3, 4], [0, 2**70], "got 1180591620717411303424"),
        ([1, 2, 3, 4], np.zeros((2, 1), np.int32), "blocks to be one-dimensional"),
        ([1, 2, 3, 2**31], [0, 1], "token ids to fit in 32 bits"),
        ([1, 2, 3, 4.5], [0, 1], "tokens to be integers"),
    ],
)
def test_insert_refuses_and_caches_nothing(tokens, blocks, message):
    radix = tree()
    assert radix.pool.allocate(2) == [0, 1]
    for namespace in (None, "alice"):
        with pytest.raises(ValueError, match=message):
            radix.insert(tokens, blocks, namespace)
        assert [radix.pool.reference_count(block) for block in range(32)] == [1, 1] + [0] * 30
        assert (radix.num_blocks, radix.match_prefix([1, 2], namespace).blocks) == (0, [])
        radix.check_invariants()


def test_a_run_evicted_in_part_is_matched_as_far_as_it_is_left():
    radix = tree()
    cache(radix, [1, 1, 2, 2, 3, 3, 4, 4])
    assert radix.evict(1) == 1
    for tokens, blocks in [
        ([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [0, 1, 2]),
        ([1, 1, 2, 2, 3, 3, 9, 9], [0, 1, 2]),
        ([1, 1, 2, 2, 9, 9], [0, 1]),
    ]:
        assert radix.match_prefix(tokens).blocks == blocks
        radix.check_invariants()
    assert cache(radix, [1, 1, 2, 2, 3, 3, 4, 4]).blocks == [0, 1, 2, 6]
    assert radix.evict(3) == 3
    assert radix.match_prefix([1, 1, 2, 2, 3, 3, 4, 4]).blocks == [0]


def test_a_sequence_goes_on_from_its_end():
    radix = tree()
    first = cache(radix, [1, 1, 2, 2])
    radix.lock(first.node)
    blocks = radix.pool.allocate(3)
    assert blocks == [2, 3, 4]
    second = radix.extend(first.node, [3, 3, 4, 4, 5], blocks[:2])
    assert second.blocks == [2, 3]
    radix.lock(second.node)
    radix.unlock(first.node)
    third = radix.extend(second.node, np.array([5, 5], np.int32), np.array(blocks[2:]))
    assert third.blocks == [4]
    assert radix.match_prefix([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]) == ([0, 1, 2, 3, 4], third.node)
    assert (radix.num_blocks, radix.num_evictable) == (5, 1)
    radix.check_invariants()
    assert radix.extend(third.node.parent, [], []) == ([], second.node)


def test_going_on_where_somebody_else_did_keeps_the_blocks_of_the_tree():
    radix = tree()
    mine = cache(radix, [1, 1])
    radix.lock(mine.node)
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
    radix.lock(also)
    match = radix.extend(also, [1, 1, 2, 2], radix.pool.allocate(2))
    assert match.blocks == [0, 2]
    radix.lock(match.node)
    radix.unlock(also)
    assert (radix.num_blocks_of("alice"), radix.num_evictable) == (2, 0)
    radix.check_invariants()


def test_going_on_is_refused_from_what_may_be_evicted():
    radix = tree()
    match = cache(radix, [1, 1, 2, 2])
    (block,) = radix.pool.allocate(1)
    for blocks in (1, 1):
        with pytest.raises(ValueError, match="expected a locked node"):
            radix.extend(match.node, [3, 3], [block])
        assert radix.evict(blocks) == blocks
    radix.check_invariants()
    assert radix.pool.reference_count(block) == 1


def test_what_a_sequence_went_on_from_was_used_as_lately():
    radix = tree()
    match = cache(radix, [1, 1])
    radix.lock(match.node)
    cache(radix, [2, 2])
    end = radix.extend(match.node, [3, 3], radix.pool.allocate(1)).node
    cache(radix, [4, 4])
    radix.lock(end)
    radix.unlock(match.node)
    radix.unlock(end)
    radix.check_invariants()
    assert radix.evict(1) == 1
    assert radix.match_prefix([2, 2]).blocks == []


def test_what_is_evicted_takes_no_memory():
    radix = tree(num_blocks=2**14)
    blocks = radix.pool.allocate(2**14)
    tracemalloc.start()
    radix.insert(np.arange(2**15), blocks)
    files = [tracemalloc.Filter(True, f"*{name}.py") for name in ("prefix_cache", "radix_node")]

    def held():
        stats = tracemalloc.take_snapshot().filter_traces(files).statistics("filename")
        return sum(stat.size for stat in stats)

    assert held() > 2**17  # 4 bytes a token, and the block ids
    radix.pool.release(blocks)
    for _ in range(2**14 - 1):
        radix.evict(1)
    assert radix.num_blocks == 1
    assert held() < 2**12
    tracemalloc.stop()


@pytest.mark.parametrize("count", [2.5, 1.0, np.float32(1)])
def test_only_whole_blocks_are_evicted(count):
    radix = tree()
    cache(radix, [1, 1, 2, 2])
    for evict in (radix.evict, lambda count: radix.evict_from(None, count)):
        with pytest.raises(ValueError, match="expected num_blocks to be an integer"):
            evict(count)
        assert evict(-1) == 0
        assert evict(np.uint8(0)) == 0
    assert radix.num_blocks == 2
    assert radix.evict(np.uint8(1)) == 1
    radix.check_invariants()


def test_a_reset_forgets_what_is_not_locked_and_matches_nothing_of_the_rest():
    radix = tree()
    cache(radix, [1, 1, 2, 2, 3, 3])
    cache(radix, [4, 4], "alice")
    match = radix.match_prefix([1, 1, 2, 2])
    radix.lock(match.node)
    radix.lock(match.node)
    radix.pool.retain(match.blocks)
    assert radix.reset() == 2
    radix.check_invariants()
    assert (radix.num_blocks, radix.num_evictable, radix.pool.num_free) == (0, 0, 30)
    assert radix.match_prefix([1, 1, 2, 2]).blocks == []
    assert radix.match_prefix([4, 4], "alice").blocks == []
    # Another run of the same tokens, beside what the sequence holds.
    (block,) = radix.pool.allocate(1)
    assert radix.extend(match.node, [3, 3], [block]) == ([], match.node)
    again = radix.insert([1, 1, 3, 3], [block, *radix.pool.allocate(1)])
    assert radix.match_prefix([1, 1, 2, 2]).blocks == again.blocks[:1] == [block]
    assert radix.evict(9) == 0  # the caller holds both
    assert radix.num_blocks == 0
    radix.unlock(match.node)
    assert [radix.pool.reference_count(b) for b in match.blocks] == [2, 2]
    radix.unlock(match.node)
    assert [radix.pool.reference_count(b) for b in match.blocks] == [1, 1]
    radix.pool.release(match.blocks)
    with pytest.raises(ValueError, match="expected a locked node"):
        radix.unlock(match.node)
    radix.lock(match.node)  # a match that has gone keeps nothing
    radix.unlock(match.node)
    assert radix.pool.num_free == 30
    radix.check_invariants()
    radix.pool.check_invariants()


def test_a_sequence_without_a_match_goes_on_after_a_reset():
    radix = tree()
    nothing = radix.match_prefix([1, 1]).node
    radix.lock(nothing)
    cache(radix, [2, 2])
    assert radix.reset() == 1
    match = radix.extend(nothing, [1, 1], radix.pool.allocate(1))
    radix.lock(match.node)
    radix.unlock(nothing)
    assert radix.match_prefix([1, 1]).blocks == match.blocks
    radix.check_invariants()
    assert (radix.evict(1), radix.reset(), radix.reset()) == (0, 0, 0)
    radix.unlock(match.node)
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
    radix.lock(radix.match_prefix([1, 1], "alice").node)  # splits
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
    assert radix.evict_from(None, 1) == 1
    assert told() == [("removed", None, (3,), None, None)]
    assert radix.reset() == 1
    assert told() == [("removed", "alice", (2,), None, None), ("cleared", None, (), None, None)]
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
        lambda: radix.evict_from("alice", 5),
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


def busy():
    """Return a tree of 7 blocks, the first 2 of them locked, a match's end, and 2 blocks more."""
    radix = tree(num_blocks=12)
    cache(radix, [1, 1, 2, 2, 3, 3, 4, 4])
    cache(radix, [1, 1, 2, 2, 5, 5])
    cache(radix, [6, 6, 7, 7], "alice")
    end = radix.match_prefix([1, 1, 2, 2]).node
    radix.lock(end)
    return radix, end, radix.pool.allocate(2)


@pytest.mark.parametrize(
    ("operation", "blocks"),
    [
        (lambda radix, end, new: radix.match_prefix([1, 1, 2, 2, 3, 3]), {7}),
        (lambda radix, end, new: radix.insert([8, 8, 9, 9], new), {7, 9}),
        (lambda radix, end, new: radix.insert([8, 8], new, "bob"), {7, 8}),
        (lambda radix, end, new: radix.insert([6, 6, 8, 8], new, "alice"), {7, 8}),
        (lambda radix, end, new: radix.extend(end, [8, 8, 9, 9], new), {7, 9}),
        (lambda radix, end, new: radix.evict(4), {7, 5, 4, 3}),
        (lambda radix, end, new: radix.evict_from("alice", 2), {7, 5}),
        (lambda radix, end, new: radix.lock(radix.match_prefix([6, 6], "alice").node), {7}),
        (lambda radix, end, new: radix.unlock(end), {7}),
    ],
)
def test_an_interrupt_between_two_lines_loses_no_block(operation, blocks):
    seen = set()
    for (radix, _, new), _ in interrupted(busy, lambda state: operation(*state)):
        radix.check_invariants()
        radix.pool.check_invariants()
        seen.add(radix.num_blocks)
        radix.pool.release(new)
        assert radix.pool.num_free == 12 - radix.num_blocks
        # What an interrupt of lock and unlock leaves locked is not lost, and all else is evicted.
        evictable = radix.num_evictable
        assert radix.evict(12) == evictable
        radix.check_invariants()
        assert radix.pool.num_free == 12 - radix.num_blocks
    assert seen == blocks


def test_an_interrupted_reset_loses_no_block():
    def reset(state):
        state[0].reset()
        state[0].unlock(state[1])

    for (radix, end, new), done in interrupted(busy, reset):
        radix.check_invariants()
        assert not done or radix.num_blocks == 0
        with suppress(ValueError):  # unlocked already
            radix.unlock(end)
        radix.evict(12)
        radix.pool.release(new)
        assert radix.pool.num_free == 12


@pytest.mark.parametrize("block_size", [0, -1, 2**31, 2.0, None])
def test_block_size_refused(block_size):
    with pytest.raises(ValueError, match="expected block_size"):
        RadixTree(BlockPool(1), block_size)


class TreeMachine(RuleBasedStateMachine):
    """Against a dict of cached prefixes, with sequences that hold and lock what they matched."""

    TOKENS = st.lists(st.integers(0, 1), max_size=8)
    NAMESPACES = st.sampled_from([None, "a"])

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12)
        self.radix = RadixTree(self.pool, 2, self.listen)
        self.mirror = {}  # what a router knows: block -> (namespace, its block before, tokens)
        self.known = {}  # (namespace, tokens of whole blocks) -> last block
        self.held = []  # (match, tokens, namespace)
        self.old = []  # matches from before a reset that are still held

    def listen(self, event):
        if event.kind == "cleared":
            self.mirror = {}
        elif event.kind == "removed":
            for block in reversed(event.blocks):
                del self.mirror[block]
                assert block not in [parent for _, parent, _ in self.mirror.values()]
        else:
            before = event.parent
            for block, tokens in zip(event.blocks, event.tokens.reshape(-1, 2), strict=True):
                assert before is None or before in self.mirror
                self.mirror[block] = (event.namespace, before, tuple(tokens))
                before = block

    def prefixes(self, tokens):
        return [tuple(tokens[:end]) for end in range(2, len(tokens) + 1, 2)]

    def expected(self, tokens, namespace):
        blocks = []
        for prefix in self.prefixes(tokens):
            if (namespace, prefix) not in self.known:
                break
            blocks.append(self.known[namespace, prefix])
        return blocks

    def forget(self):
        """Drop from the model what was evicted; a prefix never goes before what goes on from it."""
        gone = set()
        for namespace, prefix in self.known:
            if self.expected(prefix, namespace) != self.radix_blocks(prefix, namespace):
                gone.add((namespace, prefix))
        for namespace, prefix in gone:
            del self.known[namespace, prefix]
        return len(gone)

    def radix_blocks(self, prefix, namespace):
        return self.radix.match_prefix(prefix, namespace).blocks

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def insert(self, tokens, namespace):
        cached = self.expected(tokens, namespace)
        prefixes = self.prefixes(tokens)
        missing = len(prefixes) - len(cached)
        if missing > self.pool.num_free:
            return
        new = self.pool.allocate(missing)
        match = self.radix.insert(tokens, cached + new, namespace)
        assert match.blocks == cached + new
        self.pool.release(new)
        for prefix, block in zip(prefixes[len(cached) :], new, strict=True):
            self.known[namespace, prefix] = block

    @rule(tokens=TOKENS, namespace=NAMESPACES, hold=st.booleans())
    def match(self, tokens, namespace, hold):
        match = self.radix.match_prefix(tokens, namespace)
        assert match.blocks == self.expected(tokens, namespace)
        if hold:
            self.radix.lock(match.node)
            self.pool.retain(match.blocks)
            self.held.append((match, tokens, namespace))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=TOKENS)
    def go_on(self, data, more):
        """A sequence caches what follows its match, and locks that in its place."""
        index = data.draw(st.integers(0, len(self.held) - 1))
        match, tokens, namespace = self.held[index]
        before = [*tokens[: 2 * len(match.blocks)]]
        after = self.expected(before + more, namespace)[len(match.blocks) :]
        missing = len(more) // 2 - len(after)
        if missing > self.pool.num_free:
            return
        new = self.pool.allocate(missing)
        end = self.radix.extend(match.node, more, after + new)
        assert end.blocks == after + new
        self.radix.lock(end.node)
        self.radix.unlock(match.node)
        self.pool.retain(after)  # what is new is kept as it is
        tokens, match = before + more, PrefixMatch(match.blocks + end.blocks, end.node)
        new_prefixes = self.prefixes(tokens)[len(match.blocks) - missing :]
        for prefix, block in zip(new_prefixes, new, strict=True):
            self.known[namespace, prefix] = block
        self.held[index] = (match, tokens, namespace)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data):
        match, _, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.radix.unlock(match.node)
        self.pool.release(match.blocks)

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def let_go_of_what_is_forgotten(self, data):
        match = self.old.pop(data.draw(st.integers(0, len(self.old) - 1)))
        if match.blocks:
            assert self.radix.extend(match.node, [0, 0], match.blocks) == ([], match.node)
        self.radix.unlock(match.node)
        self.pool.release(match.blocks)

    @rule()
    def reset(self):
        evictable, free = self.radix.num_evictable, self.pool.num_free
        assert self.radix.reset() == evictable == self.pool.num_free - free
        self.known = {}
        self.old += [match for match, _, _ in self.held]
        self.held = []

    @rule(count=st.integers(0, 12))
    def evict(self, count):
        evictable, free = self.radix.num_evictable, self.pool.num_free
        freed = self.radix.evict(count)
        assert freed == min(count, evictable) == self.pool.num_free - free
        assert self.forget() == freed

    @rule(count=st.integers(0, 12), namespace=NAMESPACES)
    def evict_from(self, count, namespace):
        before = {key for key in self.known if key[0] != namespace}
        theirs, free = self.radix.num_blocks_of(namespace), self.pool.num_free
        freed = self.radix.evict_from(namespace, count)
        assert freed == self.pool.num_free - free <= count
        assert self.forget() >= freed
        assert before <= self.known.keys()
        assert self.radix.num_blocks_of(namespace) == theirs - freed

    @invariant()
    def agrees(self):
        self.radix.check_invariants()
        self.pool.check_invariants()
        assert self.radix.num_blocks == len(self.known)
        locked = {block for match, _, _ in self.held for block in match.blocks}
        assert self.radix.num_evictable == len(self.known) - len(locked)
        assert self.mirror == {
            block: (namespace, self.known.get((namespace, prefix[:-2])), prefix[-2:])
            for (namespace, prefix), block in self.known.items()
        }
        held = [0] * 12
        for block in self.known.values():
            held[block] += 1
        for match, tokens, namespace in self.held:
            assert self.expected(tokens, namespace)[: len(match.blocks)] == match.blocks
            for block in match.blocks:
                held[block] += 1
        for block in (block for match in self.old for block in match.blocks):
            held[block] += 1
        for block in {block for match in self.old for block in match.blocks}:
            held[block] += 1  # the tree's, until nobody has it locked
        assert held == [self.pool.reference_count(block) for block in range(12)]


TreeMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestTree = TreeMachine.TestCase
