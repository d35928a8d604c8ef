import math
import re

import mlx.core as mx
import numpy as np
import pytest
from cases import OPTIONS, Case, poison
from emulator import signature
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import BACKEND, TOLERANCE, TUNING, WHOLE, assert_close, on_a_cpu

from pagedkv import kernels
from pagedkv.attention import fused

LENS = [5, 33, 100]


@pytest.mark.parametrize("tuning", [TUNING, WHOLE], ids=["joined", "whole"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "block_size", "dtype"),
    [
        (64, (4, 2), 16, mx.float16),
        (64, (16, 1), 8, mx.bfloat16),
        (80, (3, 3), 32, mx.float16),
        (96, (6, 1), 16, mx.float32),
        (128, (8, 2), 32, mx.float16),
        (128, (7, 1), 24, mx.bfloat16),
        (256, (5, 1), 128, mx.float32),
    ],
    ids=str,
)
def test_kernels_equal_reference(attend, head_dim, heads, block_size, dtype, tuning):
    case = Case(LENS, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    poison(case)
    assert_close(attend(case, tuning), case)


@pytest.mark.parametrize("query_len", [2, 8])
def test_several_query_tokens(attend, query_len):
    case = Case([8, 33, 100], heads=(8, 2), query_len=query_len)
    poison(case)
    assert_close(attend(case), case)


@pytest.mark.parametrize("tuning", [TUNING, WHOLE], ids=["joined", "whole"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(attend, name, tuning):
    case = Case(LENS, heads=(8, 2), query_len=2)
    poison(case)
    assert_close(attend(case, tuning, **OPTIONS[name]), case, **OPTIONS[name])


@settings(max_examples=15, deadline=None)
@given(lens=st.lists(st.integers(1, 150), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_lengths(attend, lens, seed):
    case = Case(lens, heads=(4, 2), seed=seed)
    poison(case)
    assert_close(attend(case), case)


def test_scores_beyond_what_float16_holds(attend):
    case = Case(LENS, heads=(4, 2), dtype=mx.float16)
    case.queries = case.queries * 100
    assert_close(attend(case), case)


def test_rows_beyond_two_to_the_31st_element(attend):
    # One pool for K and V; on a CPU only the rows that are read ever take memory.
    num_blocks, block_size, kv_heads, head_dim = 2**14 + 8, 128, 8, 128
    pool = np.zeros((num_blocks, block_size, kv_heads, head_dim), np.float16)
    assert pool.size > 2**31
    if BACKEND == "metal" and pool.nbytes > (largest := mx.device_info()["max_buffer_length"]):
        pytest.skip(f"a buffer of {pool.nbytes:,} bytes; this device's largest is {largest:,}")
    case = Case([300], heads=(8, kv_heads), head_dim=head_dim, block_size=block_size)
    case.queries = case.queries.astype(mx.float16)
    blocks = [num_blocks - 1, 3, num_blocks - 2]
    for block in blocks:
        pool[block] = np.random.default_rng(block).standard_normal(pool.shape[1:])
    case.tables, case.num_blocks = [blocks], num_blocks
    paged = pool if BACKEND == "cpu" else mx.array(pool)
    out = attend(case, pools=(paged, paged))
    case.tables, case.keys = [[0, 1, 2]], mx.array(pool[blocks])
    case.values = case.keys
    assert_close(out, case)


@on_a_cpu
def test_a_missing_barrier_shows(attend, emulator, monkeypatch):
    """The emulator would not pass kernels that lack what a real GPU needs."""
    source = kernels.source

    def without_barriers(body, *others):
        header, text = source(body, *others)
        return header, text.replace("group_barrier();", "")

    monkeypatch.setattr(kernels, "source", without_barriers)
    case = Case([100], heads=(4, 2))
    with pytest.raises(AssertionError):
        assert_close(attend(case, WHOLE), case)


@pytest.mark.skipif(BACKEND == "cpu", reason="compiles dozens of kernels for a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", fused.HEAD_DIMS)
@pytest.mark.parametrize(("heads", "query_len"), [((2, 2), 1), ((8, 2), 1), ((16, 1), 8)])
def test_every_variant_launches_with_the_machines_own_constants(head_dim, heads, query_len, dtype):
    case = Case([8, 700], heads=heads, head_dim=head_dim, query_len=query_len, dtype=dtype)
    assert_close(case.attend("fused"), case)


@on_a_cpu
@pytest.mark.parametrize(
    ("tuning", "expected"),
    [(TUNING, [("split", [2, 4, 1]), ("merge", [4, 1, 1])]), (WHOLE, [("split", [2, 1, 1])])],
    ids=["joined", "whole"],
)
def test_launches(attend, emulator, tuning, expected):
    emulator.launches.clear()
    attend(Case([100], heads=(4, 2), head_dim=128), tuning)
    assert emulator.launches == expected


CUDA_WORDS = ["blockIdx", "threadIdx", "__shared__", "__syncthreads", "__half", "asm", "_sync("]


@pytest.mark.parametrize("body", sorted(kernels.INPUTS.keys() - {"tensor"}))
def test_metal_text(body):
    constants = (("D", 64), ("WARPS", 4), ("T", "Float16"))
    header, text = kernels.source(body, "metal", constants)
    assert not [word for word in CUDA_WORDS if word in header + text]
    assert "//" not in header + text
    assert header.endswith("#define D 64\n#define WARPS 4\n#define T Float16\n")
    # MLX adds the attributes it finds in the text, and shapes, strides and ranks if it finds those.
    for attribute in ("threadgroup_position_in_grid", "thread_position_in_threadgroup"):
        assert attribute in text
    for name in kernels.INPUTS[body]:
        assert name == "after" or re.search(rf"\b{name}\b", text)
        asked = re.findall(rf"\b{name}_(?:shape|strides|ndim)\b", text)
        assert set(asked) <= {"block_tables_shape"}
    # Of fewer than 8 elements an input is `constant`, else `device`: what may be small is never
    # named by a pointer of one kind.
    small = "block_tables|plan|sinks|slopes|new_keys|new_values|slots|copies|after"
    assert not re.search(rf"(device|constant)[^;]*\*\s*\w+\s*=\s*({small})", text)


def test_small_inputs_are_constant():
    made = signature("f", ["a", "b"], [(mx.float16, 8), (mx.int32, 7)], {"outputs": mx.float32}, "")
    assert (
        made
        == "void f(const device half* a, const constant int* b, device float* outputs) {\n\n}\n"
    )


def test_a_cuda_kernel_is_a_translation_unit_by_itself():
    constants = (("D", 64), ("WARPS", 4), ("T", "Float16"))
    inputs, outputs = ("keys", "block_tables", "plan", "after"), ("gathered_keys", "done")
    made = kernels.CudaKernel("gather", constants, inputs, outputs, ("length", "tile"))
    text = made.text([mx.uint32, mx.int32, mx.int32, mx.bfloat16], [mx.float16, mx.float32])
    assert (
        'extern "C" __global__ void __launch_bounds__(WARPS * 32) pagedkv_gather('
        "const unsigned* keys, const int* block_tables, const int* plan, "
        "const __nv_bfloat16* after, __half* gathered_keys, float* done, const int length, "
        "const int tile, const int max_blocks) {\n"
        "const int group_x = blockIdx.x"
    ) in text
    assert (
        text.index("#include <cuda_fp16.h>") < text.index("#define D 64\n") < text.index("extern")
    )
    assert "mlx" not in text
    other = kernels.CudaKernel("copy", (("D", 64),), ("keys", "copies"), ("outputs",))
    assert "max_blocks" not in other.text([mx.float32, mx.int32], [mx.float32])


REFUSED = {
    "query tokens": ((1, 8, 9, 64), (4, 16, 2, 64), "9 query tokens"),
    "query heads": ((1, 34, 1, 64), (4, 16, 2, 64), "17 query heads a KV head"),
    "small blocks": ((1, 8, 1, 64), (4, 4, 2, 64), r"block size 4 \(it takes 8 to 128\)"),
    "large blocks": ((1, 8, 1, 64), (4, 256, 2, 64), "block size 256"),
    "slots": ((1, 8, 1, 64), (2**24, 128, 2, 64), "2147483648 slots"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    queries, keys, message = REFUSED[name]
    assert re.match(message, fused.refusal(queries, keys))


def test_every_block_of_a_pool_at_the_limit_is_taken():
    assert fused.refusal((1, 8, 1, 64), (2**24 - 1, 128, 2, 64)) is None


@on_a_cpu
@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -2.5, 65504.0, 1e-7, 6e-8, 0.1, math.inf])
def test_emulated_float16_rounds_as_numpy(emulator, x):
    """A kernel's output in float16 is what float16 would be, at the edges too."""
    text = (
        "outputs[threadgroup_position_in_grid.x + thread_position_in_threadgroup.x] = half(x[0]);"
    )
    inputs = [mx.array([x], dtype=mx.float32)]
    (out,) = emulator.run("", text, ["x"], inputs, {"outputs": mx.float16}, [(32,)], [1, 1, 1], 32)
    expected = np.full(32, x, np.float32).astype(np.float16)
    assert np.array(out).tobytes() == expected.tobytes()


@on_a_cpu
def test_threads_that_wait_at_different_places_are_told_of(emulator):
    """The next kernel does not go on where they are."""

    def run(text):
        place = "threadgroup_position_in_grid.x + thread_position_in_threadgroup.x"
        inputs, outputs = [mx.zeros(8)], {"outputs": mx.float32}
        text = f"const int at = {place};\n{text}"
        return emulator.run("", text, ["x"], inputs, outputs, [(32,)], [1, 1, 1], 32)

    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(AssertionError, match="different places"):
        run(f"if (at == 0) {barrier}")
    (out,) = run(f"{barrier}\noutputs[at] = at;")
    assert out.tolist() == list(range(32))
