"""Steps that are refused: their sequences changed, or are in another step."""

import gc

import numpy as np
import pytest
from interrupts import interrupted
from test_kv_cache import cache, extend, state
from test_step import SCALE, inputs
from test_steps_go_on import going_on, step_of, three_sequences

from pagedkv import PagedKVError, Scheduler


def attend(step):
    new = inputs(np.random.default_rng(0), *step.batch.context_lens.shape, 1)
    return step.attend(0, *new, scale=SCALE)


CHANGES = {
    "truncate": lambda paged, tables: tables[1].truncate(3),
    "empty": lambda paged, tables: tables[1].truncate(0),
    "append": lambda paged, tables: tables[1].append(1),
    "share": lambda paged, tables: paged.pool.share(tables[2].row, 0, tables[0].blocks[:, :1]),
    "adopt": lambda paged, tables: (tables[1].truncate(0), tables[1].adopt([3, 4], 8)),
}


@pytest.mark.parametrize("use", ["attend", "commit", "rollback", "leave", "raise"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_step_whose_sequences_somebody_changed_is_refused(name, use):
    """It would write into, or give back, blocks that may be others' by now."""
    paged, tables = three_sequences()
    others = [table.fork() for table in tables]
    step = paged.extend(tables, [1, 1, 1])
    assert len(step.copies) == 2
    attend(step)
    CHANGES[name](paged, tables)
    before = [(table.block_ids.tolist(), table.num_tokens) for table in tables]
    pools = [np.array(pool) for pool in paged.keys]

    def leave():
        with step:
            if use == "raise":
                raise KeyError

    actions = {"attend": lambda: attend(step), "leave": leave, "raise": leave}
    message = "sequences that do not change before their step is over, one did"
    with pytest.raises(PagedKVError, match=message):
        actions.get(use, getattr(step, use, None))()
    assert [(table.block_ids.tolist(), table.num_tokens) for table in tables] == before
    assert all(np.array_equal(x, y) for x, y in zip(pools, paged.keys, strict=True))
    if use == "attend":
        with pytest.raises(PagedKVError, match="they stay as they are now"):
            step.commit()
    with pytest.raises(PagedKVError, match="this one was given up"):
        step.rollback()
    step_of(paged, tables)
    paged.pool.check_invariants()
    for table in (*tables, *others):
        table.truncate(0)
    assert paged.pool.num_free == 24


def test_what_others_do_to_others_is_no_reason_to_refuse():
    paged, tables = three_sequences()
    with paged.extend(tables[:2], [1, 1]) as step:
        attend(step)
        fork = tables[0].fork()
        with paged.extend(tables[2:], [1]) as other:
            attend(other)
        attend(step)
        fork.truncate(0)
        attend(step)
    assert [table.num_tokens for table in tables] == [7, 5, 12]


def test_a_schedules_step_whose_sequences_somebody_changed_is_refused():
    paged = cache(num_blocks=24)
    scheduler = Scheduler(paged.pool, paged.block_size)
    scheduler.add("a", range(5), 9)
    schedule = scheduler.schedule()
    step = paged.step(schedule)
    new = inputs(np.random.default_rng(53), 1, 5)
    step.attend(0, *new, scale=SCALE)
    schedule.tables[0].truncate(3)
    with pytest.raises(PagedKVError, match="before their step is over, one did"):
        step.attend(0, *new, scale=SCALE)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_end_that_was_interrupted_comes_when_it_is_called_again(end):
    def start():
        paged, tables, before = going_on()
        return paged, tables, before, paged.extend(tables[:3], [1, 1, 1])

    for (paged, tables, before, step), _ in interrupted(start, lambda s: getattr(s[3], end)()):
        if step.is_open:
            getattr(step, end)()
        if end == "rollback":
            assert state(paged, tables) == before
        assert paged.pool.reference_count(1) == 1
        paged.pool.check_invariants()
        step_of(paged, tables)


def test_an_interrupted_extension_is_not_under_way():
    """The traceback still refers to it."""
    for (paged, tables), done in interrupted(three_sequences, lambda s: s[0].extend(s[1], [1] * 3)):
        if not done:
            step_of(paged, tables)


def test_a_table_that_has_the_id_of_a_dropped_one_is_not_taken_for_it():
    paged, other = cache(), cache()
    table = paged.new_table()
    extend(paged, np.random.default_rng(56), [table], [3])
    key = id(table)
    del table
    for _ in range(100):
        theirs = other.new_table()
        if id(theirs) == key:
            break
    with pytest.raises(ValueError, match="expected tables of this cache"):
        paged.extend([theirs], [3])


def test_a_sequence_has_one_step_under_way():
    paged, tables = three_sequences()
    step = paged.extend(tables[:2], [1, 1])
    before = state(paged, tables)
    for chosen in ([tables[0]], tables[::-1], [tables[2], tables[1]]):
        with pytest.raises(PagedKVError, match="sequences without a step under way"):
            paged.extend(chosen, [1] * len(chosen))
    assert state(paged, tables) == before
    attend(step)
    paged.extend([tables[2]], [1]).commit()
    step.commit()
    step_of(paged, tables)
    second = paged.extend(tables, [1, 1, 1])
    second.rollback()
    step_of(paged, tables)


def test_a_step_that_nobody_holds_is_not_under_way():
    paged, tables = three_sequences()
    paged.extend(tables, [1, 1, 1])
    gc.collect()
    step_of(paged, tables)
    assert [table.num_tokens for table in tables] == [8, 6, 13]


def test_a_step_that_failed_to_begin_is_not_under_way(monkeypatch):
    paged, tables = three_sequences()
    fork = tables[0].fork()
    before = state(paged, tables)

    def fail(copies):
        raise MemoryError

    monkeypatch.setattr(paged, "copy_blocks", fail)
    with pytest.raises(MemoryError) as error:
        paged.extend(tables, [1, 1, 1])
    monkeypatch.undo()
    assert state(paged, tables) == before
    _, step = extend(paged, np.random.default_rng(54), tables, [1, 1, 1])
    assert len(step.copies) == 1
    assert error.traceback
    assert fork.block_ids.tolist() == [0, 1]
