from array import array

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedkv import (
    BlockPool,
    BlockTable,
    OutOfBlocksError,
    RadixTree,
    SharedBlockError,
    blocks_needed,
)


def extend(tables, counts):
    """Append tokens to tables; return the copies, whose sources are given back."""
    pool, rows = tables[0].pool, np.array([table.row for table in tables])
    copies = pool.extend(rows, np.array(counts))
    pool.release([source for source, _ in copies])
    return copies


@pytest.mark.parametrize(
    ("tokens", "block_size", "blocks"),
    [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (5, 1, 5)],
)
def test_blocks_needed(tokens, block_size, blocks):
    assert blocks_needed(tokens, block_size) == blocks
    assert blocks_needed(np.uint8(tokens), np.uint8(block_size)) == blocks


@pytest.mark.parametrize(
    ("tokens", "block_size"), [(-1, 16), (1, 0), (1, -4), (2.5, 2), (float("nan"), 4), (3, 2.0)]
)
def test_blocks_needed_refuses(tokens, block_size):
    with pytest.raises(ValueError, match="expected"):
        blocks_needed(tokens, block_size)


def test_a_table_takes_blocks_as_it_grows():
    pool = BlockPool(8)
    pool.allocate(2)
    table = BlockTable(pool, 4)
    assert table.append(3).tolist() == [8, 9, 10]
    assert table.append().tolist() == [11]
    assert table.append(5).tolist() == [12, 13, 14, 15, 16]
    assert table.append(0).tolist() == []
    assert (table.num_tokens, table.block_ids.tolist()) == (9, [2, 3, 4])
    assert table.slots(2, 5).tolist() == [10, 11, 12]
    assert table.slots(9).tolist() == []
    assert pool.num_free == 3


def test_a_fork_holds_the_same_blocks():
    pool = BlockPool(8)
    table = BlockTable(pool, 4)
    table.append(8)
    forks = [table.fork() for _ in range(3)]
    assert [fork.block_ids.tolist() for fork in forks] == [[0, 1]] * 3
    assert [pool.reference_count(block) for block in (0, 1)] == [4, 4]
    assert pool.num_free == 6
    # Full blocks are never written again: each goes on in a block of its own.
    assert [fork.append().tolist() for fork in forks] == [[8], [12], [16]]
    table.truncate(0)
    assert [pool.reference_count(block) for block in range(5)] == [3, 3, 1, 1, 1]
    for fork in forks:
        fork.truncate(0)
    assert pool.num_free == 8


def test_adopted_blocks_are_shared_and_the_last_may_be_partly_used():
    pool = BlockPool(8)
    cached = pool.allocate(3)
    table = BlockTable(pool, 4)
    table.adopt(cached, 10)
    assert (table.num_tokens, table.slots(8).tolist()) == (10, [8, 9])
    assert [pool.reference_count(block) for block in cached] == [2, 2, 2]
    table.truncate(0)
    assert [pool.reference_count(block) for block in cached] == [1, 1, 1]


@pytest.mark.parametrize(
    ("blocks", "num_tokens", "message"),
    [
        ([0], 5, "expected the blocks of 5 tokens, got 1"),
        ([0, 1], 4, "expected the blocks of 4 tokens, got 2"),
        ([0, 5], 5, "block 5 has 0"),
        ([0, 99], 5, "got 99"),
    ],
)
def test_blocks_that_cannot_be_adopted(blocks, num_tokens, message):
    pool = BlockPool(8)
    pool.allocate(2)
    table = BlockTable(pool, 4)
    with pytest.raises(ValueError, match=message):
        table.adopt(blocks, num_tokens)
    assert (table.num_tokens, table.block_ids.tolist()) == (0, [])
    assert pool.reference_count(0) == 1


def test_a_block_that_comes_twice_is_referred_to_twice():
    pool = BlockPool(8)
    cached = pool.allocate(1)
    tree, table = RadixTree(pool, 4), BlockTable(pool, 4)
    table.adopt(cached * 2, 8)
    assert pool.reference_count(0) == 3
    tree.insert([1] * 4 + [2] * 4, cached * 2)
    assert pool.reference_count(0) == 5
    tree.reset()
    table.free()
    assert pool.reference_count(0) == 1
    pool.check_invariants()


def test_only_an_empty_sequence_adopts():
    pool = BlockPool(8)
    table = BlockTable(pool, 4)
    table.append(2)
    with pytest.raises(ValueError, match="an empty sequence, got one of 2 tokens"):
        table.adopt([0], 3)


def test_truncate_gives_back_the_blocks_past_the_end():
    pool = BlockPool(8)
    table = BlockTable(pool, 4)
    table.append(11)
    table.truncate(9)
    assert (table.num_tokens, table.block_ids.tolist(), pool.num_free) == (9, [0, 1, 2], 5)
    table.truncate(4)
    assert (table.num_tokens, table.block_ids.tolist(), pool.num_free) == (4, [0], 7)
    assert table.append(2).tolist() == [4, 5]  # the same block comes back


