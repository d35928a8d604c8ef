import itertools
import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from reference import attend_one, paged_attention

import pagedkv
from pagedkv import (
    DECODE_PATHS,
    DecodeBatch,
    Layout,
    UnsupportedPathError,
    append_block,
    contiguous_attention,
    decode_attention,
    gather_blocks,
)

README = Path(__file__).parents[1] / "README.md"
PATHS = ["auto", *DECODE_PATHS]
HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (6, 1)}
# Relative error of one sequence's output; MLX's CPU graph keeps scores in the input dtype.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


def layout_of(path):
    return Layout.BLOCK_MAJOR if path == "auto" else DECODE_PATHS[path].layout


def in_layout(pool, layout):
    """Bring a block-major pool into `layout`."""
    return pool if layout is Layout.BLOCK_MAJOR else mx.contiguous(pool.transpose(2, 0, 1, 3))


def random(rng, shape, dtype):
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)


class Case:
    """A pool with twice the blocks needed, tables in random order, stale blocks full of noise."""

    def __init__(self, lens, *, heads=(8, 2), head_dim=64, block_size=16, dtype=mx.float32, seed=0):
        rng = np.random.default_rng(seed)
        needed = [pagedkv.blocks_needed(length, block_size) for length in lens]
        self.num_blocks = 2 * sum(needed)
        ids = iter(rng.permutation(self.num_blocks).tolist())
        self.tables = [list(itertools.islice(ids, n)) for n in needed]
        self.lens, self.block_size = lens, block_size
        self.queries = random(rng, (len(lens), heads[0], 1, head_dim), dtype)
        shape = (self.num_blocks, block_size, heads[1], head_dim)
        self.keys, self.values = random(rng, shape, dtype), random(rng, shape, dtype)
        self.scale = head_dim**-0.5

    def batch(self):
        return DecodeBatch.from_tables(
            self.tables, self.lens, block_size=self.block_size, num_blocks=self.num_blocks
        )

    def attend(self, path):
        layout = layout_of(path)
        return decode_attention(
            self.queries,
            in_layout(self.keys, layout),
            in_layout(self.values, layout),
            self.batch(),
            scale=self.scale,
            path=path,
        )

    def expected(self):
        arrays = (np.array(x.astype(mx.float32)) for x in (self.queries, self.keys, self.values))
        return paged_attention(*arrays, self.tables, self.lens, self.scale)


