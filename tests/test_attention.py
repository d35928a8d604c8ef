import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cases import (
    CAUSAL,
    CAUSAL_PATHS,
    HEADS,
    OPTIONS,
    PATHS,
    TOLERANCE,
    Case,
    assert_close,
    layout_of,
    paths,
    poison,
)
from reference import attend_one, in_layout, random

from pagedkv import (
    DECODE_PATHS,
    DecodeBatch,
    Layout,
    ScoreOptions,
    UnsupportedPathError,
    contiguous_attention,
    decode_attention,
    paged_attention,
)

EXAMPLE = Path(__file__).parents[1] / "docs/package.md"


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
    if path == "fused" and block_size < 8:
        pytest.skip("the kernel takes blocks of 8 to 128")
    case = Case([5, 31, 64], block_size=block_size, seed=block_size)
    assert_close(case.attend(path), case.expected(), mx.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_stale_nan_is_never_seen(path, dtype):
    case = Case([1, 17, 30], dtype=dtype)
    poison(case)
    assert_close(case.attend(path), case.expected(), dtype)


@pytest.mark.parametrize("path", CAUSAL_PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lens", [[40], [32, 32], [5, 33, 100]], ids=str)
def test_several_query_tokens_see_what_came_before_them(path, dtype, heads, lens):
    for query_len in (2, 5):
        case = Case(lens, heads=HEADS[heads], query_len=query_len, dtype=dtype, seed=query_len)
        poison(case)
        assert_close(case.attend(path), case.expected(), dtype)


@pytest.mark.parametrize("path", paths(["auto", "gather_rows_grouped", "fused"]))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, query_len, dtype, path):
    case = Case([5, 33, 100], query_len=query_len, dtype=dtype)
    poison(case, OPTIONS[name].get("window"))
    assert_close(case.attend(path, **OPTIONS[name]), case.expected(**OPTIONS[name]), dtype)


@pytest.mark.parametrize("path", paths(["auto", "fused"]))
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_slopes_of_half_precision_reach_across_a_long_context(dtype, path):
    """A float16 slope times a distance past 65,504 tokens is not a float16."""
    case = Case([70_000], heads=(4, 1), head_dim=64, block_size=32, dtype=dtype)
    slopes = np.array([2.0**-8, 2.0**-16, 2.0**-17, 0.0])
    out = decode_attention(
        *(case.queries, case.keys, case.values, case.batch()),
        scale=case.scale,
        path=path,
        scores=ScoreOptions(alibi_slopes=mx.array(slopes).astype(dtype)),
    )
    assert_close(out, case.expected(alibi_slopes=slopes), dtype)


@pytest.mark.parametrize("path", paths(["auto", "fused"]))
@pytest.mark.parametrize("factor", [2_000, 20_000])
def test_scores_beyond_what_float16_holds(factor, path):
    case = Case([5, 33, 100], query_len=2, dtype=mx.float16)
    case.queries = mx.clip(case.queries, -2, 2) * factor
    case.keys = case.keys * 10
    keys = case.keys.astype(mx.float32).transpose(2, 3, 0, 1).reshape(2, 64, -1)
    grouped = case.queries.astype(mx.float32).reshape(3, 2, -1, 64)
    highest = mx.abs(grouped @ keys).max().item() * case.scale
    assert 2**16 < highest < 2**20
    assert_close(case.attend(path), case.expected(), mx.float16)


@pytest.mark.parametrize("factor", [1e-2, 1e-1])
def test_small_queries_keep_their_digits(factor):
    """Queries are made smaller before the product: scores that matter must not lose by it."""
    case = Case([5, 33, 100], dtype=mx.float16)
    case.queries, case.keys = case.queries * factor, case.keys / factor
    assert_close(case.attend("auto"), case.expected(), mx.float16)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_rows_know_what_sdpa_knows(name):
    case = Case([5, 33, 100], query_len=2)
    poison(case, OPTIONS[name].get("window"))
    assert_close(
        case.attend("gather_rows", **OPTIONS[name]), case.expected(**OPTIONS[name]), mx.float32
    )


@pytest.mark.parametrize("path", CAUSAL_PATHS)
def test_a_prompt_attends_to_itself(path):
    if path == "fused":
        pytest.skip("the kernel takes up to 8 query tokens")
    case = Case([70], query_len=70)
    assert_close(case.attend(path), case.expected(), mx.float32)


def test_one_query_token_is_a_decode_step():
    case = Case([20, 33])
    arguments = case.queries, case.keys, case.values, case.batch()
    out = paged_attention(*arguments, scale=case.scale)
    assert mx.array_equal(out, decode_attention(*arguments, scale=case.scale)).item()


def test_more_query_tokens_than_context():
    case = Case([20, 4], query_len=5)
    with pytest.raises(ValueError, match="1 to 4 query tokens, the shortest context, got 5"):
        case.attend("auto")


@pytest.mark.parametrize("path", sorted(set(DECODE_PATHS) - set(CAUSAL)))
def test_a_path_for_one_query_token_refuses_two(path):
    with pytest.raises(UnsupportedPathError, match=f"{path}' takes one query token, got 2"):
        Case([20], query_len=2).attend(path)


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
    "three-dimensional queries": ({"queries": mx.ones((2, 4, 8))}, r"\[B, Hq, 1, D\]"),
    "two query tokens": ({"queries": mx.ones((2, 4, 2, 8))}, r"\[B, Hq, 1, D\]"),
    "other head dim": ({"queries": mx.ones((2, 4, 1, 16))}, r"\[B, Hq, Q, 8\]"),
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


def test_decode_paths_is_read_only():
    with pytest.raises(TypeError):
        DECODE_PATHS["mine"] = DECODE_PATHS["gather_block_major"]


def test_the_example_of_the_documentation_runs():
    examples = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), re.DOTALL)
    [example] = [text for text in examples if "mlx_lm" not in text]
    names = {}
    exec(example, names)
    mx.eval(names["out"])
    assert names["out"].shape == (3, 32, 1, 128)
    assert names["cache"].memory_usage().live_blocks == 0