def test_a_shared_partial_block_is_not_written():
    pool = BlockPool(8)
    table = BlockTable(pool, 4)
    table.append(6)
    fork = table.fork()
    for sequence in (table, fork):
        with pytest.raises(
            SharedBlockError, match=r"block 1 to be this sequence's own .* others hold it"
        ):
            sequence.append(5)
        assert sequence.append(0).tolist() == []
        assert (sequence.num_tokens, sequence.block_ids.tolist()) == (6, [0, 1])
    assert pool.num_free == 6
    fork.truncate(4)
    assert table.append().tolist() == [6]
    assert fork.append().tolist() == [8]


def test_out_of_blocks_leaves_the_table():
    pool = BlockPool(3)
    table = BlockTable(pool, 4)
    table.append(6)
    with pytest.raises(OutOfBlocksError, match="expected 2 free blocks, 1 are left"):
        table.append(7)
    assert (table.num_tokens, table.block_ids.tolist(), pool.num_free) == (6, [0, 1], 1)
    assert table.append(6).tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda table: table.append(-1), "count to be an integer >= 0, got -1"),
        (lambda table: table.append(1.5), r"count to be an integer >= 0, got 1\.5"),
        (lambda table: table.truncate(7), "0 to 6 tokens to keep, got 7"),
        (lambda table: table.truncate(-1), "num_tokens to be an integer >= 0, got -1"),
        (lambda table: table.slots(0, 7), "<= 6 tokens, got 0, 7"),
        (lambda table: table.slots(5, 4), "<= 6 tokens, got 5, 4"),
        (lambda table: table.slots(-2), "<= 6 tokens, got -2, 6"),
    ],
)
def test_a_table_refuses(call, message):
    table = BlockTable(BlockPool(4), 4)
    table.append(6)
    with pytest.raises(ValueError, match=message):
        call(table)
    assert (table.num_tokens, table.block_ids.tolist()) == (6, [0, 1])


@pytest.mark.parametrize("block_ids", [array("q", [1, 2**33]), [0, 1.0], [0, "1"], [0, 7], [0, -1]])
def test_a_bad_last_block_leaves_table_and_counts(block_ids):
    pool = BlockPool(8)
    pool.allocate(2)
    table = BlockTable(pool, 4)
    with pytest.raises(ValueError, match="expected"):
        table.adopt(block_ids, 8)
    assert (table.num_tokens, table.block_ids.tolist()) == (0, [])
    assert [pool.reference_count(block) for block in (0, 1)] == [1, 1]
    table.adopt(array("q", [0, 1]), 8)
    assert table.block_ids.tolist() == [0, 1]


def test_block_ids_are_a_copy():
    table = BlockTable(BlockPool(4), 4)
    table.append(6)
    ids = table.block_ids
    table.append(6)
    table.truncate(1)
    assert ids.tolist() == [0, 1]
    ids[0] = 3
    assert table.block_ids.tolist() == [0]


def test_numpy_counts_are_integers_like_others():
    """A uint8 wraps at 256: 250 tokens and 10 more were 4."""
    table = BlockTable(BlockPool(100), 4)
    table.append(np.uint8(250))
    table.append(np.uint8(10))
    assert (table.num_tokens, len(table.block_ids)) == (260, 65)
    table.truncate(np.uint8(4))
    assert table.append(np.uint8(1)).tolist() == [4]
    table.truncate(0)
    table.append(np.uint8(1))
    assert (table.num_tokens, table.pool.num_free) == (1, 99)


def test_others_blocks_take_the_place_of_ones_own():
    pool = BlockPool(8)
    first, second = BlockTable(pool, 4), BlockTable(pool, 4)
    first.append(9)
    second.append(11)
    pool.share(second.row, 0, first.blocks[:, :2])
    assert second.block_ids.tolist() == [0, 1, 5]
    assert [pool.reference_count(block) for block in range(6)] == [2, 2, 1, 0, 0, 1]
    pool.check_invariants()


def test_shared_blocks_are_copied_by_each_that_writes_them():
    pool = BlockPool(12)
    table = BlockTable(pool, 4)
    table.append(6)
    tables = [table, table.fork(), BlockTable(pool, 4)]
    tables[2].append(4)
    with pytest.raises(OutOfBlocksError, match="expected 12 free blocks, 9 are left"):
        extend(tables, [1, 3, 36])
    assert [each.num_tokens for each in tables] == [6, 6, 4]
    assert extend(tables, [1, 3, 9]) == [(1, 3), (1, 4)]
    assert [each.block_ids.tolist() for each in tables] == [[0, 3], [0, 4, 5], [2, 6, 7, 8]]
    assert pool.reference_count(1) == 0
    for each, length in zip(tables, (6, 6, 4), strict=True):
        each.truncate(length)
    # What was copied stays one's own.
    assert [each.block_ids.tolist() for each in tables] == [[0, 3], [0, 4], [2]]
    pool.check_invariants()


