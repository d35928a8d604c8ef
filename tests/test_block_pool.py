from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedkv import BlockPool, OutOfBlocksError


def test_blocks_come_in_order_and_returned_ones_first():
    pool = BlockPool(6)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([0])
    pool.release([2])
    assert pool.allocate(3) == [2, 0, 3]  # the last returned first, then a new one
    assert pool.num_free == 2
    assert (pool.num_blocks, pool.allocate(0)) == (6, [])


def test_a_shared_block_is_free_after_its_last_holder():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.retain([block])
    assert pool.reference_count(block) == 2
    pool.release([block])
    assert (pool.reference_count(block), pool.num_free) == (1, 1)
    pool.release([block])
    assert (pool.reference_count(block), pool.num_free) == (0, 2)


def state(pool):
    return [pool.reference_count(block) for block in range(pool.num_blocks)], pool.num_free


@pytest.mark.parametrize(
    ("operation", "argument", "error", "message"),
    [
        ("allocate", 3, OutOfBlocksError, "expected 3 free blocks, 2 are left"),
        ("allocate", -1, ValueError, "count to be an integer >= 0, got -1"),
        ("allocate", 1.0, ValueError, r"count to be an integer >= 0, got 1\.0"),
        ("allocate", "1", ValueError, "count to be an integer >= 0, got '1'"),
        ("retain", [0, 1.0], ValueError, "integers, got float64"),
        ("release", [0, "1"], ValueError, "integers, got <U"),
        ("retain", [0, 4], ValueError, r"ids in \[0, 4\), got 4"),
        ("retain", [0, -1], ValueError, r"ids in \[0, 4\), got -1"),
        ("retain", [0, 2], ValueError, "block 2 has 0"),
        ("release", [0, 3], ValueError, "block 3 has 0"),
        ("release", [1, 0, 1], ValueError, "block 1 has 1"),
        ("release", [0, 9], ValueError, r"ids in \[0, 4\), got 9"),
        ("reference_count", 4, ValueError, r"id in \[0, 4\), got 4"),
    ],
)
def test_what_is_refused_changes_nothing(operation, argument, error, message):
    pool = BlockPool(4)
    pool.allocate(2)
    before = state(pool)
    with pytest.raises(error, match=message):
        getattr(pool, operation)(argument)
    assert state(pool) == before
    pool.check_invariants()
    assert pool.allocate(2) == [2, 3]


@pytest.mark.parametrize("num_blocks", [0, -1, 2**31, 1.5])
def test_a_pool_has_blocks(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks .*got {num_blocks}"):
        BlockPool(num_blocks)


def test_numpy_integers_are_taken_and_never_kept():
    pool = BlockPool(np.uint8(250))
    ids = pool.allocate(np.uint8(249))
    pool.retain(np.array(ids, np.uint8))
    for _ in range(2):
        pool.release(np.array(ids, np.uint8))
    assert pool.num_free == 250
    assert all(type(block) is int for block in pool.allocate(250))


@pytest.mark.parametrize("operation", ["retain", "release"])
def test_what_cannot_be_gone_through_twice_is_refused(operation):
    pool = BlockPool(4)
    pool.allocate(2)
    for block_ids in (iter([0, 1, 3]), {0, 3}):
        with pytest.raises((TypeError, ValueError), match=r"len|one-dimensional"):
            getattr(pool, operation)(block_ids)
        assert state(pool) == ([1, 1, 0, 0], 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(pool._free[-1]),
        lambda pool: pool._free.pop(),
        lambda pool: pool.refs.__setitem__(0, 0),
        lambda pool: pool.refs.__setitem__(1, 1),
        lambda pool: pool.refs.__setitem__(3, -1),
    ],
)
def test_check_invariants_notices_damage(damage):
    pool = BlockPool(4)
    pool.allocate(3)
    pool.release([1, 2])
    pool.check_invariants()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_invariants()


class PoolMachine(RuleBasedStateMachine):
    """Against a Counter of holders."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(8)
        self.holders = Counter()
        self.ever_used = set()

    @rule(count=st.integers(0, 9))
    def allocate(self, count):
        free = 8 - len(+self.holders)
        if count > free:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            return
        idle = self.ever_used - set(+self.holders)
        ids = self.pool.allocate(count)
        assert len(set(ids)) == count
        assert not set(ids) & set(+self.holders)
        assert set(ids) <= idle or idle <= set(ids)  # new blocks only when no used one is free
        self.holders.update(ids)
        self.ever_used.update(ids)

    @precondition(lambda self: +self.holders)
    @rule(data=st.data())
    def retain(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(+self.holders)), max_size=4))
        self.pool.retain(ids)
        self.holders.update(ids)

    @rule(ids=st.lists(st.integers(-1, 8), max_size=4))
    def release(self, ids):
        wanted = Counter(ids)
        if all(self.holders[block] >= times for block, times in wanted.items()):
            self.pool.release(ids)
            self.holders.subtract(wanted)
        else:
            with pytest.raises(ValueError, match="expected"):
                self.pool.release(ids)

    @invariant()
    def agrees(self):
        self.pool.check_invariants()
        assert self.pool.num_free == 8 - len(+self.holders)
        for block in range(8):
            assert self.pool.reference_count(block) == self.holders[block]


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestPool = PoolMachine.TestCase
