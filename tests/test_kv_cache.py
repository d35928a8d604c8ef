"""The cache: sequences that grow, share blocks and copy them when they write; all or nothing."""

import mlx.core as mx
import numpy as np
import pytest
from reference import attend_one

from pagedkv import (
    BlockPool,
    BlockTable,
    OutOfBlocksError,
    PagedKVCache,
    SlotMapping,
)

pytestmark = pytest.mark.usefixtures("storage")


class SomeLayers(PagedKVCache):
    """A cache whose steps are committed also if a test writes to some layers alone, or to none."""

    def extend(self, tables, counts):
        step = super().extend(tables, counts)
        try:
            for layer in range(self.num_layers):
                step.skip(layer)
        except BaseException:
            step.rollback()
            raise
        return step


def cache(**changes):
    """Two layers of 6 blocks of 4 tokens, 2 KV heads of 8, with changes."""
    sizes = {"num_layers": 2, "num_blocks": 6, "block_size": 4, "kv_heads": 2, "head_dim": 8}
    return SomeLayers(**{**sizes, "dtype": mx.float32, **changes})


def tokens(rng, batch, length, kv_heads=2, head_dim=8):
    return mx.array(rng.standard_normal((batch, kv_heads, length, head_dim)).astype(np.float32))


def fill(paged, step, *new):
    """Write (keys, values) of each layer."""
    for layer, (keys, values) in enumerate(new):
        paged.write(layer, keys, values, step.slots)


def extend(paged, rng, tables, counts):
    """Extend with random tokens; return (keys, values) of layer 1 by sequence, and the step."""
    new = [(tokens(rng, 1, sum(counts)), tokens(rng, 1, sum(counts))) for _ in paged.keys]
    with paged.extend(tables, counts) as step:
        fill(paged, step, *new)
    cuts = np.cumsum(counts)[:-1]
    return [np.split(np.array(x)[0].swapaxes(0, 1), cuts) for x in new[1]], step


def stored(paged, table, layer=1):
    """What a table's slots hold: keys and values, [L, Hkv, D]."""
    slots = table.slots()
    pools = paged.keys[layer], paged.values[layer]
    return [np.array(pool).reshape(-1, *pool.shape[2:])[slots] for pool in pools]


def test_copy_on_write_does_not_copy_the_pool():
    """A block of two layers with pools of 32 MiB each, a decode step in flight."""
    paged = PagedKVCache(num_layers=2, num_blocks=1024, block_size=16, kv_heads=8, head_dim=128)
    mx.random.seed(0)
    queries = mx.random.normal((1, 8, 1, 128)).astype(mx.float16)
    table = paged.new_table()
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for number in range(16):
        with paged.extend([table], [1]) as step:
            assert len(step.copies) == (number > 0)
            out = queries
            for layer in range(2):
                out = step.attend(layer, out, out, out, scale=128**-0.5)
            mx.async_eval(out)
        table = table.fork()  # the first holder stays
    mx.synchronize()
    assert mx.get_peak_memory() - before < 8 * 2**20


def test_a_prompt_is_one_scatter_per_pool_and_starts_anywhere():
    rng = np.random.default_rng(5)
    paged = cache(num_blocks=12)
    first, second = paged.new_table(), paged.new_table()
    written = [[], []]
    for counts in [(3, 9), (10, 1), (1, 6)]:
        (keys, values), step = extend(paged, rng, [first, second], counts)
        assert step.slots.slots.tolist() == [
            *first.slots(first.num_tokens - counts[0]),
            *second.slots(second.num_tokens - counts[1]),
        ]
        assert step.batch.context_lens.tolist() == [first.num_tokens, second.num_tokens]
        for sequence, new in zip(written, zip(keys, values, strict=True), strict=True):
            sequence.append(new)
    for table, new in zip((first, second), written, strict=True):
        for pool, parts in zip(stored(paged, table), zip(*new, strict=True), strict=True):
            assert np.array_equal(pool, np.concatenate(parts))
    assert paged.pool.num_free == 12 - 4 - 4


