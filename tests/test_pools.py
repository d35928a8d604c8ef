"""Pools: what is written where, in place, and at what cost in memory."""

import mlx.core as mx
import numpy as np
import pytest
from test_kv_cache import cache, extend, tokens

from pagedkv import DecodeBatch, PagedKVCache, SlotMapping, decode_attention
from pagedkv.cache.kv_cache import MemoryUsage

MIB = 2**20

pytestmark = pytest.mark.usefixtures("storage")


def slots(*numbers):
    return SlotMapping.from_slots(numbers, block_size=4, num_blocks=6)


def contents(paged):
    return [np.array(pool) for pool in (*paged.keys, *paged.values)]


def test_a_write_lands_in_its_slots_and_nowhere_else():
    rng = np.random.default_rng(1)
    paged = cache()
    keys, values = tokens(rng, 2, 3), tokens(rng, 2, 3)
    paged.write(1, keys, values, slots(9, 10, 11, 20, 0, 23))
    # slot 9 is block 2, offset 1; a sequence's tokens are together
    expected = np.zeros((6, 4, 2, 8), np.float32)
    for position, (block, offset) in enumerate([(2, 1), (2, 2), (2, 3)]):
        expected[block, offset] = np.array(keys)[0, :, position]
    for position, (block, offset) in enumerate([(5, 0), (0, 0), (5, 3)]):
        expected[block, offset] = np.array(keys)[1, :, position]
    assert np.array_equal(np.array(paged.keys[1]), expected)
    assert np.array_equal(np.array(paged.values[1])[2, 3], np.array(values)[0, :, 2])
    assert not np.array(paged.keys[0]).any()
    assert not np.array(paged.values[0]).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_is_stored_is_bit_identical(dtype):
    rng = np.random.default_rng(2)
    paged = cache(dtype=dtype)
    keys, values = tokens(rng, 1, 2).astype(dtype), tokens(rng, 1, 2).astype(dtype)
    paged.write(0, keys, values, slots(7, 13))
    assert paged.keys[0].dtype == dtype
    for pool, new in ((paged.keys[0], keys), (paged.values[0], values)):
        stored = mx.stack([pool[1, 3], pool[3, 1]], axis=1)
        assert mx.array_equal(stored, new[0]).item()


def test_writes_follow_each_other():
    rng = np.random.default_rng(3)
    paged = cache()
    model = np.zeros((24, 2, 8), np.float32)
    for _ in range(20):
        chosen = rng.permutation(24)[: rng.integers(1, 24)]
        new = tokens(rng, 1, len(chosen))
        paged.write(0, new, new + 1, slots(*chosen))
        model[chosen] = np.array(new)[0].swapaxes(0, 1)
        if rng.random() < 0.5:
            mx.async_eval(paged.keys[0])
    assert np.array_equal(np.array(paged.keys[0]).reshape(24, 2, 8), model)


BAD_WRITES = {
    "layer": ({"layer": 2}, r"layer in \[0, 2\), got 2"),
    "negative layer": ({"layer": -1}, r"layer in \[0, 2\), got -1"),
    "KV heads": ({"keys": mx.ones((1, 3, 2, 8))}, r"\[B, 2, L, 8\], got \(1, 3, 2, 8\)"),
    "head dim": ({"keys": mx.ones((1, 2, 2, 4))}, r"\[B, 2, L, 8\], got \(1, 2, 2, 4\)"),
    "rank": ({"keys": mx.ones((2, 2, 8))}, r"\[B, 2, L, 8\], got \(2, 2, 8\)"),
    "too many tokens": (
        {"keys": mx.ones((2, 2, 2, 8)), "values": mx.ones((2, 2, 2, 8))},
        "2 tokens, one a slot, got 2 sequences",
    ),
    "values differ": ({"values": mx.ones((2, 2, 1, 8))}, r"values of shape \(1, 2, 2, 8\)"),
    "dtype of keys": ({"keys": mx.ones((1, 2, 2, 8), mx.float16)}, "float32, got keys of .*16"),
    "dtype of values": ({"values": mx.ones((1, 2, 2, 8), mx.int32)}, "values of .*int32"),
    "another pool's slots": (
        {"slots": SlotMapping.from_slots([1, 2], block_size=4, num_blocks=5)},
        "slots of 6 blocks of 4 tokens, got 5 of 4",
    ),
}