def assert_close(out, expected, dtype):
    assert out.dtype == dtype
    assert out.shape == expected.shape
    out = np.array(out.astype(mx.float32), dtype=np.float64)
    for b in range(len(out)):
        error = np.linalg.norm(out[b] - expected[b]) / np.linalg.norm(expected[b])
        assert error <= TOLERANCE[dtype], f"sequence {b}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_path_equals_reference(path, dtype, heads, head_dim):
    for seed, lens in enumerate([[64], [48, 48], [1, 33, 100]]):
        case = Case(lens, heads=HEADS[heads], head_dim=head_dim, dtype=dtype, seed=seed)
        assert_close(case.attend(path), case.expected(), dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_block_sizes(path, block_size):
    case = Case([5, 31, 64], block_size=block_size, seed=block_size)
    assert_close(case.attend(path), case.expected(), mx.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_stale_nan_is_never_seen(path, dtype):
    """Freed blocks keep their old contents: NaN in every slot that no sequence owns."""
    case = Case([1, 17, 30], dtype=dtype)
    owned = np.zeros((case.num_blocks, case.block_size, 1, 1), dtype=bool)
    for table, length in zip(case.tables, case.lens, strict=True):
        for t in range(length):
            owned[table[t // case.block_size], t % case.block_size] = True
    nan = mx.array(math.nan, dtype=dtype)
    case.keys = mx.where(mx.array(owned), case.keys, nan)
    case.values = mx.where(mx.array(owned), case.values, nan)
    assert_close(case.attend(path), case.expected(), dtype)


@pytest.mark.parametrize("path", PATHS)
def test_sequences_may_share_blocks(path):
    case = Case([32, 40])
    case.tables[1][:2] = case.tables[0]
    assert_close(case.attend(path), case.expected(), mx.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_contiguous_equals_reference(dtype, heads):
    rng = np.random.default_rng(3)
    query_heads, kv_heads = HEADS[heads]
    queries = random(rng, (2, query_heads, 1, 64), dtype)
    keys, values = (random(rng, (2, kv_heads, 50, 64), dtype) for _ in range(2))
    q, k, v = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (queries, keys, values))
    group = query_heads // kv_heads
    expected = np.array(
        [
            [
                [attend_one(q[b, h, 0], k[b, h // group], v[b, h // group], 0.3)]
                for h in range(q.shape[1])
            ]
            for b in range(2)
        ]
    )
    assert_close(contiguous_attention(queries, keys, values, scale=0.3), expected, dtype)


@pytest.mark.parametrize("layout", Layout)
def test_gather_reads_literal_slots(layout):
    pool = mx.arange(5 * 2 * 3 * 4).reshape(5, 2, 3, 4)  # N=5, S=2, Hkv=3, D=4
    batch = DecodeBatch.from_tables([[4, 0], [2, 3]], [4, 3], block_size=2, num_blocks=5)
    out = np.array(gather_blocks(in_layout(pool, layout), batch, layout=layout))
    assert out.shape == (2, 3, 4, 4)
    for b, slots in enumerate([[(4, 0), (4, 1), (0, 0), (0, 1)], [(2, 0), (2, 1), (3, 0), (3, 1)]]):
        for position, (block, offset) in enumerate(slots):
            for head in range(3):
                expected = pool[block, offset, head].tolist()
                assert out[b, head, position].tolist() == expected


@pytest.mark.parametrize("layout", Layout)
def test_append_replaces_one_block_and_leaves_the_old_pool(layout):
    rng = np.random.default_rng(5)
    pool = random(rng, (6, 4, 2, 8), mx.float16)
    block = random(rng, (4, 2, 8), mx.float16)
    old = in_layout(pool, layout)
    before = np.array(old)
    shaped = block if layout is Layout.BLOCK_MAJOR else block.swapaxes(0, 1)
    new = append_block(old, shaped, 3, layout=layout)
    expected = np.array(pool)
    expected[3] = np.array(block)
    back = new if layout is Layout.BLOCK_MAJOR else new.transpose(1, 2, 0, 3)
    assert np.array_equal(np.array(back), expected)
    assert np.array_equal(np.array(old), before)


def test_append_refuses():
    pool = mx.ones((6, 4, 2, 8))
    with pytest.raises(ValueError, match=r"block id in \[0, 6\), got 6"):
        append_block(pool, mx.ones((4, 2, 8)), 6)
    with pytest.raises(ValueError, match=r"block id in \[0, 6\), got -1"):
        append_block(pool, mx.ones((4, 2, 8)), -1)
    with pytest.raises(ValueError, match=r"block id in \[0, 6\), got 1\.5"):
        append_block(pool, mx.ones((4, 2, 8)), 1.5)
    with pytest.raises(ValueError, match="not a valid Layout"):
        append_block(pool, mx.ones((4, 2, 8)), 0, layout="diagonal")
    with pytest.raises(ValueError, match=r"block of shape \(4, 2, 8\), got \(2, 4, 8\)"):
        append_block(pool, mx.ones((2, 4, 8)), 0)
    with pytest.raises(ValueError, match="block of dtype"):
        append_block(pool, mx.ones((4, 2, 8), dtype=mx.float16), 0)
    with pytest.raises(ValueError, match="expected pool with 4 dimensions"):
        append_block(mx.ones((6, 8)), mx.ones((8,)), 0)


def arguments(**changes):
    """Good arguments for `decode_attention`, B=2 Hq=4 Hkv=2 D=8 N=5 S=4, with changes."""
    good = {
        "queries": mx.ones((2, 4, 1, 8)),
        "keys": mx.ones((5, 4, 2, 8)),
        "values": mx.ones((5, 4, 2, 8)),
        "batch": DecodeBatch.from_tables([[0, 1], [2]], [5, 4], block_size=4, num_blocks=5),
        "scale": 0.5,
    }
    return {**good, **changes}


BAD = {
    "unknown path": ({"path": "gather"}, "path to be one of auto, .*, got 'gather'"),
    "NaN scale": ({"scale": math.nan}, "finite scale, got nan"),
    "infinite scale": ({"scale": math.inf}, "finite scale, got inf"),
    "three-dimensional queries": ({"queries": mx.ones((2, 4, 8))}, r"\[B, Hq, 1, 8\]"),
    "two query tokens": ({"queries": mx.ones((2, 4, 2, 8))}, r"\[B, Hq, 1, 8\]"),
    "other head dim": ({"queries": mx.ones((2, 4, 1, 16))}, r"\[B, Hq, 1, 8\]"),
    "other batch": ({"queries": mx.ones((3, 4, 1, 8))}, "queries of batch 2, got 3"),
    "Hq not a multiple of Hkv": (
        {"queries": mx.ones((2, 3, 1, 8))},
        "multiple of 2 KV heads, got 3",
    ),
    "no KV heads": ({"keys": mx.ones((5, 4, 0, 8)), "values": mx.ones((5, 4, 0, 8))}, "empty"),
    "no query heads": ({"queries": mx.ones((2, 0, 1, 8))}, "multiple of 2 KV heads, got 0"),
    "mixed dtypes": ({"queries": mx.ones((2, 4, 1, 8), dtype=mx.float16)}, "one dtype"),
    "other pool size": ({"keys": mx.ones((6, 4, 2, 8))}, "5 blocks of 4 tokens, got"),
    "other block size": ({"keys": mx.ones((5, 8, 2, 8))}, "5 blocks of 4 tokens, got"),
    "values differ": ({"values": mx.ones((5, 4, 1, 8))}, r"values of shape \(5, 4, 2, 8\)"),
    "pool rank": ({"keys": mx.ones((5, 4, 16))}, "keys with 4 dimensions"),
    "pool in the other layout": (
        {"keys": mx.ones((2, 5, 4, 8)), "values": mx.ones((2, 5, 4, 8))},
        "block_major layout",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_decode_attention_refuses(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments(**changes))


@pytest.mark.parametrize("path", PATHS)
def test_unsupported_dtype(path):
    integers = {name: arguments()[name].astype(mx.int32) for name in ("queries", "keys", "values")}
    if layout_of(path) is Layout.HEAD_MAJOR:
        for name in ("keys", "values"):
            integers[name] = in_layout(integers[name], Layout.HEAD_MAJOR)
    with pytest.raises(UnsupportedPathError, match=r"does not support .*int32"):
        decode_attention(**arguments(path=path, **integers))


def test_contiguous_attention_refuses():
    q, kv = mx.ones((2, 4, 1, 8)), mx.ones((2, 2, 5, 8))
    with pytest.raises(ValueError, match="K/V of batch 2, got 1"):
        contiguous_attention(q, kv[:1], kv[:1], scale=1.0)
    with pytest.raises(ValueError, match="values of shape"):
        contiguous_attention(q, kv, kv[:, :, :4], scale=1.0)
    with pytest.raises(ValueError, match="finite scale"):
        contiguous_attention(q, kv, kv, scale=math.nan)
    with pytest.raises(ValueError, match=r"float16, bfloat16 or float32, got .*int32"):
        contiguous_attention(*(x.astype(mx.int32) for x in (q, kv, kv)), scale=1.0)
    with pytest.raises(ValueError, match=r"without empty dimensions, got shape \(2, 2, 0, 8\)"):
        contiguous_attention(q, kv[:, :, :0], kv[:, :, :0], scale=1.0)
    with pytest.raises(ValueError, match="keys with 4 dimensions"):
        contiguous_attention(q, kv[0], kv[0], scale=1.0)


def test_gather_refuses_a_pool_of_another_size():
    batch = arguments()["batch"]
    with pytest.raises(ValueError, match="head_major layout with 5 blocks of 4 tokens"):
        gather_blocks(mx.ones((5, 4, 2, 8)), batch, layout=Layout.HEAD_MAJOR)


def test_decode_paths_is_read_only():
    with pytest.raises(TypeError):
        DECODE_PATHS["mine"] = DECODE_PATHS["gather_block_major"]


def test_the_readmes_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    mx.eval(names["out"])
    assert names["out"].shape == (2, 32, 1, 128)
