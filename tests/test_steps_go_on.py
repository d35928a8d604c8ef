"""Steps of the same sequences, one after the other: what stays, and what is refused."""

import gc
import weakref
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from interrupts import interrupted
from test_kv_cache import cache, extend, state, tokens
from test_step import SCALE, inputs

from pagedkv import Scheduler, decode_attention
from pagedkv.attention import plan
from pagedkv.attention.paths import DECODE_PATHS


def three_sequences(num_blocks=24):
    paged = cache(num_blocks=num_blocks)
    tables = [paged.new_table() for _ in range(3)]
    extend(paged, np.random.default_rng(50), tables, [6, 4, 11])
    return paged, tables


def step_of(paged, tables, count=1):
    with paged.extend(tables, [count] * len(tables)) as step:
        pass
    return step


def test_block_tables_are_put_on_the_device_when_a_block_is_new():
    paged, tables = three_sequences()
    steps = [step_of(paged, tables) for _ in range(6)]
    arrays = [step.batch.block_tables for step in steps]
    # The second sequence takes a block at once, then the third, the first, and the second again.
    assert [b is a for a, b in pairwise(arrays)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert arrays[0].tolist() == [[0, 1, 0], [2, 6, 0], [3, 4, 5]]
    # There is room for more.
    first, second, third = arrays[5].tolist()
    assert (first[:3], second[:3], third[:5]) == ([0, 1, 8], [2, 6, 9], [3, 4, 5, 7, 10])
    assert [step.batch.lens.tolist() for step in steps[:2]] == [[7, 5, 12], [8, 6, 13]]
    assert [step.slots.slots.tolist() for step in steps[:2]] == [[6, 24, 23], [7, 25, 28]]


def test_slots_are_made_when_they_are_asked_for_and_stay():
    paged, tables = three_sequences()
    step = step_of(paged, tables)
    assert "slots" not in vars(step)
    step_of(paged, tables)
    assert step.slots.slots.tolist() == [6, 24, 23]
    assert (step.slots.block_size, step.slots.num_blocks) == (4, 24)


@pytest.fixture
def planned(monkeypatch):
    """What becomes of plans that can go on: batch lengths where one was made, else by how much."""
    made = []

    def prepare(batch, call, scores):
        made.append(batch.lens.tolist())
        return path.prepare(batch, call, scores)

    def advance(prepared, batch, by):
        made.append(by)
        return path.prepare(batch, call, None) if by < 3 else None

    path = DECODE_PATHS["gather_block_major"]
    call = plan.Call(mx.cpu, "", SCALE, (), (), (), mx.float32, mx.float32, mx.float32)
    paths = {**DECODE_PATHS, "gather_block_major": replace(path, prepare=prepare, advance=advance)}
    monkeypatch.setattr(plan, "DECODE_PATHS", paths)
    return made


def attend(step, number=0, **options):
    new = inputs(np.random.default_rng(number), *step._parts[0].shape)
    return step.attend(0, *new, scale=SCALE, path="gather_block_major", **options)


def take_steps(paged, tables, times):
    for _ in range(times):
        with paged.extend(tables, [1] * len(tables)) as step:
            attend(step)
            attend(step)  # a second layer asks nothing
    return step


def test_plans_go_on_while_all_sequences_grow_alike(planned):
    paged, tables = three_sequences()
    take_steps(paged, tables, 3)
    assert planned == [[7, 5, 12], 1, 1]
    planned.clear()
    tables[0].truncate(8)
    take_steps(paged, tables, 2)
    assert planned == [[9, 8, 15], 1]
    planned.clear()
    extend(paged, np.random.default_rng(51), tables, [1, 2, 1])
    take_steps(paged, tables, 2)
    assert planned == [[12, 12, 18], 1]


def test_plans_go_on_after_a_step_that_was_rolled_back_or_did_not_attend(planned):
    paged, tables = three_sequences()
    take_steps(paged, tables, 1)
    step = paged.extend(tables, [1, 1, 1])
    attend(step)
    step.rollback()
    take_steps(paged, tables, 1)
    assert planned == [[7, 5, 12], 1, 0]
    planned.clear()
    step_of(paged, tables)
    take_steps(paged, tables, 1)
    assert planned == [2]
    planned.clear()
    for _ in range(2):
        step_of(paged, tables)
    take_steps(paged, tables, 2)
    assert planned == [3, [13, 11, 18], 1]  # too far from the last plan


def test_a_prompt_in_between_changes_nothing_and_another_batch_does(planned):
    paged, tables = three_sequences()
    take_steps(paged, tables, 1)
    other = paged.new_table()
    extend(paged, np.random.default_rng(52), [other], [9])
    take_steps(paged, tables, 1)
    take_steps(paged, tables[::-1], 2)
    take_steps(paged, [*tables, other], 1)
    assert planned == [[7, 5, 12], 1, [14, 7, 9], 1, [11, 9, 16, 10]]


def test_a_plan_that_went_on_says_the_same(planned):
    paged, tables = three_sequences()
    take_steps(paged, tables, 1)
    with paged.extend(tables, [1, 1, 1]) as step:
        out = attend(step, 1)
    queries = inputs(np.random.default_rng(1), 3, 1)[0]
    fresh = decode_attention(
        queries, paged.keys[0], paged.values[0], step.batch, scale=SCALE, path="gather_rows"
    )
    assert planned == [[7, 5, 12], 1]
    assert mx.allclose(out, fresh, rtol=1e-5, atol=1e-6).item()


def test_steps_of_schedules_go_on(planned):
    paged = cache(num_blocks=24)
    scheduler = Scheduler(paged.pool, paged.block_size)
    for number, name in enumerate("ab"):
        scheduler.add(name, range(number, number + 5), 9)
    for number in range(4):
        step = paged.step(scheduler.schedule())
        if number:
            attend(step)
        scheduler.update({"a": 7, "b": 8})
    assert planned == [[6, 6], 1, 1]


def test_what_is_remembered_goes_with_the_batch_after_the_next():
    paged, tables = three_sequences()
    step_of(paged, tables)
    gone, made = weakref.ref(tables[1]), weakref.ref(step_of(paged, tables).batch)
    gc.disable()
    try:
        assert made() is None  # a batch may hold an index of every position
        del tables[1]
        step_of(paged, tables)
        del tables[1]
        step_of(paged, tables)
        assert gone() is None
    finally:
        gc.enable()


def going_on():
    """After a step of three sequences, a first and a last block are others' too."""
    paged, tables = three_sequences()
    step_of(paged, tables)
    paged.pool.share(tables[1].row, 0, tables[0].blocks[:, :1])
    tables.append(tables[0].fork())
    return paged, tables, state(paged, tables)


def test_an_interrupt_while_steps_go_on_leaves_everything():
    def operation(started):
        paged, tables, _ = started
        paged.extend(tables[:3], [1, 1, 1])

    for (paged, tables, before), done in interrupted(going_on, operation):
        assert done == (state(paged, tables) != before)
        if not done:
            step = paged.extend(tables[:3], [1, 1, 1])
            assert step.batch.lens.tolist() == [8, 6, 13]


def test_any_sequence_of_tables_and_of_counts_goes_on():
    paged, tables = three_sequences()
    step_of(paged, tables)
    before = step_of(paged, tables).batch
    step = paged.extend(tuple(tables), np.ones(3, np.uint8))
    assert step.batch.carried is before.carried
    new = [tokens(np.random.default_rng(55), 3, 1) for _ in "kv"]
    paged.write(0, *new, step.slots)
    step.commit()