@pytest.mark.parametrize("name", BAD_WRITES)
def test_a_refused_write_changes_nothing(name):
    changes, message = BAD_WRITES[name]
    rng = np.random.default_rng(4)
    paged = cache()
    paged.write(0, tokens(rng, 1, 3), tokens(rng, 1, 3), slots(1, 2, 3))
    before = contents(paged)
    good = {"layer": 0, "keys": mx.ones((1, 2, 2, 8)), "values": mx.ones((1, 2, 2, 8))}
    with pytest.raises(ValueError, match=message):
        paged.write(**{**good, "slots": slots(1, 2), **changes})
    for old, new in zip(before, contents(paged), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, r"num_layers in \[1, 2147483647\], got 0"),
        ({"num_blocks": 0}, r"num_blocks in \[1, 2147483647\], got 0"),
        ({"block_size": -4}, r"block_size in \[1, 2147483647\], got -4"),
        ({"kv_heads": 0}, r"kv_heads in \[1, 2147483647\], got 0"),
        ({"head_dim": 0}, r"head_dim in \[1, 2147483647\], got 0"),
        ({"num_blocks": 6.5}, r"num_blocks to be an integer, got 6\.5"),
        ({"head_dim": "8"}, "head_dim to be an integer, got '8'"),
        ({"head_dim": {8, 16}}, r"head_dim to be an integer, got \{8, 16\}"),
        ({"kv_heads": None}, "kv_heads to be an integer, got None"),
        ({"kv_heads": [2, 2, 2]}, "kv_heads of each of 2 layers, got 3"),
        ({"head_dim": (8,)}, "head_dim of each of 2 layers, got 1"),
        ({"head_dim": []}, "head_dim to have at least one entry, got none"),
        ({"kv_heads": [2, 0]}, r"kv_heads of layer 1 in \[1, 2147483647\], got 0"),
        ({"head_dim": [-8, 8]}, r"head_dim of layer 0 in \[1, 2147483647\], got -8"),
        ({"head_dim": [8, 2**31]}, r"head_dim of layer 1 in .* got 2147483648"),
        ({"head_dim": [8, 16.5]}, "head_dim to hold integers, got float64"),
        ({"kv_heads": ["2", "2"]}, "kv_heads to hold integers, got <U1"),
        ({"kv_heads": [[2, 2]]}, "kv_heads to be one-dimensional, got 2 dimensions"),
        ({"dtype": mx.int8}, "float16, bfloat16 or float32, got .*int8"),
        ({"num_blocks": 2**26, "block_size": 32}, r"block_size in .* got 2147483648"),
    ],
)
def test_a_cache_refuses(changes, message, monkeypatch):
    monkeypatch.setattr(mx, "zeros", None)  # nothing is allocated before
    with pytest.raises(ValueError, match=message):
        cache(**changes)


def test_memory_usage_counts_blocks_and_bytes():
    paged = cache(dtype=mx.float16)
    block = 2 * 2 * 4 * 2 * 8 * 2  # K and V, layers, S, Hkv, D, bytes
    assert paged.memory_usage() == MemoryUsage(6, 0, block)
    held = paged.pool.allocate(4)
    paged.pool.release(held[:1])
    usage = paged.memory_usage()
    assert (usage.allocated_blocks, usage.live_blocks, usage.free_blocks) == (6, 3, 3)
    assert (usage.live_bytes, usage.free_bytes) == (3 * block, 3 * block)
    assert usage.allocated_bytes == sum(pool.nbytes for pool in (*paged.keys, *paged.values))