@pytest.mark.parametrize("tokens", [0, 3, 20, 21, 23, 24, 40])
@pytest.mark.parametrize("margin", [0, 5])
def test_blocks_leave_the_window_of_their_group(tokens, margin):
    pool = BlockPool(60, (None, 6), margin)
    table = BlockTable(pool, 4)
    for _ in range(tokens):
        table.append(1)
    full, window = table.blocks
    first = max(tokens - margin + 1 - 6, 0) // 4
    assert (full >= 0).all()
    assert (window >= 0).tolist() == [place >= first for place in range(len(window))]
    assert pool.num_free == 60 - len(full) - (len(window) - first)
    assert pool.blocks_by_group == (len(full), len(window) - first)
    pool.check_invariants()


def test_what_left_a_window_stays_until_blocks_run_out_where_prefixes_are_cached():
    pool = BlockPool(30, (None, 6))
    tree, table = RadixTree(pool, 4), BlockTable(pool, 4)
    table.append(40)
    assert (table.blocks >= 0).all()
    assert pool.num_free == 10
    other = BlockTable(pool, 4)
    other.append(28)
    assert ((table.blocks >= 0).sum(), pool.num_free) == (10 + 2, 4)
    table.truncate(39)
    with pytest.raises(ValueError, match="left a window"):
        table.truncate(30)
    assert table.num_tokens == 39
    table.free()
    assert tree.num_blocks == 0
    pool.check_invariants()


def test_a_cached_prefix_is_begun_with_what_its_next_token_sees():
    pool = BlockPool(60, (None, 6))
    tree, table = RadixTree(pool, 4), BlockTable(pool, 4)
    table.append(24)
    match = tree.insert(list(range(24)), table.blocks)
    other = BlockTable(pool, 4)
    other.adopt(match.ids[:, :5], 20)
    assert (other.blocks[0] == table.blocks[0, :5]).all()
    assert (other.blocks[1] >= 0).tolist() == [False] * 3 + [True] * 2
    table.free()
    with pytest.raises(ValueError, match="left a window"):
        BlockTable(pool, 4).adopt(np.where(match.ids == match.ids[1, 4], -1, match.ids)[:, :5], 20)
    tree.reset()
    assert pool.num_free == 60 - 5 - 2
    pool.check_invariants()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_blocks"),
        ((4, (3, None)), "first group"),
        ((4, ()), "first group"),
        ((4, (None, 0)), "a window"),
        ((4, (None, 2.5)), "a window"),
        ((4, (None,), -1), "margin"),
    ],
)
def test_pools_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockPool(*arguments)


def test_tables_of_a_pool_have_one_block_size():
    pool = BlockPool(4)
    BlockTable(pool, 4)
    with pytest.raises(ValueError, match="expected blocks of 4 tokens, got 8"):
        BlockTable(pool, 8)


@pytest.mark.parametrize("block_size", [0, -1, 1.5])
def test_a_table_has_a_block_size(block_size):
    with pytest.raises(ValueError, match="block_size"):
        BlockTable(BlockPool(4), block_size)


class TableMachine(RuleBasedStateMachine):
    """Tables against lists of tokens; a written slot keeps its token for all that hold it."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(10)
        self.tables, self.models = [BlockTable(self.pool, 3)], [[]]
        self.written = {}  # slot -> token
        self.token = 0

    def draw(self, data):
        return data.draw(st.integers(0, len(self.tables) - 1))

    @rule(data=st.data(), count=st.integers(0, 8))
    def append(self, data, count):
        which = self.draw(data)
        table, model = self.tables[which], self.models[which]
        before = table.block_ids.tolist()
        shared = bool(len(model) % 3) and self.pool.reference_count(before[-1]) > 1
        needed = blocks_needed(len(model) + count, 3) - len(before)
        if (shared and count) or needed > self.pool.num_free:
            with pytest.raises((SharedBlockError, OutOfBlocksError)):
                table.append(count)
            assert table.block_ids.tolist() == before
            return
        for slot in table.append(count).tolist():
            self.token += 1
            self.written[slot] = self.token
            model.append(self.token)

    @precondition(lambda self: len(self.tables) < 5)
    @rule(data=st.data())
    def fork(self, data):
        which = self.draw(data)
        self.tables.append(self.tables[which].fork())
        self.models.append(list(self.models[which]))

    @rule(data=st.data())
    def truncate(self, data):
        which = self.draw(data)
        keep = data.draw(st.integers(0, len(self.models[which])))
        self.tables[which].truncate(keep)
        del self.models[which][keep:]

    @invariant()
    def agrees(self):
        self.pool.check_invariants()
        held = [0] * 10
        for table, model in zip(self.tables, self.models, strict=True):
            assert [self.written[slot] for slot in table.slots().tolist()] == model
            assert len(table.block_ids) == blocks_needed(len(model), 3)
            for block in table.block_ids:
                held[block] += 1
        assert held == [self.pool.reference_count(block) for block in range(10)]


TableMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestTables = TableMachine.TestCase
