"""Inputs of attention, seeded, by every path that runs here; and how close an output must be."""

import itertools
import math

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
    decode_attention,
    paged_attention,
)

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


def sdpa_error(dtype):
    """Relative error of MLX's own SDPA on this device."""
    rng = np.random.default_rng(0)
    arrays = [random(rng, (1, 1, length, 128), dtype) for length in (1, 500, 500)]
    out = mx.fast.scaled_dot_product_attention(*arrays, scale=128**-0.5)
    out, query, keys, values = (np.array(x.astype(mx.float32))[0, 0] for x in (out, *arrays))
    right = attend_one(*(x.astype(np.float64) for x in (query[0], keys, values)), 128**-0.5)
    return np.linalg.norm(out[0] - right) / np.linalg.norm(right)


def tolerances(least):
    """Relative errors allowed by dtype: `least`; on a GPU twice SDPA's, up to ten times `least`."""
    if ON_CPU:
        return least
    return {x: min(max(most, 2 * sdpa_error(x)), 10 * most) for x, most in least.items()}


# Relative error of one sequence's output; MLX's CPU graph keeps scores in the input dtype.
TOLERANCE = tolerances({mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2})


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


def poison(case, window=None):
    """Put NaN into every slot that no sequence owns, as freed blocks keep their old contents.

    With a window into blocks before it, too: others may have them then.
    """
    owned = np.zeros((case.num_blocks, case.block_size, 1, 1), dtype=bool)
    for table, length in zip(case.tables, case.lens, strict=True):
        first = max(0, length - case.queries.shape[2] + 1 - (window or length))
        for t in range(first // case.block_size * case.block_size, length):
            owned[table[t // case.block_size], t % case.block_size] = True
    nan = mx.array(math.nan, dtype=case.keys.dtype)
    case.keys = mx.where(mx.array(owned), case.keys, nan)
    case.values = mx.where(mx.array(owned), case.values, nan)
