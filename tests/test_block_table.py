import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedkv import BlockPool, BlockTable, OutOfBlocksError, SharedBlockError, blocks_needed


@pytest.mark.parametrize(
    ("tokens", "block_size", "blocks"),
    [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (5, 1, 5)],
)
def test_blocks_needed(tokens, block_size, blocks):
    assert blocks_needed(tokens, block_size) == blocks


@pytest.mark.parametrize(("tokens", "block_size"), [(-1, 16), (1, 0), (1, -4)])
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
    assert [table.missing_blocks(count) for count in (0, 1, 2, 3, 7)] == [0, 1, 1, 2, 3]
    table.truncate(0)
    assert [pool.reference_count(block) for block in cached] == [1, 1, 1]


@pytest.mark.parametrize(
    ("blocks", "num_tokens", "message"),
    [
        ([0], 5, "expected the blocks of 5 tokens, got 1"),
        ([0, 1], 4, "expected the blocks of 4 tokens, got 2"),
        ([0, 5], 5, "block 5 to have at least 1 holders, got 0"),
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
        with pytest.raises(SharedBlockError, match=r"block 1 to be this sequence's own .* 2 hold"):
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
        (lambda table: table.append(-1), "a count to be an integer >= 0, got -1"),
        (lambda table: table.append(1.5), r"a count to be an integer >= 0, got 1\.5"),
        (lambda table: table.truncate(7), "0 to 6 tokens to keep, got 7"),
        (lambda table: table.truncate(-1), "0 to 6 tokens to keep, got -1"),
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
