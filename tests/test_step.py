"""A step: one verb a layer, and how it ends."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest
from interrupts import interrupted
from launching import BACKEND
from reference import paged_attention as reference_attention
from test_kv_cache import cache, extend, state, stored, tokens

from pagedkv import OutOfBlocksError, PagedKVError, ScoreOptions, kernels

SCALE = 8**-0.5

pytestmark = pytest.mark.usefixtures("storage")


def inputs(rng, batch, count):
    """Queries of 4 heads, K and V of 2, of as many tokens."""
    return [tokens(rng, batch, count, heads) for heads in (4, 2, 2)]


@pytest.mark.parametrize("layer", [99, -1, 0.0])
def test_there_are_no_slots_of_a_layer_that_is_not_there(layer):
    paged = cache(num_blocks=4)
    with paged.extend([paged.new_table()], [2]) as step, pytest.raises(ValueError, match="a layer"):
        step.slots_of(layer)


@pytest.mark.parametrize("count", [1, 3])
def test_attend_writes_and_attends_causally(count):
    rng = np.random.default_rng(31)
    paged = cache(num_blocks=12)
    tables = [paged.new_table() for _ in range(3)]
    extend(paged, rng, tables, [2, 5, 9])
    queries, keys, values = inputs(rng, 3, count)
    with paged.extend(tables, [count] * 3) as step:
        out = step.attend(1, queries, keys, values, scale=SCALE, scores=ScoreOptions(window=4))
    for b, table in enumerate(tables):
        for new, pool in zip((keys, values), stored(paged, table), strict=True):
            assert np.array_equal(np.array(new[b]).swapaxes(0, 1), pool[-count:])
    expected = reference_attention(
        queries,
        paged.keys[1],
        paged.values[1],
        [table.block_ids.tolist() for table in tables],
        [table.num_tokens for table in tables],
        SCALE,
        window=4,
    )
    assert np.allclose(np.array(out), expected, rtol=1e-4, atol=1e-6)


BAD = {
    "layer": ({"layer": 2}, r"layer in \[0, 2\), got 2"),
    "fractional layer": ({"layer": 0.5}, r"layer in \[0, 2\), got 0.5"),
    "queries of one token": (
        {"queries": mx.ones((2, 4, 1, 8))},
        r"queries of shape \[2, H, 3, D\], got \(2, 4, 1, 8\)",
    ),
    "sequences side by side": (
        {"keys": mx.ones((1, 2, 6, 8)), "values": mx.ones((1, 2, 6, 8))},
        r"keys of shape \[2, H, 3, D\], got \(1, 2, 6, 8\)",
    ),
    "query heads": ({"queries": mx.ones((2, 3, 3, 8))}, "multiple of 2 KV heads, got 3"),
    "values": ({"values": mx.ones((2, 2, 3, 4))}, "values of shape"),
    "dtype of keys": ({"keys": mx.ones((2, 2, 3, 8), mx.float16)}, "float32, got keys of .*16"),
    "dtype of queries": ({"queries": mx.ones((2, 4, 3, 8), mx.float16)}, "expected one dtype"),
    "scale": ({"scale": float("nan")}, "finite scale, got nan"),
    "path": ({"path": "gather"}, "path to be one of"),
    "path of another layout": ({"path": "gather_head_major"}, "head_major layout"),
    "sinks": ({"scores": ScoreOptions(sinks=mx.ones(3))}, r"sinks of shape \(4,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refused_layer_changes_nothing(name):
    changes, message = BAD[name]
    rng = np.random.default_rng(32)
    paged = cache()
    tables = [paged.new_table(), paged.new_table()]
    extend(paged, rng, tables, [1, 2])
    queries, keys, values = inputs(rng, 2, 3)
    good = {"layer": 1, "queries": queries, "keys": keys, "values": values, "scale": SCALE}
    with paged.extend(tables, [3, 3]) as step:
        before = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        with pytest.raises(ValueError, match=message):
            step.attend(**{**good, **changes})
        after = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
        step.attend(**good)


@pytest.mark.parametrize("counts", [[1, 1, 12, 3], [4, 0, 4, 1], [20, 20, 9, 1]])
@pytest.mark.parametrize("window", [None, 6])
def test_sequences_with_different_counts_attend_in_one_call(counts, window):
    """As each would by itself; a layer without K and V of its own sees the same."""
    rng = np.random.default_rng(33)
    paged, alone = cache(num_blocks=64), cache(num_blocks=64)
    before = [5, 1, 9, 2]
    tables, others = ([paged_.new_table() for _ in counts] for paged_ in (paged, alone))
    new = [inputs(rng, 1, n) for n in before]
    for paged_, made in ((paged, tables), (alone, others)):
        for table, arrays in zip(made, new, strict=True):
            with paged_.extend([table], [arrays[0].shape[2]]) as step:
                step.attend(0, *arrays, scale=SCALE)
    new = [inputs(rng, 1, n) for n in counts if n]
    packed = [
        mx.concatenate([arrays[i].swapaxes(0, 2) for arrays in new]) for i in range(3)
    ]  # [T, H, 1, D]
    scores = ScoreOptions(window=window)
    with paged.extend(tables, counts) as step:
        assert not step.is_even
        out = step.attend(0, *packed, scale=SCALE, scores=scores)
        again = step.attend_again(0, packed[0], scale=SCALE, scores=scores)
    expected = []
    for table, count in zip(others, counts, strict=True):
        if count:
            with alone.extend([table], [count]) as step:
                arrays = new[len(expected)]
                one = step.attend(0, *arrays, scale=SCALE, scores=scores)
                expected.append(one.swapaxes(0, 2))
    for got in (out, again):
        assert mx.allclose(got, mx.concatenate(expected), rtol=1e-4, atol=1e-5).item()
    for table, other in zip(tables, others, strict=True):
        slots = [
            (t.block_ids[i // t.block_size] * t.block_size + i % t.block_size)
            for t in (table, other)
            for i in range(t.num_tokens)
        ]
        half = len(slots) // 2
        for kept, held in ((paged.keys, alone.keys), (paged.values, alone.values)):
            rows = np.array(kept[0]).reshape(-1, 2, 8), np.array(held[0]).reshape(-1, 2, 8)
            assert np.array_equal(rows[0][slots[:half]], rows[1][slots[half:]])


@pytest.mark.parametrize("counts", [[3, 3], [3, 2]])
def test_attending_again_is_of_the_same_tokens_while_they_are_there(counts):
    rng = np.random.default_rng(36)
    paged = cache()
    tables = [paged.new_table(), paged.new_table()]
    even = len(set(counts)) == 1
    new = inputs(rng, 2, 3) if even else inputs(rng, 5, 1)
    step = paged.extend(tables, counts)
    step.attend(0, *new, scale=SCALE)
    with pytest.raises(ValueError, match="expected queries of"):
        step.attend_again(0, inputs(rng, 1, 4)[0], scale=SCALE)
    step.attend_again(0, new[0], scale=SCALE)
    step.commit()
    step.attend_again(0, new[0], scale=SCALE)
    tables[0].truncate(1)
    with pytest.raises(PagedKVError, match="before their step is over, one did"):
        step.attend_again(0, new[0], scale=SCALE)
    undone = paged.extend(tables, counts)
    undone.rollback()
    with pytest.raises(PagedKVError, match="before their step is over, one did"):
        undone.attend_again(0, new[0], scale=SCALE)


def test_an_uneven_step_takes_all_tokens_one_after_the_other():
    rng = np.random.default_rng(33)
    paged = cache()
    with paged.extend([paged.new_table(), paged.new_table()], [3, 2]) as step:
        pools = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        for bad in (inputs(rng, 2, 3), inputs(rng, 1, 5), inputs(rng, 4, 1)):
            with pytest.raises(ValueError, match=r"all new tokens, shape \[5, H, 1, D\], got"):
                step.attend(0, *bad, scale=SCALE)
        after = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        assert all(np.array_equal(x, y) for x, y in zip(pools, after, strict=True))
        step.attend(0, *inputs(rng, 5, 1), scale=SCALE)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_numpy_counts_and_layers(dtype):
    rng = np.random.default_rng(34)
    paged = cache()
    table = paged.new_table()
    with paged.extend([table], np.array([3], dtype)) as step:
        step.attend(dtype(1), *inputs(rng, 1, 3), scale=np.float32(SCALE))
    assert table.num_tokens == 3


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_step_without_a_with_statement(end):
    rng = np.random.default_rng(35)
    paged = cache()
    parent = paged.new_table()
    extend(paged, rng, [parent], [6])
    child = parent.fork()
    before = state(paged, [parent, child])
    step = paged.extend([child], [1])
    out = step.attend(0, *inputs(rng, 1, 1), scale=SCALE)
    getattr(step, end)()
    mx.eval(out)
    if end == "rollback":
        assert state(paged, [parent, child]) == before
    else:
        assert child.num_tokens == 7
        assert paged.pool.reference_count(1) == 1
    over = {"commit": "committed", "rollback": "rolled back"}[end]
    after = state(paged, [parent, child])
    for again in (
        step.commit,
        step.rollback,
        step.__enter__,
        lambda: step.attend(0, *inputs(rng, 1, 1), scale=SCALE),
    ):
        with pytest.raises(PagedKVError, match=f"expected a step under way, this one was {over}"):
            again()
    assert state(paged, [parent, child]) == after
    paged.pool.check_invariants()


def test_a_step_may_end_inside_its_with_statement():
    paged = cache()
    table = paged.new_table()
    with paged.extend([table], [3]) as step:
        step.commit()
    assert table.num_tokens == 3
    with paged.extend([table], [3]) as step:
        step.rollback()
    assert table.num_tokens == 3


def start():
    """A cache with a fork that shares a partly filled block, and what must stay."""
    rng = np.random.default_rng(39)
    paged = cache()
    parent = paged.new_table()
    extend(paged, rng, [parent], [6])
    tables = [parent, parent.fork()]
    return paged, tables, state(paged, tables)


def test_an_interrupted_extension_leaves_everything():
    def operation(started):
        paged, tables, _ = started
        paged.extend(tables, [1, 3])

    for (paged, tables, before), done in interrupted(start, operation):
        assert done == (state(paged, tables) != before)
        paged.pool.check_invariants()


@pytest.mark.parametrize("again", [True, False])
def test_after_an_interrupted_step_attention_is_right(again):
    """Also where block tables were being sent to the device."""

    def begin():
        paged = cache(num_blocks=24)
        tables = [paged.new_table() for _ in range(3)]
        extend(paged, np.random.default_rng(41), tables, [8, 8, 7])
        return paged, tables

    def operation(state):
        paged, tables = state
        with contextlib.suppress(OutOfBlocksError), paged.extend(tables, [1, 1, 1]) as step:
            step.attend(0, *inputs(np.random.default_rng(42), 3, 1), scale=SCALE)
            step.attend(1, *inputs(np.random.default_rng(42), 3, 1), scale=SCALE)

    expected = None
    for (paged, tables), done in interrupted(begin, operation):
        if not done and again:
            tables = tables[::-1]
            operation((paged, tables))
            tables = tables[::-1]
        lengths = [table.num_tokens for table in tables]
        assert lengths in ([8, 8, 7], [9, 9, 8], [10, 10, 9])
        for table, length in zip(tables, (8, 8, 7), strict=True):
            table.truncate(length)
        with paged.extend(tables, [5, 5, 5]) as step:
            new = inputs(np.random.default_rng(43), 3, 5)
            found = [np.array(step.attend(layer, *new, scale=SCALE)) for layer in range(2)]
        expected = found if expected is None else expected
        assert np.allclose(found, expected, atol=1e-5)
        paged.pool.check_invariants()


def test_what_fails_while_tables_are_sent_is_sent_again(monkeypatch):
    paged = cache(num_blocks=24)
    tables = [paged.new_table() for _ in range(3)]
    rng = np.random.default_rng(44)
    extend(paged, rng, tables, [8, 8, 7])
    before = [table.num_tokens for table in tables]

    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(kernels, "array_of", fail)
        broken.setattr(kernels, "patched", fail)
        with pytest.raises(MemoryError):
            paged.extend(tables[:2], [1, 1])
    assert [table.num_tokens for table in tables] == before
    with paged.extend(tables[:2], [1, 1]) as step:
        assert np.array(step.batch.block_tables)[:, :3].tolist() == [
            table.block_ids.tolist() for table in tables[:2]
        ]
        step.skip(0)
        step.skip(1)


def test_an_interrupted_layer_can_be_rolled_back():
    rng = np.random.default_rng(40)
    new = inputs(rng, 2, 1)

    def start_step():
        paged, tables, before = start()
        return paged, tables, before, paged.extend(tables, [1, 1])

    def operation(started):
        step = started[-1]
        for layer in (0, 1, 0):
            step.attend(layer, *new, scale=SCALE)

    for (paged, tables, before, step), _ in interrupted(start_step, operation):
        step.rollback()
        assert state(paged, tables) == before
        paged.pool.check_invariants()


def singular(count):
    """K or V of one sequence that cannot be computed, as MLX finds out when it evaluates them."""
    return mx.linalg.inv(mx.zeros((1, 2, 8, 8)), stream=mx.cpu)[:, :, :count]


@pytest.mark.own_process
@pytest.mark.parametrize(("bad", "evaluated"), [("keys", True), ("values", False)])
def test_what_cannot_be_computed_takes_nothing_with_it(bad, evaluated):
    """The pools hold what others wrote, whether it is noticed in the step or after it."""
    rng = np.random.default_rng(36)
    paged = cache()
    tables = [paged.new_table(), paged.new_table()]
    extend(paged, rng, tables, [6, 3])
    before = state(paged, tables)
    queries, keys, values = inputs(rng, 1, 2)
    keys, values = (singular(2), values) if bad == "keys" else (keys, singular(2))

    def fail():
        with paged.extend(tables[:1], [2]) as step:
            step.attend(0, *inputs(rng, 1, 2), scale=SCALE)
            out = step.attend(1, queries, keys, values, scale=SCALE)
            if evaluated:
                mx.eval(out)
        mx.eval(out)

    with pytest.raises(RuntimeError, match="LU factorization failed"):
        fail()
    if tables[0].num_tokens > 6:  # the host ran ahead
        assert not evaluated
        paged.wait()
        tables[0].truncate(6)
    for _ in range(2):
        assert state(paged, tables) == before
    extend(paged, rng, tables, [2, 2])


@pytest.mark.own_process
def test_a_query_that_cannot_be_computed_takes_nothing_with_it():
    rng = np.random.default_rng(37)
    paged = cache()
    table = paged.new_table()
    extend(paged, rng, [table], [3])
    before = state(paged, [table])
    _, keys, values = inputs(rng, 1, 2)
    queries = mx.concatenate([singular(2), singular(2)], axis=1)
    with (
        pytest.raises(RuntimeError, match="LU factorization failed"),
        paged.extend([table], [2]) as step,
    ):
        mx.eval(step.attend(0, queries, keys, values, scale=SCALE))
    assert state(paged, [table]) == before


def uncompilable():
    """K or V that MLX finds out about each time it would launch what computes them."""
    kernel = mx.fast.cuda_kernel if BACKEND == "cuda" else mx.fast.metal_kernel
    broken = kernel(name="broken", input_names=["x"], output_names=["y"], source="no code;")
    shape, dtype = {"output_shapes": [(1, 2, 1, 8)]}, {"output_dtypes": [mx.float32]}
    one = {"inputs": [mx.ones(1)], "grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    return broken(**one, **shape, **dtype)[0]


@pytest.mark.skipif(BACKEND == "cpu", reason="about a host that runs ahead")
@pytest.mark.parametrize("noticed", ["wait", "rollback", "keys"])
def test_a_step_that_failed_stops_the_others_until_it_was_waited_for(noticed):
    rng = np.random.default_rng(38)
    paged = cache(num_blocks=12)
    failing, other = paged.new_table(), paged.new_table()
    extend(paged, rng, [failing, other], [6, 3])
    before = state(paged, [failing, other])
    queries, keys, values = inputs(rng, 1, 1)
    with paged.extend([failing], [1]) as step:
        step.attend(0, queries, uncompilable(), values, scale=SCALE)
    step = paged.extend([other], [1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no code"):
            mx.eval(step.attend(0, queries, keys, values, scale=SCALE))
    ends = {"wait": paged.wait, "rollback": step.rollback, "keys": lambda: paged.keys}
    with pytest.raises(PagedKVError, match=r"(?s)no code.* not in the pools"):
        ends[noticed]()
    paged.wait()
    if noticed != "rollback":
        step.rollback()
    failing.truncate(6)
    assert state(paged, [failing, other]) == before
    extend(paged, rng, [failing, other], [2, 2])


def test_a_step_that_failed_and_was_rolled_back_is_nobody_elses():
    rng = np.random.default_rng(39)
    paged = cache(num_blocks=12)
    failing, other = paged.new_table(), paged.new_table()
    extend(paged, rng, [failing, other], [6, 3])
    before = state(paged, [failing, other])
    queries, keys, values = inputs(rng, 1, 1)
    step = paged.extend([failing], [1])
    with pytest.raises(RuntimeError, match="LU factorization failed"):
        mx.eval(step.attend(0, queries, singular(1), values, scale=SCALE))
    step.rollback()
    assert state(paged, [failing, other]) == before
    with paged.extend([other], [1]) as step:
        mx.eval(step.attend(0, queries, keys, values, scale=SCALE))
