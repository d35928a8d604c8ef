"""The kernels' Metal text against a compiler with address spaces, const and overloads as Metal's.

The emulator runs the text as C++, which knows one kind of pointer. Metal's own compiler has not
seen it: there was no Mac.
"""

import itertools
import random
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from emulator import signature

from pagedkv import kernels
from pagedkv.attention.chunk import SCALARS

CLANG = shutil.which("clang") or shutil.which("clang-14")
HERE = Path(__file__).parent
OPTIONS = "-x clcpp -cl-std=CLC++ -target spir64 -Xclang -finclude-default-header -fsyntax-only"
FORMATS = [(0, 0), (8, 8), (4, 4), (8, 4), (0, 4)]  # bits of K and V
TYPES = {"Float16": mx.float16, "BFloat16": mx.bfloat16, "Float32": mx.float32}


def compiles(text, tmp_path):
    """Whether clang takes a translation unit, and what it says."""
    path = tmp_path / "kernel.cl"
    path.write_text(text)
    done = subprocess.run([CLANG, *OPTIONS.split(), str(path)], capture_output=True, text=True)
    return done.returncode == 0, done.stderr


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    empty = "__kernel void nothing() {}\n"
    if CLANG is None or not compiles(empty, folder)[0]:
        pytest.skip("no clang with C++ for OpenCL")


def unit(
    body,
    constants,
    extra=(),
    *,
    text=lambda text: text,
    small=0,
    outputs=("outputs",),
    scalars=(),
):
    """A kernel as MLX would write it around the text; `small` inputs come as `constant`."""
    header, source = kernels.source(body, "metal", constants, scalars)
    of = dict(constants)
    kinds = {"partials": mx.float32, "slopes": mx.float32, "sinks": mx.float32}
    bits = zip(("keys", "values"), kernels.BITS, strict=True)
    kinds |= {pool: mx.uint32 for pool, name in bits if of.get(name)}
    integers = ("block_tables", "plan", "spans", "slots", "copies", "numbers")
    names = [*kernels.INPUTS[body], *extra, *["numbers"] * bool(scalars)]
    inputs = [
        (mx.int32 if name in integers else kinds.get(name, TYPES[of["T"]]), 1 if small else 8)
        if name not in ("keys", "values", "queries", "partials", "new_keys", "new_values")
        else (kinds.get(name, TYPES[of["T"]]), 8)
        for name in names
    ]
    out = TYPES[of.get("OUT", of["T"])]
    written = signature("kernel_text", names, inputs, dict.fromkeys(outputs, out), text(source))
    return f'#include "{HERE / "metal_types.h"}"\n{header}\n__kernel {written}'


