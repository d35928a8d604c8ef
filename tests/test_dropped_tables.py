"""Blocks of tables and steps that are dropped come back, whenever the garbage collector comes."""

import gc

import mlx.core as mx
import pytest

from pagedkv import (
    BlockPool,
    BlockTable,
    OutOfBlocksError,
    PagedKVCache,
    PagedKVError,
    RadixTree,
    Scheduler,
)

POOLS = {"one group": lambda: BlockPool(4), "two groups": lambda: BlockPool(8, (None, 4))}


@pytest.fixture(params=POOLS)
def pool(request):
    return POOLS[request.param]()


def grown(pool, tokens):
    table = BlockTable(pool, 4)
    table.append(tokens)
    return table


def test_a_dropped_table_gives_its_blocks_back(pool):
    grown(pool, 9)
    assert pool.num_free == pool.num_blocks
    pool.check_invariants()


@pytest.mark.parametrize(
    "look",
    [
        lambda pool: pool.allocate(pool.num_blocks),
        lambda pool: pool.check_invariants(),
        lambda pool: pool.num_free,
        lambda pool: pool.blocks_by_group,
        lambda pool: pool.reference_count(0),
        lambda pool: BlockTable(pool, 4),
    ],
)
def test_whatever_counts_or_takes_blocks_takes_them_back_first(pool, look):
    grown(pool, 16)
    look(pool)
    pool.check_invariants()


def test_what_others_hold_stays_theirs():
    pool = BlockPool(4)
    table = grown(pool, 6)
    other, ids = table.fork(), table.block_ids.tolist()
    del other
    assert [pool.reference_count(block) for block in ids] == [1, 1]
    table.append(1)  # its last block is its own again
    assert pool.num_free == 2


def test_a_table_in_a_circle_comes_back_when_the_garbage_collector_comes():
    pool = BlockPool(4)
    table = grown(pool, 16)
    table.circle = table
    del table
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    gc.collect()
    assert pool.num_free == 4


@pytest.mark.parametrize(
    "operation",
    [
        lambda table: table.truncate(0),
        lambda table: table.fork(),
        lambda table: table.free(),
        lambda table: table.append(1),
        lambda table: table.adopt([], 0),
    ],
)
def test_a_finalizer_that_sees_a_dropped_table_takes_nothing_from_others(operation):
    pool, found = BlockPool(4), []

    def finalizer(table):
        try:
            yield
        finally:
            found.append(table)

    table = grown(pool, 9)
    running = finalizer(table)
    next(running)
    circle = [running]
    circle.append(circle)
    del table, running, circle
    gc.collect()
    other = grown(pool, 9)  # in its blocks
    with pytest.raises(PagedKVError, match="this one was dropped"):
        operation(found[0])
    found.clear()
    gc.collect()
    assert [pool.reference_count(block) for block in other.block_ids] == [1, 1, 1]
    pool.check_invariants()


def test_one_that_gave_its_blocks_back_gives_none_twice(pool):
    table = grown(pool, 9)
    kept = table.fork()
    table.truncate(0)
    del table
    assert [pool.reference_count(block) for block in kept.block_ids] == [1, 1, 1]
    pool.check_invariants()


def test_a_step_that_is_dropped_with_its_sequences_leaves_nothing():
    cache = PagedKVCache(num_layers=1, num_blocks=4, block_size=4, kv_heads=1, head_dim=8)
    table = cache.new_table()
    with cache.extend([table], [6]) as step:
        step.attend(0, *mx.zeros((3, 1, 1, 6, 8), mx.float16), scale=1.0)
    fork = table.fork()
    step = cache.extend([fork], [4])
    assert step.copies
    del step, fork, table
    assert cache.memory_usage().live_blocks == 0
    cache.pool.check_invariants()


@pytest.mark.parametrize("resets", [False, True])
def test_a_dropped_tree_gives_its_blocks_back(pool, resets):
    tree, table = RadixTree(pool, 4), grown(pool, 8)
    tree.insert(range(8), table.blocks)
    if resets:
        tree.reset()
        tree.insert(range(4), table.blocks, "again")
    ids = table.block_ids.tolist()
    del tree
    assert [pool.reference_count(block) for block in ids] == [1, 1]
    del table
    assert pool.num_free == pool.num_blocks
    assert not pool.reclaimers
    pool.check_invariants()


@pytest.mark.parametrize("steps", range(5))
def test_a_dropped_scheduler_gives_its_blocks_back(pool, steps):
    scheduler = Scheduler(pool, 4, max_tokens=4)
    for name, prompt in (("a", [1, 2, 3, 4, 5]), ("b", [1, 2, 3])):
        scheduler.add(name, prompt, 3)
    for _ in range(steps):
        schedule = scheduler.schedule()
        scheduler.update(dict.fromkeys(schedule.samples, 7))
    scheduler.schedule()  # in flight
    assert pool.num_free < pool.num_blocks
    del scheduler
    schedule = None
    gc.collect()
    assert pool.num_free == pool.num_blocks
    pool.check_invariants()
