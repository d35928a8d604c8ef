"""Layers of different KV heads and head dims in one cache: a block is the same id in each."""

import mlx.core as mx
import numpy as np
import pytest
from cases import TOLERANCE
from reference import attend_one
from test_kv_cache import cache, state, stored, tokens

SCALE = 0.125
HEADS = 4

pytestmark = pytest.mark.usefixtures("storage")

SHAPES = {  # KV heads and head dims by layer
    "kernels attend": ((2, 1), (64, 96)),
    "one layer is gathered": ((4, 1), (64, 24)),
    "as many heads": (2, (64, 80)),
    "one head dim": ((1, 4, 1), 64),
    "NumPy": (np.array([2, 4]), np.array([24, 8])),
}


@pytest.fixture(params=SHAPES)
def shapes(request):
    return SHAPES[request.param]


def make(kv_heads, head_dim):
    num_layers = max(np.size(kv_heads), np.size(head_dim))
    sizes = {"num_layers": num_layers, "num_blocks": 12, "block_size": 8}
    return cache(**sizes, kv_heads=kv_heads, head_dim=head_dim)


def inputs(rng, paged, batch, count):
    """Queries, K and V of each layer."""
    return [
        [tokens(rng, batch, count, heads, pool[3]) for heads in (HEADS, pool[2], pool[2])]
        for pool in (keys.shape for keys in paged.keys)
    ]


def expected(queries, keys, values):
    """Of one sequence: queries [Hq, Q, D], keys and values [L, Hkv, D]."""
    heads, count, _ = queries.shape
    queries, keys, values = (x.astype(np.float64) for x in (queries, keys, values))
    group = heads // keys.shape[1]
    out = np.empty(queries.shape)
    for h, i in np.ndindex(heads, count):
        seen = len(keys) - count + i + 1
        k, v = (x[:seen, h // group] for x in (keys, values))
        out[h, i] = attend_one(queries[h, i], k, v, SCALE)
    return out


def attend(paged, rng, tables, held, count):
    """Begin a step and attend in every layer; return it and what each layer of a sequence holds."""
    new = inputs(rng, paged, len(tables), count)
    step = paged.extend(tables, [count] * len(tables))
    outs = [step.attend(layer, *three, scale=SCALE) for layer, three in enumerate(new)]
    mx.eval(outs)
    grown = [[] for _ in tables]
    for layer, (out, three) in enumerate(zip(outs, new, strict=True)):
        queries, *pair = map(np.array, three)
        for b in range(len(tables)):
            both = zip(held[b][layer], pair, strict=True)
            grown[b].append([np.concatenate([x, y[b].swapaxes(0, 1)]) for x, y in both])
            right = expected(queries[b], *grown[b][layer])
            error = np.linalg.norm(np.array(out)[b] - right)
            assert error <= TOLERANCE[mx.float32] * np.linalg.norm(right), (layer, b)
    return step, grown


def assert_stored(paged, tables, held):
    for table, layers in zip(tables, held, strict=True):
        for layer, pair in enumerate(layers):
            for got, right in zip(stored(paged, table, layer), pair, strict=True):
                assert np.array_equal(got, right)


def test_a_prompt_decode_a_fork_and_a_rollback(shapes):
    rng = np.random.default_rng(60)
    paged = make(*shapes)
    prompt = paged.new_table()
    held = [[[np.zeros((0, *pool.shape[2:]), np.float32)] * 2 for pool in paged.keys]]
    for count in (13, 1, 4):
        step, held = attend(paged, rng, [prompt], held, count)
        step.commit()
    assert_stored(paged, [prompt], held)

    tables, held = [prompt, prompt.fork()], held * 2
    before = state(paged, tables)
    step, _ = attend(paged, rng, tables, held, 1)
    assert step.copies == [(2, 3), (2, 4)]
    step.rollback()
    assert state(paged, tables) == before
    assert_stored(paged, tables, held)

    for count in (1, 1, 9, 1):
        step, held = attend(paged, rng, tables, held, count)
        step.commit()
        assert_stored(paged, tables, held)
    paged.pool.check_invariants()


def test_a_layer_refuses_what_another_takes(shapes):
    """Also in a step in which the other has attended with such tokens."""
    rng = np.random.default_rng(61)
    paged = make(*shapes)
    first, other = inputs(rng, paged, 1, 1)[:2]
    _, kv_heads, _, head_dim = other[1].shape
    message = rf"keys of shape \[B, {kv_heads}, L, {head_dim}\], got"
    with paged.extend([paged.new_table()], [1]) as step:
        step.attend(0, *first, scale=SCALE)
        before = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        with pytest.raises(ValueError, match=message):
            step.attend(1, *first, scale=SCALE)
        with pytest.raises(ValueError, match=message):
            paged.write(1, *first[1:], step.slots)
        after = [np.array(pool) for pool in (*paged.keys, *paged.values)]
        assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
        step.attend(1, *other, scale=SCALE)


def test_pools_have_their_layers_shape(shapes):
    paged = make(*shapes)
    by_layer = np.broadcast_arrays(*map(np.asarray, shapes))
    wanted = [(12, 8, *sizes) for sizes in zip(*(x.tolist() for x in by_layer), strict=True)]
    assert [pool.shape for pool in paged.keys] == [pool.shape for pool in paged.values] == wanted
    usage = paged.memory_usage()
    assert usage.allocated_bytes == sum(pool.nbytes for pool in (*paged.keys, *paged.values))
    assert usage.block_bytes * 12 == usage.allocated_bytes
