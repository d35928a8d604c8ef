"""What a call would run: options, the choice of a path, and the plan that is made once."""

import gc
import math
import weakref

import mlx.core as mx
import numpy as np
import pytest
from cases import ON_CPU, PATHS, Case, assert_close, layout_of, paths
from reference import in_layout

from pagedkv import ScoreOptions, UnsupportedPathError, decode_attention, explain
from pagedkv.attention import plan
from pagedkv.attention.inputs import Call
from pagedkv.attention.paths import choose


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