def variants(number):
    """Constants of `split` as plans choose them, at random."""
    rng = random.Random(61)
    for _ in range(number):
        head_dim = rng.choice([64, 80, 96, 128, 256])
        lanes = 1 << (-(-head_dim // 8) - 1).bit_length()
        group, query_len = rng.choice([1, 2, 4, 7, 16]), rng.choice([1, 2, 8])
        rows = min(8, 1 << (group * query_len - 1).bit_length())
        name, divided = rng.choice(list(TYPES)), rng.random() < 0.5
        flags = {flag: int(rng.random() < 0.4) for flag in ("SOFTCAP", "WINDOW", "ALIBI")}
        sinks = int(rng.random() < 0.4 and not divided)
        write = int(rng.random() < 0.6)
        constants = {
            **{"D": head_dim, "HKV": rng.choice([1, 8]), "G": group, "Q": query_len},
            **{"BLOCK_SIZE": rng.choice([8, 24, 32, 128]), "R": rows},
            **{"CHUNKS": -(-group * query_len // rows)},
            **{"TOKENS": min(lanes // rows, 8 if rows <= 2 else 4), "LANES": lanes},
            **{"LOG2_LANES": lanes.bit_length() - 1, "WARPS": rng.choice([4, 8, 16])},
            **dict(zip(kernels.BITS, rng.choice(FORMATS), strict=True)),
            **{"T": name, "SPLIT": int(divided), **flags, "SINKS": sinks},
            **{"OUT": "Float32" if divided else name, "WRITE": write},
        }
        extra = ["new_keys", "new_values"] * write + ["after"] * rng.choice([0, 1])
        extra += ["slopes"] * flags["ALIBI"] + ["sinks"] * sinks
        yield tuple(constants.items()), tuple(extra), rng.randrange(2)


def test_every_variant_of_attention(tmp_path):
    for constants, extra, small in variants(60):
        right, said = compiles(
            unit("split", constants, extra, small=small, scalars=("advance",)), tmp_path
        )
        assert right, f"{constants}: {said}"


@pytest.mark.parametrize("has_base", [0, 1])
def test_small_arrays(has_base, tmp_path):
    given = tuple(f"given{number}" for number in range(16))
    every = "GIVEN(given0, given1)" if has_base else "GIVEN(0, given0)"
    constants = (("WARPS", 8), ("BASE", has_base), ("EVERY_GIVEN", every), ("T", "Float32"))
    extra = ("base",) * has_base
    made = unit("patch", constants, extra, scalars=("size", *given))
    right, said = compiles(made, tmp_path)
    assert right, said


@pytest.mark.parametrize("body", ["merge", "write", "copy"])
def test_the_other_kernels(body, tmp_path):
    for name, sinks, small, bits in itertools.product(TYPES, (0, 1), (0, 1), FORMATS):
        sizes = (("D", 80), ("HKV", 2), ("G", 4), ("Q", 2), ("BLOCK_SIZE", 16), ("WARPS", 8))
        parts = (("KEY_PART", 160), ("VALUE_PART", 42), ("LANES", 16))
        parts += tuple(zip(kernels.BITS, bits, strict=True))
        constants = (*sizes, *parts, ("SINKS", sinks), ("T", name), ("OUT", name))
        extra = ("sinks",) if sinks and body == "merge" else ()
        right, said = compiles(unit(body, constants, extra, small=small), tmp_path)
        assert right, f"{name}: {said}"


def test_gathering(tmp_path):
    outputs = "gathered_keys", "gathered_values", "done", "gathered_queries"
    for name, bits, write, small in itertools.product(TYPES, FORMATS, (0, 1), (0, 1)):
        vector = 4 if name == "Float32" else 8
        sizes = (("D", 80), ("HKV", 2), ("HQ", 8), ("BLOCK_SIZE", 16), ("TOKENS", 16))
        constants = (
            ("WARPS", 16),
            *sizes,
            ("VECTOR", vector if any(bits) or small else 1),
            ("LANES", 16),
            *zip(kernels.BITS, bits, strict=True),
            *(("T", name), ("WRITE", write), ("QUERIES", 1 - small), ("SPANS", small)),
        )
        extra = (*["new_keys", "new_values"] * write, "after", "spans" if small else "queries")
        given = {"outputs": outputs[: 4 - small], "scalars": SCALARS}
        made = unit("gather", constants, extra, small=small, **given)
        right, said = compiles(made, tmp_path)
        assert right, f"{constants}: {said}"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("writable(keys)[to]", "keys[to]"),  # const
        ("auto item = plan", "device const int* item = plan"),  # where `plan` is constant
        ("unpack(load(queries", "unpack(load((thread const T*)0 + (queries - queries)"),
    ],
)
def test_what_metal_would_refuse_is_refused(right, wrong, tmp_path):
    constants, extra, _ = next(
        made for made in variants(60) if dict(made[0])["WRITE"] and not dict(made[0])["KEY_BITS"]
    )
    given = {"small": 1, "scalars": ("advance",)}
    broken = unit("split", constants, extra, text=lambda t: t.replace(right, wrong), **given)
    assert broken != unit("split", constants, extra, **given)
    assert not compiles(broken, tmp_path)[0]
    assert compiles(unit("split", constants, extra, **given), tmp_path)[0]