@pytest.mark.parametrize("count", [1, 23])
def test_any_number_of_tokens_is_one_scatter_per_pool(count, tmp_path, storage):
    if storage == "in place":
        pytest.skip("a kernel writes K and V")
    rng = np.random.default_rng(16)
    paged = cache()
    new = tokens(rng, 1, count)
    with paged.extend([paged.new_table()], [count]) as step:
        paged.write(0, new, new, step.slots)
    graph = tmp_path / "graph.dot"
    mx.export_to_dot(str(graph), paged.keys[0], paged.values[0])
    assert graph.read_text().count('label ="Scatter"') == 2


def test_a_shared_partial_block_is_copied_alone_and_once():
    rng = np.random.default_rng(6)
    paged = cache()
    parent = paged.new_table()
    extend(paged, rng, [parent], [6])
    child = parent.fork()
    before = stored(paged, parent)
    _, step = extend(paged, rng, [child], [1])
    assert step.copies == [(1, 2)]
    assert (parent.block_ids.tolist(), child.block_ids.tolist()) == ([0, 1], [0, 2])
    assert [paged.pool.reference_count(block) for block in range(4)] == [2, 1, 1, 0]
    for layer in range(2):
        for old, new in zip(stored(paged, parent, layer), stored(paged, child, layer), strict=True):
            assert np.array_equal(old, new[:6])
    for old, new in zip(before, stored(paged, parent), strict=True):
        assert np.array_equal(old, new)
    # Now the block is the parent's own.
    _, step = extend(paged, rng, [parent], [1])
    assert (step.copies, parent.block_ids.tolist()) == ([], [0, 1])


def test_holders_written_together_each_get_a_copy():
    rng = np.random.default_rng(7)
    paged = cache()
    parent = paged.new_table()
    extend(paged, rng, [parent], [5])
    child = parent.fork()
    _, step = extend(paged, rng, [child, parent], [1, 1])
    assert step.copies == [(1, 2), (1, 3)]
    assert (child.block_ids.tolist(), parent.block_ids.tolist()) == ([0, 2], [0, 3])
    assert [paged.pool.reference_count(block) for block in range(4)] == [2, 0, 1, 1]


def test_a_failed_step_of_two_holders_leaves_their_block():
    """The shorter one writes where the longer one has a token."""
    rng = np.random.default_rng(17)
    paged = cache()
    longer = paged.new_table()
    extend(paged, rng, [longer], [3])
    shorter = longer.fork()
    shorter.truncate(1)
    before = state(paged, [longer, shorter])

    def fail():
        with paged.extend([longer, shorter], [1, 1]) as step:
            new = tokens(rng, 2, 1)
            fill(paged, step, (new, new), (new, new))
            raise Fault

    with pytest.raises(Fault):
        fail()
    assert state(paged, [longer, shorter]) == before


def test_appending_nothing_to_a_shared_block_copies_nothing():
    rng = np.random.default_rng(8)
    paged = cache()
    parent, other = paged.new_table(), paged.new_table()
    extend(paged, rng, [parent], [6])
    child = parent.fork()
    _, step = extend(paged, rng, [child, other], [0, 2])
    assert (step.copies, child.block_ids.tolist()) == ([], [0, 1])


def test_a_prefix_that_ends_inside_a_shared_block():
    """A prompt's second half is another's: the block where they part is copied, the rest shared."""
    rng = np.random.default_rng(9)
    paged = cache(num_blocks=12)
    prompt = paged.new_table()
    extend(paged, rng, [prompt], [16])
    other = prompt.fork()
    other.truncate(10)
    _, step = extend(paged, rng, [other], [6])
    assert step.copies == [(2, 4)]
    assert other.block_ids.tolist() == [0, 1, 4, 5]
    for mine, theirs in zip(stored(paged, other), stored(paged, prompt), strict=True):
        assert np.array_equal(mine[:10], theirs[:10])
        assert not np.isclose(mine[10:], theirs[10:]).any()


