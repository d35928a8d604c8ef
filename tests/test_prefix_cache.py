"""The radix tree: literal blocks, order of eviction, namespaces, what is refused."""

import tracemalloc
from array import array

import numpy as np
import pytest
from prefixes import cache, tree

from pagedkv import BlockPool, BlockTable, OutOfBlocksError, RadixTree


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
        tables.append(table)
    assert pool.num_blocks - pool.num_free == 256
    assert {pool.reference_count(block) for block in range(256)} == {10}
    rows = np.array([table.row for table in tables])
    assert pool.extend(rows, np.full(8, 3)) == []
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
    copies = pool.extend(np.array([table.row for table in tables]), np.ones(8, int))
    assert copies == [(3, block) for block in range(4, 12)]
    pool.release([3] * 8)
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


def test_what_a_sequence_holds_stays():
    radix = tree()
    cache(radix, [1, 2, 3, 4, 5, 6])
    cache(radix, [1, 2, 9, 9])
    held = radix.match_prefix([1, 2, 3, 4]).blocks
    radix.pool.retain(held)
    assert radix.match_prefix([1, 2]).blocks == [0]  # splits
    assert radix.num_evictable == 2
    assert radix.evict(10) == 2  # [5, 6] and [9, 9]
    assert radix.match_prefix([1, 2, 3, 4, 5, 6]).blocks == held == [0, 1]
    assert (radix.num_evictable, radix.evict(10)) == (0, 0)
    radix.pool.release(held)
    assert (radix.num_evictable, radix.evict(10)) == (2, 2)
    radix.check_invariants()


def test_ends_that_hold_other_blocks_for_what_is_before_them_do_not_stop_eviction():
    """A sequence that computed a prefix again, and holds of the tree what follows it alone."""
    radix = tree(num_blocks=8)
    cache(radix, [1, 1, 2, 2])
    own = radix.pool.allocate(3)
    radix.insert([1, 1, 2, 2, 3, 3], own)
    assert radix.num_evictable == 2
    assert radix.evict(1) == 1
    assert radix.num_evictable == 1
    radix.check_invariants()
    assert [radix.pool.reference_count(block) for block in own] == [1, 1, 1]


def test_what_is_cached_in_two_namespaces_is_evicted_from_both():
    radix = tree(num_blocks=4)
    blocks = radix.pool.allocate(3)
    for namespace in "ab":
        radix.insert([1, 1, 2, 2, 3, 3], blocks, namespace)
    assert radix.num_evictable == 0
    radix.pool.release(blocks)
    assert (radix.num_evictable, radix.num_blocks) == (3, 6)
    assert len(radix.pool.allocate(4)) == 4
    radix.check_invariants()
    radix.pool.check_invariants()


def test_blocks_are_evicted_when_they_run_out():
    radix = tree(num_blocks=4)
    cache(radix, [1, 1, 2, 2, 3, 3])
    assert len(radix.pool.allocate(3)) == 3
    assert (radix.num_blocks, radix.evicted_blocks) == (1, 2)
    with pytest.raises(OutOfBlocksError):
        radix.pool.allocate(2)
    radix.check_invariants()


def test_inside_of_a_run_what_left_a_window_goes_first():
    pool = BlockPool(40, (None, 6))
    radix, tokens = RadixTree(pool, 2), list(range(20))
    table = BlockTable(pool, 2)
    table.append(20)
    radix.insert(tokens, table.blocks)
    table.free()
    assert radix.match_prefix([*tokens[:10], 99, 99]).num_blocks == 5  # parts here
    assert radix.num_evictable == 20
    assert radix.evict(1) >= 1
    assert radix.evict(2) == 2
    assert radix.match_prefix(tokens).num_blocks == 10
    assert radix.match_prefix([*tokens[:10], 99, 99]).num_blocks == 5
    assert radix.match_prefix([*tokens[:14], 99, 99]).num_blocks == 5  # its window is gone
    radix.check_invariants()
    again = BlockTable(pool, 2)
    again.append(20)
    radix.insert(tokens, again.blocks)
    again.free()
    assert radix.match_prefix([*tokens[:14], 99, 99]).num_blocks == 7  # and computed again
    radix.check_invariants()
    pool.check_invariants()
    radix.evict(40)
    assert (radix.num_blocks, pool.num_free) == (0, 40)


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
        ([1, 2, 3, 4], [0, 5], "block 5 has 0"),
        ([1, 2, 3, 4], [0, 99], "got 99"),
        ([1, 2, 3, 4], [0, -1], "got -1"),
        ([1, 2, 3, 4], array("q", [0, 2**40]), "got 1099511627776"),
        ([1, 2, 3, 4], [0, 1.0], "got float64"),
        ([1, 2, 3, 4], [0, 2**70], "got object"),
        ([1, 2, 3, 4], np.zeros((2, 1), np.int32), "got int32 of shape"),
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
    with pytest.raises(ValueError, match="expected num_blocks to be an integer"):
        radix.evict(count)
    assert radix.evict(-1) == 0
    assert radix.evict(np.uint8(0)) == 0
    assert radix.num_blocks == 2
    assert radix.evict(np.uint8(1)) == 1
    radix.check_invariants()


@pytest.mark.parametrize("block_size", [0, -1, 2**31, 2.0, None])
def test_block_size_refused(block_size):
    with pytest.raises(ValueError, match="expected block_size"):
        RadixTree(BlockPool(1), block_size)
