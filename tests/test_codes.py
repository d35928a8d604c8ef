"""K and V in few bits: codes and back, by MLX and by the kernels, and attention over them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from cases import OPTIONS, Case, poison, score_options
from launching import TUNING, WHOLE, assert_close, make_plan, run
from reference import random
from test_kv_cache import SomeLayers

from pagedkv import (
    PagedKVCache,
    ScoreOptions,
    UnsupportedPathError,
    decode_attention,
    gather_blocks,
    gather_rows,
)
from pagedkv.attention import codes

FORMATS = [(8, 8), (4, 4), (8, 4), (None, 4), (4, None)]
SHAPES = [
    # heads, head dim, block size, dtype
    ((8, 2), 64, 16, mx.float16),
    ((3, 3), 80, 24, mx.bfloat16),
    ((6, 1), 96, 8, mx.float32),
    ((8, 2), 128, 32, mx.float16),
    ((5, 1), 256, 128, mx.float16),
]


def every_pair(cases, formats):
    """(case, format, tuning) such that any two of them occur together."""
    tunings = {"joined": TUNING, "whole": WHOLE}
    return [
        pytest.param(case, bits, tunings[name], id=f"{case}-{bits}-{name}")
        for i, case in enumerate(cases)
        for j, bits in enumerate(formats)
        for name in [list(tunings)[(i + j) % 2]]
    ]


def coded(case, bits):
    """Return pools of codes of a case's K and V; the case has what they stand for from then on."""
    pools = []
    for name, each in zip(("keys", "values"), bits, strict=True):
        pool = getattr(case, name)
        num_blocks, block_size, kv_heads, head_dim = pool.shape
        if each is None:
            pools.append(pool)
            continue
        empty = mx.zeros((num_blocks, block_size, kv_heads, codes.width(head_dim, each)), mx.uint32)
        slots, rows = mx.arange(num_blocks * block_size), mx.flatten(pool, 0, 1)
        made = codes.put(empty, slots, rows, is_keys=name == "keys")
        every = mx.arange(math.prod(pool.shape[:3]))
        kept = codes.take(made, every, head_dim, mx.float32, is_keys=name == "keys")
        setattr(case, name, kept.reshape(pool.shape))
        pools.append(made)
    mx.eval(pools, case.keys, case.values)
    return tuple(pools)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("rotate", [False, True])
