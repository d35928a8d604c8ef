"""The kernels' sources, loaded for a backend: one algorithm, a dialect for each.

``split.h`` and ``merge.h`` attend, ``write.h`` and ``copy.h`` move what a pool holds: bodies of
kernels in what C++ and Metal's language have in common. ``cuda.h`` and ``metal.h`` give them vector
loads, shuffles and barriers, ``codes.h`` what makes codes of K and V where a pool has few bits.
``tensor.h`` is for CUDA alone: ``split.h`` over codes, on its matrix units.

MLX takes a kernel's inputs for constant. Those that write into a pool do it all the same, which is
sound while whoever reads or writes the pool next takes an output of the last one who did as an
input; `pagedkv.cache.in_place` sees to that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

FOLDER = Path(__file__).parent
# What opens a kernel's body: a thread's place in the grid.
PLACE: Mapping[str, str] = {
    "cuda": "const int group_x = blockIdx.x, group_y = blockIdx.y, thread_id = threadIdx.x;",
    "metal": "const int group_x = threadgroup_position_in_grid.x;\n"
    "const int group_y = threadgroup_position_in_grid.y;\n"
    "const int thread_id = thread_position_in_threadgroup.x;",
}

BITS = "KEY_BITS", "VALUE_BITS"  # of a code; 0: numbers as they are
Constants = tuple[tuple[str, int | str], ...]


@cache
def source(body: str, backend: str, constants: Constants) -> tuple[str, str]:
    """Compose a kernel's text.

    Parameters
    ----------
    body : str
        Name of an algorithm, a key of `INPUTS`.
    backend : str
        ``"cuda"`` or ``"metal"``: whose dialect.
    constants : tuple of (str, int or str)
        Compile-time constants by name; a string is the name of a type.

    Returns
    -------
    tuple of (str, str)
        Header and body.
    """
    files = [FOLDER / f"{name}.h" for name in (backend, "codes", body)]
    header, codes, text = (_without_comments(file.read_text()) for file in files)
    if not any(value for name, value in constants if name in BITS):
        codes = ""
    if backend == "cuda":
        # MLX hashes the whole text each time a call is evaluated, so it is kept short. The digest
        # stands for the files' contents, by which MLX finds what it has compiled before.
        digest = hashlib.sha256((header + codes + text).encode()).hexdigest()
        # MLX passes shapes that it finds named here; it does not look into files.
        shapes = " ".join(sorted(set(re.findall(r"\w+_shape\b", text))))
        header = f'#include "{files[0]}"\n'
        codes = codes and f'#include "{files[1]}"\n'
        text = f'#include "{files[2]}"\n// {digest} {shapes}\n'
    defines = "".join(f"#define {name} {value}\n" for name, value in constants)
    return header + defines + codes, f"{PLACE[backend]}\n{text}"


def _without_comments(text: str) -> str:
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


_ATTENDS = "queries", "keys", "values", "block_tables", "plan"
INPUTS: Mapping[str, tuple[str, ...]] = {
    "split": _ATTENDS,
    "tensor": _ATTENDS,
    "merge": ("partials", "spans"),
    "write": ("keys", "values", "new_keys", "new_values", "slots", "after"),
    "copy": ("keys", "values", "copies", "after"),
}


@cache
def kernel(
    body: str, backend: str, constants: Constants, extra: tuple[str, ...] = ()
) -> Callable[..., list[mx.array]]:
    """Return a kernel for a backend, compiled by MLX when it is first evaluated.

    Parameters
    ----------
    body : str
        Name of an algorithm, a key of `INPUTS`.
    backend : str
        ``"cuda"`` or ``"metal"``.
    constants : tuple of (str, int or str)
        Compile-time constants by name.
    extra : tuple of str
        Names of inputs that only these constants have a use for.

    Returns
    -------
    callable
        Takes inputs, grid, threadgroup, output_shapes and output_dtypes; returns [output], lazy.
    """
    header, text = source(body, backend, constants)
    variant = "_".join(str(value) for _, value in constants)
    arguments: dict[str, Any] = {
        "name": f"pagedkv_{body}_{variant}",
        "input_names": [*INPUTS[body], *extra],
        "output_names": ["outputs"],
        "header": header,
        "source": text,
    }
    make: Any = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel
    made: Callable[..., list[mx.array]] = make(**arguments)
    return made