@pytest.mark.parametrize(("length", "copied"), [(4096, 0), (4090, 1)])
def test_forks_of_a_prompt_take_a_block_each_when_they_write(length, copied):
    paged = cache(num_blocks=256 + 8, block_size=16)
    prompt = paged.new_table()
    with paged.extend([prompt], [length]):
        pass  # a body that writes nothing is allowed
    forks = [prompt.fork() for _ in range(8)]
    assert paged.pool.num_free == 8
    rng = np.random.default_rng(10)
    for count, fork in enumerate(forks, start=1):
        _, step = extend(paged, rng, [fork], [1])
        assert len(step.copies) == copied
        assert paged.pool.num_free == 8 - count
    assert paged.memory_usage().live_blocks == 264


def state(paged, tables):
    """All that a failed step must not change; a block that it copied stays its sequence's own."""
    lengths = [(len(table.block_ids), table.num_tokens) for table in tables]
    contents = [[x.tolist() for x in stored(paged, table)] for table in tables]
    return lengths, contents


class Fault(BaseException):
    """Not even an Exception."""


def chunks(rng, fail_after):
    """A caller's iterator that breaks down."""
    for number in range(4):
        if number == fail_after:
            raise Fault
        yield tokens(rng, 1, 2), tokens(rng, 1, 2)


@pytest.mark.parametrize("fail_after", [0, 1, 3])
def test_a_failure_while_writing_leaves_everything(fail_after):
    rng = np.random.default_rng(11)
    paged = cache(num_blocks=10)
    parent, other = paged.new_table(), paged.new_table()
    extend(paged, rng, [parent, other], [6, 3])
    child, tables = parent.fork(), [parent, other]
    tables.append(child)
    before = state(paged, tables)

    def step_by_chunks():
        with paged.extend(tables, [3, 4, 1]) as step:
            assert step.copies == [(1, 3), (1, 4)]
            slots = np.split(np.array(step.slots.slots), 4)
            for two, (keys, values) in zip(slots, chunks(rng, fail_after), strict=True):
                part = SlotMapping.from_slots(two, block_size=4, num_blocks=10)
                paged.write(0, keys, values, part)
                paged.write(1, keys, values, part)

    with pytest.raises(Fault):
        step_by_chunks()
    assert state(paged, tables) == before
    paged.pool.check_invariants()
    _, step = extend(paged, rng, tables, [3, 4, 1])
    assert step.copies == []  # and the same again goes through, in blocks of one's own


def test_a_bad_shape_while_writing_leaves_everything():
    rng = np.random.default_rng(12)
    paged = cache()
    table = paged.new_table()
    extend(paged, rng, [table], [3])
    before = state(paged, [table])

    def step_with_three():
        with paged.extend([table], [4]) as step:
            paged.write(0, tokens(rng, 1, 4), tokens(rng, 1, 4), step.slots)
            paged.write(1, tokens(rng, 1, 3), tokens(rng, 1, 3), step.slots)

    with pytest.raises(ValueError, match="expected 4 tokens, one a slot"):
        step_with_three()
    assert state(paged, [table]) == before


def test_out_of_blocks_leaves_everything():
    rng = np.random.default_rng(13)
    paged = cache()
    parent, other = paged.new_table(), paged.new_table()
    extend(paged, rng, [parent, other], [6, 8])
    child = parent.fork()
    before = state(paged, [parent, other, child])
    # One block for other, one for the child's copy, one for its ninth token.
    with (
        pytest.raises(OutOfBlocksError, match="expected 3 free blocks, 2 are left"),
        paged.extend([other, child], [1, 3]),
    ):
        pytest.fail("entered the body")
    assert state(paged, [parent, other, child]) == before


