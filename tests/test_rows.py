"""Block tables as one array: literal ids, and whatever changes them in between."""

import numpy as np
import pytest
from interrupts import interrupted

from pagedkv import BlockPool, BlockTable, OutOfBlocksError
from pagedkv.host.rows import Rows, Seen


def three_sequences(num_blocks=32):
    """6 tokens in blocks 0 and 1, 4 in block 2, 11 in blocks 3 to 5; four tokens a block."""
    pool = BlockPool(num_blocks)
    tables = [BlockTable(pool, 4) for _ in range(3)]
    for table, count in zip(tables, (6, 4, 11), strict=True):
        table.append(count)
    return pool, tables


def as_tables_say(rows):
    """What the array has to be."""
    tables = rows.seen.tables
    width = max(1, *(len(table.block_ids) for table in tables))
    ids = [table.block_ids.tolist() or [0] for table in tables]
    return [row + row[:1] * (width - len(row)) for row in ids]


def assert_right(rows):
    tables = rows.seen.tables
    array = rows.block_tables.tolist()
    for row, table, right in zip(array, tables, as_tables_say(rows), strict=True):
        if table.num_tokens:
            assert row == right
    assert [array_.tolist() for array_ in rows.seen.ids] == [t.ids.tolist() for t in tables]
    assert rows.seen.lens.tolist() == [table.num_tokens for table in tables]


def test_tokens_fill_blocks_one_by_one():
    pool, tables = three_sequences()
    rows = Rows(tables)
    assert rows.block_tables.tolist() == [[0, 1, 0], [2, 2, 2], [3, 4, 5]]
    assert rows.changed
    slots = []
    widths = []
    for _ in range(6):
        rows.changed = []
        reservation = rows.reserve([1, 1, 1])
        assert reservation.copies == []
        reservation.commit()
        slots.append(rows.seen.last_slots(reservation.counts).tolist())
        widths.append(rows.block_tables.shape[1] if rows.changed else None)
        assert_right(rows)
    # The second takes block 6; then the third 7; then the first 8; then the second 9.
    assert slots == [
        [6, 24, 23],
        [7, 25, 28],
        [32, 26, 29],
        [33, 27, 30],
        [34, 36, 31],
        [35, 37, 40],
    ]
    assert widths == [3, 4, 4, None, 4, 5]
    assert rows.block_tables.tolist() == [[0, 1, 8, 0, 0], [2, 6, 9, 2, 2], [3, 4, 5, 7, 10]]
    pool.check_invariants()


def test_several_tokens_of_different_number():
    _, tables = three_sequences()
    rows = Rows(tables)
    reservation = rows.reserve([0, 9, 2])
    assert rows.seen.last_slots(reservation.counts).tolist() == [*range(24, 33), 23, 36]
    assert rows.block_tables.tolist() == [[0, 1, 0, 0], [2, 6, 7, 8], [3, 4, 5, 9]]
    reservation.undo()
    assert [table.num_tokens for table in tables] == [6, 4, 11]
    assert rows.follow().lens.tolist() == [6, 4, 11]
    assert rows.block_tables.tolist() == [[0, 1, 0], [2, 2, 2], [3, 4, 5]]
    assert rows.reserve([0, 9, 2]).copies == []
    assert_right(rows)


@pytest.mark.parametrize("count", [1, 3])
def test_a_partly_filled_tail_that_others_hold_is_replaced(count):
    """Whoever holds it, and also when it was this sequence's own a step ago."""
    pool, tables = three_sequences()
    rows = Rows(tables)
    rows.reserve([1, 1, 1]).commit()
    fork = tables[0].fork()
    pool.retain([5])  # full, since it will not be written
    reservation = rows.reserve([count] * 3)
    assert reservation.copies == [(1, 7)]
    assert rows.block_tables[0, :2].tolist() == [0, 7]
    assert_right(rows)
    reservation.commit()
    assert fork.block_ids.tolist() == [0, 1]
    pool.retain([6])  # partly filled until now, and full if the counts were 3
    assert rows.reserve([1, 1, 1]).copies == ([(6, 10)] if count == 1 else [])
    assert_right(rows)


def test_the_first_block_is_replaced_in_the_columns_that_are_not_used():
    pool = BlockPool(8)
    short, long = BlockTable(pool, 4), BlockTable(pool, 4)
    short.append(2)
    long.append(9)
    rows = Rows([short, long])
    assert rows.block_tables.tolist() == [[0, 0, 0], [1, 2, 3]]
    fork = short.fork()
    rows.reserve([1, 1]).commit()
    assert fork.ids.tolist() == [0]
    assert rows.block_tables.tolist() == [[4, 4, 4], [1, 2, 3]]


CHANGES = {
    "truncate": lambda tables: tables[2].truncate(3),
    "truncate inside a block": lambda tables: tables[2].truncate(9),
    "empty": lambda tables: tables[0].truncate(0),
    "append": lambda tables: tables[1].append(30),
    "append inside a block": lambda tables: tables[0].append(1),
    "share": lambda tables: tables[2].share(0, tables[0].block_ids[:1]),
    "adopt": lambda tables: (tables[1].truncate(0), tables[1].adopt([3, 4], 8)),
    "fork": lambda tables: tables[2].fork(),
    "reserve": lambda tables: Rows(tables[:2]).reserve([7, 1]).commit(),
    "undo": lambda tables: Rows(tables).reserve([5, 6, 7]).undo(),
    "all": lambda tables: [table.truncate(1) for table in tables],
}