def test_a_number_is_off_by_half_a_step_at_most(head_dim, bits, rotate):
    rows = random(np.random.default_rng(7), (5, 3, head_dim), mx.float32)
    made, measures = codes.encode(rows, bits, rotate=rotate)
    assert made.shape == (5, 3, head_dim * bits // 32)
    back = codes.decode(made, measures, bits, mx.float32, rotate=rotate)
    if rotate:
        rows, back = codes.rotated(rows), codes.rotated(back)
    spread = np.array(rows.max(axis=-1) - rows.min(axis=-1))
    error = np.abs(np.array(back - rows)).max(axis=-1)
    assert (error <= 0.505 * spread / (2**bits - 1) + 1e-3 * spread).all()
    assert (error > 0.2 * spread / (2**bits - 1)).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("bits", codes.BITS)
def test_rows_of_one_number_and_beyond_float16(bits, dtype):
    rows = mx.array([[0.0] * 8, [2.5] * 8, [1e30] * 4 + [-1e30] * 4, [65504.0] * 7 + [-65504.0]])
    back = codes.decode(*codes.encode(rows, bits, rotate=False), bits, dtype, rotate=False)
    assert back[:2].tolist() == rows[:2].tolist()
    wanted = mx.clip(rows[2:], -65504, 65504)
    assert mx.allclose(back[2:].astype(mx.float32), wanted, rtol=2e-3).item()


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("odd", [math.inf, -math.inf])
def test_what_is_infinite_leaves_a_row_of_nan_and_no_other(attend, odd, head_dim, bits):
    """An overflow in a layer is not hidden. Of 80 numbers some lanes of a team have none."""
    case = Case([33], heads=(8, 2), head_dim=head_dim)
    new = [random(np.random.default_rng(1), (1, 2, 1, head_dim), mx.float32) for _ in "kv"]
    new[0][0, 1, 0, 2] = odd
    pools = coded(case, bits)
    plan = make_plan(case, TUNING, pools[0].shape, bits)
    new = tuple(mx.contiguous(x) for x in new)
    mx.eval(plan.attend(case.queries, *pools, score_options({}), None, new))
    rows = mx.array([case.tables[0][2] * 16]) * 2 + mx.arange(2)
    made = codes.encode(new[0][0, :, 0], bits[0], rotate=bits[0] == 4)
    by_mlx = codes.decode(*made, bits[0], mx.float32, rotate=bits[0] == 4)
    for kept in (codes.take(pools[0], rows, head_dim, mx.float32, is_keys=True), by_mlx):
        assert mx.isnan(kept).all(axis=-1).tolist() == [False, True]
        assert mx.isfinite(kept[0]).all().item()


@pytest.mark.parametrize(("which", "bits", "tuning"), every_pair([0, 1], [(None, None), *FORMATS]))
def test_nan_stays_nan(attend, bits, which, tuning):
    """In what MLX writes and in what a kernel writes, and nowhere else."""
    case = Case([33, 65], heads=(8, 2))
    new = [mx.contiguous(random(np.random.default_rng(1), (2, 2, 1, 64), mx.float32)) for _ in "kv"]
    new[which][1, 1, 0, 7] = math.nan
    pools = coded(case, bits)
    plan = make_plan(case, tuning, pools[0].shape, bits)
    out = plan.attend(case.queries, *pools, score_options({}), None, tuple(new))
    mx.eval(out)
    slots = mx.array([case.tables[0][2] * 16, case.tables[1][4] * 16])
    rows = mx.flatten(new[which].swapaxes(1, 2), 0, 1)
    by_mlx = codes.put(pools[which] + 0, slots, rows, is_keys=which == 0)
    every = slots[:, None] * 2 + mx.arange(2)
    for pool in (pools[which], by_mlx):
        kept = codes.take(pool, every, 64, mx.float32, is_keys=which == 0)
        assert mx.isnan(kept).any(axis=-1).tolist() == [[False, False], [False, True]]
    wrong = mx.isnan(out).any(axis=-1)[..., 0]
    assert wrong.tolist() == [[False] * 8, [False] * 4 + [True] * 4]


def test_a_rotation_keeps_products_and_is_its_own_inverse():
    rng = np.random.default_rng(3)
    queries, keys = (random(rng, (4, 96), mx.float32) for _ in range(2))
    turned = codes.rotated(queries), codes.rotated(keys)
    assert np.allclose((queries * keys).sum(-1), (turned[0] * turned[1]).sum(-1), atol=1e-4)
    assert np.allclose(codes.rotated(turned[0]), queries, atol=1e-5)
    assert not np.allclose(turned[0], queries, atol=0.1)


def test_a_row_with_a_large_element_loses_less_rotated():
    rows = random(np.random.default_rng(5), (64, 64), mx.float32)
    rows[:, 3] = 30.0

    def error(rotate):
        made = codes.encode(rows, 4, rotate=rotate)
        return float(mx.abs(codes.decode(*made, 4, mx.float32, rotate=rotate) - rows).mean())

    assert error(rotate=True) < 0.6 * error(rotate=False)


@pytest.mark.parametrize(("shape", "bits", "tuning"), every_pair(SHAPES, FORMATS))
def test_kernels_read_codes(attend, shape, bits, tuning):
    heads, head_dim, block_size, dtype = shape
    case = Case([5, 33, 100], heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    poison(case)
    pools = coded(case, bits)
    assert_close(run(case, tuning, pools), case)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)], ids=str)
def test_options_over_codes(attend, name, bits):
    case = Case([5, 33, 100], heads=(8, 2), query_len=2)
    poison(case, OPTIONS[name].get("window"))
    pools = coded(case, bits)
    assert_close(run(case, pools=pools, **OPTIONS[name]), case, **OPTIONS[name])