@pytest.mark.parametrize("steps", ["eager", "evaluated", "pipelined"])
def test_a_write_does_not_copy_the_pool(steps):
    """One token a step into two layers with pools of 32 MiB each."""
    num_blocks, block_size = 1024, 16
    paged = PagedKVCache(
        num_layers=2, num_blocks=num_blocks, block_size=block_size, kv_heads=8, head_dim=128
    )
    assert paged.keys[0].nbytes == 32 * MIB
    table = list(range(num_blocks - 1, num_blocks - 5, -1))
    mx.random.seed(0)
    queries = mx.random.normal((1, 8, 1, 128)).astype(mx.float16)
    new = mx.random.normal((1, 8, 1, 128)).astype(mx.float16)
    mx.eval(queries, new)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for position in range(40):
        slot = table[position // block_size] * block_size + position % block_size
        step = SlotMapping.from_slots([slot], block_size=block_size, num_blocks=num_blocks)
        batch = DecodeBatch.from_tables(
            [table], [position + 1], block_size=block_size, num_blocks=num_blocks
        )
        out = queries
        for layer in range(2):
            paged.write(layer, new, new, step)
            if steps == "eager":
                mx.eval(paged.keys[layer], paged.values[layer])
                continue
            out = decode_attention(
                out, paged.keys[layer], paged.values[layer], batch, scale=128**-0.5
            )
        if steps == "evaluated":
            mx.eval(out)
        elif steps == "pipelined":
            mx.async_eval(out)
    mx.eval(paged.keys, paged.values)
    mx.synchronize()
    assert mx.get_peak_memory() - before < 8 * MIB
    stored = paged.keys[1][mx.array(table)].reshape(-1, 8, 128)[:40]
    assert mx.array_equal(stored, mx.broadcast_to(new[0, :, 0], stored.shape)).item()


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([(3, 5), (0, 6)], r"block ids in \[0, 6\), got 6"),
        ([(3, 5), (-1, 2)], r"block ids in \[0, 6\), got -1"),
        ([(3, 5), (0, 2), (1, 2)], "each target once"),
        ([(3, 5), (0, 1), (1, 2)], "no source among them"),
        ([(3, 5), (0, 1.5)], "block ids to hold integers, got float64"),
        ([(3, 5), (0, 2**40)], r"block ids in \[0, 6\), got 1099511627776"),
    ],
)
def test_copies_refused(copies, message):
    rng = np.random.default_rng(18)
    paged = cache()
    extend(paged, rng, [paged.new_table()], [20])
    before = contents(paged)
    with pytest.raises(ValueError, match=message):
        paged.copy_blocks(copies)
    assert all(np.array_equal(a, b) for a, b in zip(before, contents(paged), strict=True))


def test_copies_of_blocks():
    rng = np.random.default_rng(19)
    paged = cache()
    extend(paged, rng, [paged.new_table()], [20])
    before = contents(paged)
    paged.copy_blocks([(3, 5), (3, 0), (1, 2)])
    for old, new in zip(before, contents(paged), strict=True):
        assert np.array_equal(new, old[[3, 1, 1, 3, 4, 3]])


def test_slots_of_one_group_are_not_written_in_another():
    """They would be other tokens' blocks."""
    paged = cache(windows=[None, 4])
    tables, ones = [paged.new_table(), paged.new_table()], mx.ones((2, 2, 4, 8))
    with paged.extend(tables, [4, 4]) as step:
        for layer in range(2):
            paged.write(layer, ones, ones, step.slots_of(layer))
        with pytest.raises(ValueError, match="slots of group 1, got those of group 0"):
            paged.write(1, ones, ones, step.slots_of(0))


def test_blocks_of_groups_are_copied():
    paged = cache(windows=[None, 4])
    tables, new = [paged.new_table(), paged.new_table()], mx.ones((2, 2, 4, 8))
    new[1] = 2
    with paged.extend(tables, [4, 4]) as step:
        for layer in range(2):
            paged.write(layer, new, new, step.slots_of(layer))
    theirs, own = (table.blocks[:, 0].tolist() for table in tables[::-1])
    paged.copy_blocks(list(zip(theirs, own, strict=True)))
    for layer in range(2):
        out = paged.attend(layer, mx.ones((2, 2, 1, 8)), paged.batch(tables), scale=1.0)
        assert (out == 2).all().item()
    with pytest.raises(ValueError, match=r"block ids in \[0, 12\), got 12"):
        paged.copy_blocks([(12, 0)])