@pytest.mark.parametrize("others", [0, 9])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_by_others_are_noticed(name, others):
    pool, tables = three_sequences(64)
    more = [BlockTable(pool, 4) for _ in range(others)]  # enough of them are written at once
    for number, table in enumerate(more):
        table.append(number + 1)
    rows = Rows([*tables, *more])
    rows.reserve([1] * (3 + others)).commit()
    seen = rows.seen
    before = [ids.tolist() for ids in seen.ids], seen.lens.tolist()
    CHANGES[name](tables)
    for table in more:
        table.truncate(1)
    rows.follow()
    assert_right(rows)
    assert ([ids.tolist() for ids in seen.ids], seen.lens.tolist()) == before
    assert seen.holds() == (name in ("fork", "undo") and not others)
    assert rows.seen.holds()
    rows.reserve([2] * (3 + others))
    assert_right(rows)


def test_a_table_that_others_changed_back_is_as_it_was():
    _, tables = three_sequences()
    seen = Seen.of(tables)
    assert seen.holds()
    tables[2].truncate(4)
    assert not seen.holds()
    tables[2].append(7)
    assert seen.holds()


REFUSED = {
    "counts": ([1, 1], "one count per table, got 2 counts for 3 tables"),
    "negative": ([1, -1, 1], "count to be an integer >= 0, got -1"),
    "fraction": ([1, 1.0, 1], r"count to be an integer >= 0, got 1\.0"),
    "too large": ([1, 2**63, 1], "counts that fit 64 bits"),
    "nothing": ([0, 0, 0], "at least one new token"),
    "empty": ([1, 1, 0], "context lengths >= 1, got 0 in row 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_counts_change_nothing(name):
    counts, message = REFUSED[name]
    pool, tables = three_sequences()
    rows = Rows(tables)
    rows.reserve([1, 1, 1]).commit()  # these counts are not looked at again
    tables[2].truncate(0)
    free = pool.num_free
    with pytest.raises(ValueError, match=message):
        rows.reserve(counts)
    assert [table.num_tokens for table in tables] == [7, 5, 0]
    assert pool.num_free == free


def test_the_same_counts_may_leave_a_sequence_empty_later():
    _, tables = three_sequences()
    rows = Rows(tables)
    rows.reserve([1, 1, 0]).commit()
    tables[2].truncate(0)
    with pytest.raises(ValueError, match="context lengths >= 1, got 0 in row 2"):
        rows.reserve([1, 1, 0])


def test_counts_are_integers_of_any_kind():
    _, tables = three_sequences()
    for counts in (np.array([1, 2, 3], np.uint8), (1, 2, 3), [np.int64(1), 2, 3]):
        Rows(tables).reserve(counts).undo()
    rows = Rows(tables)
    rows.reserve(np.array([1, 2, 3], np.uint8)).commit()
    assert rows.seen.lens.tolist() == [7, 6, 14]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: [], "at least one table, got none"),
        (lambda table: [table, table], "distinct tables, got one twice"),
        (lambda table: [table, BlockTable(table.pool, 8)], "one pool and block size"),
        (lambda table: [table, BlockTable(BlockPool(4), 4)], "one pool and block size"),
    ],
)
def test_refused_tables(make, message):
    with pytest.raises(ValueError, match=message):
        Rows(make(BlockTable(BlockPool(4), 4)))


def test_out_of_blocks_leaves_everything():
    pool, tables = three_sequences(7)
    rows = Rows(tables)
    with pytest.raises(OutOfBlocksError, match="expected 2 free blocks, 1 are left"):
        rows.reserve([1, 1, 2])
    assert [table.num_tokens for table in tables] == [6, 4, 11]
    assert pool.num_free == 1
    assert_right(rows)


def test_an_interrupt_takes_all_or_nothing():
    def start():
        pool, tables = three_sequences()
        rows = Rows(tables)
        rows.reserve([1, 1, 1]).commit()
        tables[0].fork()
        return pool, tables, rows

    for (pool, tables, _), done in interrupted(start, lambda state: state[2].reserve([1, 1, 1])):
        pool.check_invariants()
        lens = [table.num_tokens for table in tables]
        assert lens == ([8, 6, 13] if done else [7, 5, 12])
        assert_right(Rows(tables))


SHARES = {
    "fork": lambda table: table.fork(),
    "another holder": lambda table: table.pool.retain(table.block_ids[-1:]),
}


@pytest.mark.parametrize("name", SHARES)
def test_a_tail_shared_while_a_step_is_open_is_replaced_by_the_next(name):
    _, tables = three_sequences()
    rows = Rows(tables[:1])
    rows.reserve([1]).commit()
    tables[0].truncate(6)
    rows.reserve([1]).commit()  # 7 of 8 tokens: another fits
    tables[0].truncate(5)
    rows.reserve([1]).commit()
    seen = rows.seen
    kept = SHARES[name](tables[0])
    assert seen.holds()  # as a step does that attends
    reservation = rows.reserve([1])
    assert reservation.copies == [(1, 6)]
    reservation.commit()
    assert_right(rows)
    del kept


def test_steps_that_fit_are_not_counted_anew(monkeypatch):
    pool = BlockPool(64)
    tables = [BlockTable(pool, 4) for _ in range(2)]
    for table, count in zip(tables, (5, 6), strict=True):
        table.append(count)
    rows = Rows(tables)
    counted = []
    needs = rows._needs
    monkeypatch.setattr(rows, "_needs", lambda *sizes: counted.append(1) or needs(*sizes))
    for _ in range(12):
        rows.reserve([1, 1]).commit()
        assert_right(rows)
        counted.append(0)
    # 8 tokens are full after 2 and 3 steps: so one fits twice, then each takes a block, apart.
    assert counted == [1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0]