@pytest.mark.parametrize("path", ["gather_rows", "gather_rows_grouped"])
@pytest.mark.parametrize("bits", FORMATS, ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_gathers_read_codes(path, bits, window):
    case = Case([5, 33, 100], heads=(8, 2), query_len=2)
    options = {} if window is None else {"window": window}
    keys, values = case.keys, case.values
    pools = coded(case, bits)
    expected = case.expected(**options)
    case.keys, case.values = pools
    out = np.array(case.attend(path, **options))
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    case.keys, case.values = keys, values
    numbers = case.expected(**options)
    assert np.linalg.norm(out - numbers) / np.linalg.norm(numbers) > 1e-4  # codes they were


@pytest.mark.parametrize("path", ["gather_block_major", "gather_head_major"])
def test_other_gathers_refuse_codes(path):
    case = Case([5, 33], heads=(8, 2))
    keys, values = coded(case, (8, 8))
    if path == "gather_head_major":
        keys, values = (mx.contiguous(pool.transpose(2, 0, 1, 3)) for pool in (keys, values))
    with pytest.raises(UnsupportedPathError, match="does not read pools of quantized values"):
        decode_attention(case.queries, keys, values, case.batch(), scale=1.0, path=path)


WRITES = [
    # query tokens, heads, head dim, block size, dtype
    (1, (8, 2), 128, 32, mx.float16),
    (1, (3, 3), 80, 24, mx.float32),
    (3, (6, 1), 96, 16, mx.bfloat16),  # three groups write the same tokens
    (8, (2, 2), 64, 8, mx.float16),  # new tokens in several blocks and items
]


@pytest.mark.parametrize(("write", "bits", "tuning"), every_pair(WRITES, FORMATS))
def test_kernels_write_codes(attend, write, bits, tuning):
    """A kernel's codes are MLX's, to a step; nothing else is written."""
    query_len, heads, head_dim, block_size, dtype = write
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    case = Case([8, 33, 65, 100], query_len=query_len, **shape)
    slots = np.array(
        [
            [table[t // block_size] * block_size + t % block_size for t in range(n - query_len, n)]
            for table, n in zip(case.tables, case.lens, strict=True)
        ]
    )
    new = []
    for pool in (case.keys, case.values):
        new.append(mx.contiguous(mx.flatten(pool, 0, 1)[mx.array(slots)].swapaxes(1, 2)))
    whole = coded(case, bits)
    blank = [mx.zeros((slots.size, *pool.shape[2:3], head_dim)) for pool in whole]
    lacking = [
        codes.put(pool + 0, mx.array(slots.ravel()), rows.astype(dtype), is_keys=is_keys)
        for pool, rows, is_keys in zip(whole, blank, (True, False), strict=True)
    ]
    mx.eval(new, lacking)
    plan = make_plan(case, tuning, whole[0].shape, bits)
    out = plan.attend(case.queries, *lacking, score_options({}), mx.zeros(8, dtype), tuple(new))
    mx.eval(out)
    for name, pool, wanted, each in zip(("keys", "values"), lacking, whole, bits, strict=True):
        every = mx.arange(math.prod(pool.shape[:3]))
        is_keys = name == "keys"
        got, expected = (
            np.array(codes.take(x, every, head_dim, mx.float32, is_keys=is_keys).astype(mx.float32))
            for x in (pool, wanted)
        )
        written = np.zeros(len(got), bool)
        rows = (slots.ravel()[:, None] * heads[1] + np.arange(heads[1])).ravel()
        written[rows] = True
        assert np.array_equal(got[~written], expected[~written])
        off = np.abs(got - expected).max()
        assert off <= (0 if each is None else 8 / (2**each - 1))
        # All but a few that lie between two codes are the same.
        assert (np.abs(got - expected).max(axis=1) > 0.01).mean() < 0.02
        setattr(case, name, mx.array(got.reshape(getattr(case, name).shape)))
    assert_close(out, case)


def cache_of(bits, **sizes):
    usual = {"num_layers": 2, "num_blocks": 16, "block_size": 16, "kv_heads": 2, "head_dim": 64}
    return SomeLayers(**usual | sizes, dtype=mx.float16, bits=bits)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("bits", [*FORMATS, 8], ids=str)
def test_a_cache_of_codes(bits, window):
    """A prompt, then tokens: as attention over what the codes stand for, in one group or in two."""
    windows = [window, None]
    cache, rng = cache_of(bits, windows=windows), np.random.default_rng(11)
    assert len(cache.groups.windows) == 1 + (window is not None)
    table = cache.new_table()
    both = (bits, bits) if isinstance(bits, int) else bits
    kept = [[], []]
    for count in (37, 1, 1, 3):
        with cache.extend([table], [count]) as step:
            for layer in range(2):
                q = random(rng, (1, 8, count, 64), mx.float16)
                k, v = (random(rng, (1, 2, count, 64), mx.float16) for _ in "kv")
                rows = []
                for x, each, rotate in zip((k, v), both, (both[0] == 4, False), strict=True):
                    if each is not None:
                        made = codes.encode(x, each, rotate=rotate)
                        x = codes.decode(*made, each, mx.float16, rotate=rotate)
                    rows.append(np.array(x.astype(mx.float32), np.float64))
                kept[layer].append(rows)
                scores = ScoreOptions(window=windows[layer])
                out = step.attend(layer, q, k, v, scale=0.125, scores=scores)
                keys, values = (np.concatenate(x, axis=2) for x in zip(*kept[layer], strict=True))
                length = keys.shape[2]
                scores = np.array(q.astype(mx.float32), np.float64).reshape(2, 4, count, 64)
                scores = scores @ keys[0].swapaxes(1, 2)[:, None] * 0.125
                ago = np.arange(length - count, length)[:, None] - np.arange(length)
                seen = (ago >= 0) & (ago < (windows[layer] or length))
                weights = np.exp(np.where(seen, scores, -np.inf))
                weights /= weights.sum(axis=-1, keepdims=True)
                expected = (weights @ values[0][:, None]).reshape(1, 8, count, 64)
                got = np.array(out.astype(mx.float32))
                assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 2e-3


@pytest.mark.parametrize("bits", [8, 4, (8, 4)], ids=str)
def test_forks_and_copies_have_the_same_codes(bits):
    cache, rng = cache_of(bits), np.random.default_rng(2)
    table = cache.new_table()

    def go_on(table):
        with cache.extend([table], [21]) as step:
            for layer in range(2):
                new = [random(rng, (1, n, 21, 64), mx.float16) for n in (8, 2, 2)]
                mx.eval(step.attend(layer, *new, scale=0.125))

    go_on(table)
    ids = table.block_ids.tolist()
    before = [
        np.array(pools[layer][mx.array(ids)])
        for pools in (cache.keys, cache.values)
        for layer in (0, 1)
    ]
    assert all(pool.any() for pool in before)
    fork = table.fork()
    go_on(fork)  # copies the block that both wrote to
    assert fork.block_ids[0] == ids[0]
    assert fork.block_ids[1] != ids[1]
    after = [
        np.array(pools[layer][mx.array(ids)])
        for pools in (cache.keys, cache.values)
        for layer in (0, 1)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
    rows = [mx.arange(block * 32, block * 32 + 5 * 2) for block in (ids[1], int(fork.block_ids[1]))]
    for pool in (*cache.keys, *cache.values):  # 5 tokens of 2 heads
        first, copied = (codes.take(pool, each, 64, mx.float32, is_keys=False) for each in rows)
        assert mx.array_equal(first, copied).item()


@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="kernels write in place there")
@pytest.mark.parametrize("bits", [8, 4, (8, 4)], ids=str)
def test_a_write_copies_no_pool(bits):
    cache, rng = cache_of(bits, num_blocks=4096), np.random.default_rng(4)
    table = cache.new_table()
    pool = cache.keys[0].nbytes

    def write(count):
        new = [random(rng, (1, 2, count, 64), mx.float16) for _ in "kv"]
        with cache.extend([table], [count]) as step:
            for layer in range(2):
                cache.write(layer, *new, step.slots)
        cache.wait()

    write(20)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write(3)
    assert mx.get_peak_memory() - before < pool / 2


def test_a_block_takes_as_many_bytes_as_it_says():
    sizes = {bits: cache_of(bits).memory_usage().block_bytes for bits in (None, 8, 4)}
    row = 2 * 2 * 16 * 2  # layers, K and V, tokens, heads
    assert sizes == {None: row * 128, 8: row * 68, 4: row * 36}
    cache = cache_of((8, 4))
    usage = cache.memory_usage()
    held = sum(pool.nbytes for pool in (*cache.keys, *cache.values))
    assert usage.allocated_bytes == held == 16 * usage.block_bytes


@pytest.mark.parametrize("bits", [2, 16, 0, -8, False, "8", (8,), (8, 4, 4), (8, 3), 8.0])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="expected bits of 8, 4 or None, or these of K and of V"):
        cache_of(bits)


@pytest.mark.parametrize("head_dim", [20, 264, 512])
def test_head_dims_have_to_fit(head_dim):
    """A team of lanes has a row, eight numbers each: kernels would write others anywhere."""
    sizes = {"num_layers": 1, "num_blocks": 2, "block_size": 8, "kv_heads": 1}
    with pytest.raises(ValueError, match=r"8, 16, \.\.\. 256"):
        PagedKVCache(**sizes, head_dim=head_dim, bits=8)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (64, mx.float16, "queries of shape"),  # in 8 bits 64 take as many words as 128 in 4
        (128, mx.float32, "queries of mlx.core.float16, got mlx.core.float32"),
    ],
)
@pytest.mark.parametrize("bits", [8, 4, (8, 4)], ids=str)
def test_queries_of_others_than_the_cache_change_nothing(bits, head_dim, dtype, message):
    cache, rng = cache_of(bits, head_dim=128), np.random.default_rng(6)
    table = cache.new_table()
    new = [random(rng, (1, 2, 3, 128), mx.float16) for _ in "kv"]
    queries = random(rng, (1, 8, 3, head_dim), dtype)
    with pytest.raises(ValueError, match=message), cache.extend([table], [3]) as step:
        step.attend(0, queries, *new, scale=1.0)
    assert table.num_tokens == 0
    with cache.extend([table], [3]) as step:
        cache.write(0, *new, step.slots)
    with pytest.raises(ValueError, match=message):
        cache.attend(0, queries, cache.batch([table]), scale=1.0)


@pytest.mark.parametrize("gather", [gather_rows, gather_blocks])
def test_gathers_of_numbers_refuse_codes(gather):
    case = Case([5, 33], heads=(8, 2))
    keys, _ = coded(case, (8, 8))
    with pytest.raises(ValueError, match="got a quantized one"):
        gather(keys, case.batch())
