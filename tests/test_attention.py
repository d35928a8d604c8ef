import gc
import itertools
import math
import re
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from reference import attend_one, in_layout, random
from reference import paged_attention as reference_attention

import pagedkv
from pagedkv import (
    DECODE_PATHS,
    DecodeBatch,
    Layout,
    ScoreOptions,
    UnsupportedPathError,
    contiguous_attention,
    decode_attention,
    explain,
    paged_attention,
)
from pagedkv.attention import plan
from pagedkv.attention.inputs import Call
from pagedkv.attention.paths import choose

README = Path(__file__).parents[1] / "README.md"
ON_CPU = mx.default_device().type == mx.cpu
NEEDS_GPU = {"fused": "the kernel needs a GPU; tests/test_fused.py runs its text on the CPU"}


def paths(names):
    """Parameters for the tests: paths that cannot run here are skipped with the reason."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(ON_CPU and name in NEEDS_GPU, reason=NEEDS_GPU[name])
        )
        if name in NEEDS_GPU
        else name
        for name in names
    ]


CAUSAL = [name for name, path in DECODE_PATHS.items() if path.causal]
PATHS = paths(["auto", *DECODE_PATHS])
CAUSAL_PATHS = paths(["auto", *CAUSAL])
OPTIONS = {
    "window": {"window": 20},
    "window of one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": np.linspace(-2.0, 3.0, 8)},
    "alibi": {"alibi_slopes": 2.0 ** -np.arange(1.0, 9.0)},
    "all": {
        "window": 40,
        "softcap": 5.0,
        "sinks": np.linspace(3.0, -2.0, 8),
        "alibi_slopes": 2.0 ** -np.arange(1.0, 9.0),
    },
}
HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (6, 1)}
# Relative error of one sequence's output; MLX's CPU graph keeps scores in the input dtype.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


def score_options(options):
    """ScoreOptions of a dict, its arrays put on the device."""
    return ScoreOptions(
        **{
            name: mx.array(value.astype(np.float32)) if isinstance(value, np.ndarray) else value
            for name, value in options.items()
        }
    )


def layout_of(path):
    return Layout.BLOCK_MAJOR if path == "auto" else DECODE_PATHS[path].layout


class Case:
    """A pool with twice the blocks needed, tables in random order, stale blocks full of noise."""

    def __init__(
        self,
        lens,
        *,
        heads=(8, 2),
        query_len=1,
        head_dim=64,
        block_size=16,
        dtype=mx.float32,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        needed = [pagedkv.blocks_needed(length, block_size) for length in lens]
        self.num_blocks = 2 * sum(needed)
        ids = iter(rng.permutation(self.num_blocks).tolist())
        self.tables = [list(itertools.islice(ids, n)) for n in needed]
        self.lens, self.block_size = lens, block_size
        self.queries = random(rng, (len(lens), heads[0], query_len, head_dim), dtype)
        shape = (self.num_blocks, block_size, heads[1], head_dim)
        self.keys, self.values = random(rng, shape, dtype), random(rng, shape, dtype)
        self.scale = head_dim**-0.5

    def batch(self):
        return DecodeBatch.from_tables(
            self.tables, self.lens, block_size=self.block_size, num_blocks=self.num_blocks
        )

    def attend(self, path, **options):
        layout = layout_of(path)
        attention = decode_attention if self.queries.shape[2] == 1 else paged_attention
        return attention(
            self.queries,
            in_layout(self.keys, layout),
            in_layout(self.values, layout),
            self.batch(),
            scale=self.scale,
            path=path,
            scores=score_options(options),
        )

    def expected(self, **options):
        arrays = (np.array(x.astype(mx.float32)) for x in (self.queries, self.keys, self.values))
        return reference_attention(*arrays, self.tables, self.lens, self.scale, **options)


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
    if path == "fused" and block_size < 8:
        pytest.skip("the kernel takes blocks of 8 to 128")
    case = Case([5, 31, 64], block_size=block_size, seed=block_size)
    assert_close(case.attend(path), case.expected(), mx.float32)


def poison(case):
    """Put NaN into every slot that no sequence owns, as freed blocks keep their old contents."""
    owned = np.zeros((case.num_blocks, case.block_size, 1, 1), dtype=bool)
    for table, length in zip(case.tables, case.lens, strict=True):
        for t in range(length):
            owned[table[t // case.block_size], t % case.block_size] = True
    nan = mx.array(math.nan, dtype=case.keys.dtype)
    case.keys = mx.where(mx.array(owned), case.keys, nan)
    case.values = mx.where(mx.array(owned), case.values, nan)


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
    poison(case)
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
    assert_close(
        case.attend("gather_rows", **OPTIONS[name]), case.expected(**OPTIONS[name]), mx.float32
    )


@pytest.mark.parametrize("path", ["gather_block_major", "gather_rows"])
def test_a_path_refuses_options_it_does_not_know(path):
    with pytest.raises(UnsupportedPathError, match=f"{path}' does not know softcap"):
        Case([20]).attend(path, softcap=1.0)


BAD_OPTIONS = {
    "window of none": ({"window": 0}, r"window in \[1, 2147483647\], got 0"),
    "fractional window": ({"window": 1.5}, "window to be an integer, got 1.5"),
    "window in words": ({"window": "all"}, "window to be an integer, got 'all'"),
    "window beyond 32 bits": ({"window": 2**31}, r"window in \[1, 2147483647\]"),
    "negative softcap": ({"softcap": -1.0}, "positive softcap, got -1.0"),
    "infinite softcap": ({"softcap": math.inf}, "finite softcap, got inf"),
    "softcap in words": ({"softcap": "30"}, "finite softcap, got 30"),
    "sinks of another shape": ({"sinks": np.ones(7)}, r"sinks of shape \(8,\), got \(7,\)"),
    "slopes in two dimensions": (
        {"alibi_slopes": np.ones((8, 1))},
        r"alibi_slopes of shape \(8,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        Case([20]).attend("auto", **options)


def test_integer_sinks():
    with pytest.raises(ValueError, match=r"sinks of a floating dtype, got .*int32"):
        ScoreOptions(sinks=mx.zeros(8, dtype=mx.int32))


def test_numpy_scalars_are_numbers():
    case = Case([20, 33])
    numbers = {"window": 7, "softcap": 3.0}
    scalars = {"window": np.int64(7), "softcap": np.float32(3)}
    expected = case.attend("auto", **numbers)
    case.scale = np.float64(case.scale)
    assert mx.array_equal(case.attend("auto", **scalars), expected).item()
    case.scale = np.float32(0.25)
    assert_close(case.attend("auto"), case.expected(), mx.float32)


def explained(path="auto", **changes):
    case = Case([20, 33], **changes)
    arguments = case.queries, case.keys, case.values, case.batch()
    return explain(*arguments, scale=case.scale, path=path)


@pytest.mark.skipif(not ON_CPU, reason="what auto is on a CPU")
def test_explain_on_a_cpu():
    told = explained(query_len=2)
    assert told.path == "gather_rows_grouped"
    assert told.because == "the package's choice"
    assert told.launches is told.items is None
    assert set(told.refused) == {"gather_block_major", "gather_head_major", "fused"}
    assert told.refused["gather_block_major"] == "takes one query token, got 2"
    assert "does not support mlx.core.float32 with head dim 64 on" in told.refused["fused"]


def test_the_argument_and_the_environment_force_a_path(monkeypatch):
    assert explained("gather_rows").path == "gather_rows"
    assert explained("gather_rows").because == "asked for by name"
    monkeypatch.setenv("PAGEDKV_DECODE_PATH", "gather_block_major")
    assert explained().path == "gather_block_major"
    assert explained().because == "PAGEDKV_DECODE_PATH=gather_block_major"
    assert explained("gather_rows").path == "gather_rows"
    monkeypatch.setenv("PAGEDKV_DECODE_PATH", "mine")
    with pytest.raises(ValueError, match=r"one of auto, .*, got 'mine'"):
        explained()


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU here")
def test_fused_needs_a_gpu():
    with pytest.raises(UnsupportedPathError, match=r"fused' does not support .* on Device"):
        explained("fused")


def call(device=mx.gpu, head_dim=128, query_len=1, dtype=mx.float16, options=()):
    queries, keys = (1, 8, query_len, head_dim), (64, 32, 2, head_dim)
    used = tuple((option, "any") for option in options)
    return Call(device, "auto", 1.0, queries, keys, keys, dtype, dtype, dtype, used)


@pytest.mark.parametrize(
    ("metal", "asked", "expected"),
    [
        (False, call(), "fused"),
        (False, call(query_len=8, options=("softcap",)), "fused"),
        (False, call(query_len=9), "gather_rows"),
        (False, call(head_dim=72), "gather_rows"),
        (False, call(head_dim=72, options=("window", "sinks")), "gather_rows"),
        (False, call(head_dim=72, options=("softcap",)), "gather_rows_grouped"),
        (True, call(), "gather_rows"),
        (True, call(options=("alibi_slopes",)), "gather_rows_grouped"),
        (False, call(device=mx.cpu), "gather_rows_grouped"),
    ],
)
def test_auto_is_the_first_path_of_the_table_that_can(metal, asked, expected, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert choose(asked, tokens=1) == choose(asked, tokens=10**6) == expected


def test_a_plan_is_made_once_for_a_kind_of_call(monkeypatch):
    made = []
    original = plan._make_plan
    monkeypatch.setattr(plan, "_make_plan", lambda *args: made.append(1) or original(*args))
    case = Case([20, 33])
    arguments = case.queries, case.keys, case.values, case.batch()
    first = decode_attention(*arguments, scale=case.scale)
    again = decode_attention(*arguments, scale=case.scale)
    assert mx.array_equal(first, again).item()
    assert len(made) == 1
    options = [ScoreOptions(sinks=mx.full(8, float(layer))) for layer in range(2)]
    outputs = [decode_attention(*arguments, scale=case.scale, scores=o) for o in options]
    assert len(made) == 2  # layers' own arrays are of a kind
    assert not mx.array_equal(*outputs).item()
    for changes in ({"scale": 0.3}, {"scores": ScoreOptions(window=3)}, {"path": "gather_rows"}):
        decode_attention(*arguments, **{"scale": case.scale, **changes})
    assert len(made) == 5


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_goes_with_its_last_holder(path):
    """What a plan keeps of it must not keep it: a batch of 16 times 32k tokens has 16 MiB."""
    case = Case([5, 33])
    layout, batch = layout_of(path), case.batch()
    keys, values = in_layout(case.keys, layout), in_layout(case.values, layout)
    alive = weakref.ref(batch)
    options = ScoreOptions(window=9) if path in ("auto", "gather_rows") else ScoreOptions()
    gc.disable()
    try:
        mx.eval(
            decode_attention(
                case.queries, keys, values, batch, scale=1.0, path=path, scores=options
            )
        )
        del batch
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("path", paths(["auto", "gather_rows", "fused"]))
def test_paths_that_follow_rows_make_no_mask_of_blocks(path):
    case = Case([5, 33])
    batch = case.batch()
    decode_attention(case.queries, case.keys, case.values, batch, scale=1.0, path=path)
    assert "mask" not in vars(batch)


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


def test_the_readmes_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    mx.eval(names["out"])
    assert names["out"].shape == (3, 32, 1, 128)
    assert names["cache"].memory_usage().live_blocks == 0