BAD_EXTENSIONS = {
    "no tables": (lambda table: ([], []), "at least one table, got none"),
    "counts": (lambda table: ([table], [1, 2]), "got 2 counts for 1 tables"),
    "twice": (lambda table: ([table, table], [1, 1]), "distinct tables, got one twice"),
    "negative": (lambda table: ([table], [-1]), "count to be an integer >= 0, got -1"),
    "nothing": (lambda table: ([table], [0]), "at least one new token, got counts of 0 alone"),
    "fraction": (lambda table: ([table], [1.5]), r"count to be an integer >= 0, got 1\.5"),
    "another pool": (
        lambda table: ([BlockTable(BlockPool(6), 4)], [1]),
        "expected tables of this cache",
    ),
    "an empty sequence": (
        lambda table: ([table, table.fork(), BlockTable(table.pool, 4)], [1, 1, 0]),
        "context lengths >= 1, got 0 in row 2",
    ),
}


@pytest.mark.parametrize("name", BAD_EXTENSIONS)
def test_a_refused_extension_changes_nothing(name):
    make, message = BAD_EXTENSIONS[name]
    rng = np.random.default_rng(14)
    paged = cache()
    table = paged.new_table()
    extend(paged, rng, [table], [3])
    tables, counts = make(table)
    before = state(paged, [table])
    with pytest.raises(ValueError, match=message), paged.extend(tables, counts):
        pytest.fail("entered the body")
    assert state(paged, [table]) == before


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_decode_with_forks_and_frees_equals_dense_attention(dtype):
    """200 steps of up to 5 sequences, prompts in chunks, forks, frees and rejected tokens."""
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3}[dtype]
    rng = np.random.default_rng(15)
    paged = cache(num_layers=1, num_blocks=400, dtype=dtype)
    alive = []  # (table, dense keys [L, Hkv, D], dense values)
    for step_number in range(200):
        if len(alive) > 4 or (alive and rng.random() < 0.1):
            alive.pop(rng.integers(len(alive)))[0].truncate(0)
        if not alive or rng.random() < 0.1:
            alive.append((paged.new_table(), *np.zeros((2, 0, 2, 8), np.float32)))
        elif rng.random() < 0.2:
            table, keys, values = alive[rng.integers(len(alive))]
            alive.append((table.fork(), keys, values))
        if rng.random() < 0.2:  # rejected speculation
            table, keys, values = alive.pop(rng.integers(len(alive)))
            kept = rng.integers(table.num_tokens + 1)
            table.truncate(kept)
            alive.append((table, keys[:kept], values[:kept]))
        query_len = int(rng.choice([1, 1, 1, 3, 7]))
        batch, tables = len(alive), [table for table, _, _ in alive]
        keys, values = (tokens(rng, batch, query_len).astype(dtype) for _ in "kv")
        queries = mx.array(rng.standard_normal((batch, 4, query_len, 8))).astype(dtype)
        with paged.extend(tables, [query_len] * batch) as step:
            out = step.attend(0, queries, keys, values, scale=8**-0.5)
            mx.async_eval(out)
        dense = [np.array(x.astype(mx.float32)).swapaxes(1, 2) for x in (keys, values)]
        alive = [
            (table, np.concatenate([k, new_k]), np.concatenate([v, new_v]))
            for (table, k, v), new_k, new_v in zip(alive, *dense, strict=True)
        ]
        q = np.array(queries.astype(mx.float32), np.float64)
        for b, (table, *sequence) in enumerate(alive):
            got = stored(paged, table, layer=0)
            assert all(np.array_equal(x, y) for x, y in zip(got, sequence, strict=True))
            expected = np.empty((4, query_len, 8))
            for head in range(4):
                k, v = (x[:, head // 2].astype(np.float64) for x in sequence)
                for i in range(query_len):
                    seen = len(k) - query_len + i + 1
                    expected[head, i] = attend_one(q[b, head, i], k[:seen], v[:seen], 8**-0.5)
            error = np.array(out[b].astype(mx.float32)) - expected
            assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected), step_number
    for table, _, _ in alive:
        table.truncate(0)
    assert paged.pool.num_free == 400
