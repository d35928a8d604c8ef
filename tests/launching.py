"""The fused kernels on a case of attention: the GPU's own, or on a CPU their Metal text."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from cases import score_options, tolerances

from pagedkv import DECODE_PATHS, kernels
from pagedkv.attention import fused, paths, plan
from pagedkv.attention.codes import bits_of
from pagedkv.attention.cut import Tuning
from pagedkv.attention.paths import backend_of
from pagedkv.cache import pools

# Relative error of one sequence's output.
TOLERANCE = tolerances({mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3})
# Small groups and items, so that short contexts are cut and joined.
TUNING = Tuning(
    processors=32,
    warps=(2,),
    resident=2,
    heavy=2,
    bandwidth=math.inf,
    trip=1,
    start=0,
    start_warp=0,
    join=0,
    join_part=0,
    merge_warps=2,
)
WHOLE = replace(TUNING, processors=1)


BACKEND = backend_of(mx.default_device())
on_a_cpu = pytest.mark.skipif(BACKEND != "cpu", reason="about the emulator; there is a GPU here")


def make_plan(case, tuning=TUNING, shape=None, bits=(None, None), **options):
    shapes = case.queries.shape, shape or case.keys.shape
    assert fused.refusal(*shapes) is None
    backend = "metal" if BACKEND == "cpu" else BACKEND
    more = case.queries.dtype, case.scale, score_options(options), bits, tuning
    plan = fused.make_plan(case.batch(), backend, *shapes, *more)
    assert plan.launches == (1 if plan.items == len(case.lens) else 2)
    return plan


def run(case, tuning=TUNING, pools=None, **options):
    keys, values = pools or (case.keys, case.values)
    head_dim = case.queries.shape[3]
    bits = tuple(bits_of(pool.shape, pool.dtype, head_dim) for pool in (keys, values))
    plan = make_plan(case, tuning, keys.shape, bits, **options)
    out = plan.attend(case.queries, keys, values, score_options(options))
    assert out.dtype == case.queries.dtype
    return out


def assert_close(out, case, **options):
    expected = case.expected(**options)
    assert out.shape == expected.shape
    numbers = np.array(out.astype(mx.float32), dtype=np.float64)
    for b in range(len(numbers)):
        error = np.linalg.norm(numbers[b] - expected[b]) / np.linalg.norm(expected[b])
        assert error <= TOLERANCE[out.dtype], f"sequence {b}"


def emulate(patch, emulator):
    """Let a CPU pass for a GPU that runs the kernels' Metal text, through `patch`."""
    fused_path = replace(
        DECODE_PATHS["fused"],
        supports=lambda device, dtype, head_dim: head_dim in fused.HEAD_DIMS,
    )
    emulated = {**DECODE_PATHS, "fused": fused_path}
    for module in (paths, plan):
        patch.setattr(module, "DECODE_PATHS", emulated)
    for module in (paths, pools):
        patch.setattr(module, "backend_of", lambda device: "cuda")  # whose choice is `fused`
    patch.setattr(fused, "tuning_for", lambda gpu, backend: TUNING)
    patch.setattr(kernels, "kernel", emulator.kernel)
