"""The kernels' sources, loaded for a backend: one algorithm, a dialect for each.

``split.h`` and ``merge.h`` attend; ``gather.h``, ``write.h`` and ``copy.h`` move what a pool holds:
bodies of kernels in what C++ and Metal's language have in common. ``cuda.h`` and ``metal.h`` give
them vector loads, shuffles and barriers, ``codes.h`` what makes codes of K and V where a pool has
few bits. ``tensor.h`` is for CUDA alone: ``split.h`` over codes, on its matrix units.

MLX takes a kernel's inputs for constant. Those that write into a pool do it all the same, which is
sound as long as each read or write of the pool takes an output of the previous one as an input;
`pagedkv.cache.in_place` ensures that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.kernels import nvrtc

FOLDER = Path(__file__).parent
# What opens a kernel's body: a thread's place in the grid.
PLACE: Mapping[str, str] = {
    "cuda": "const int group_x = blockIdx.x, group_y = blockIdx.y, thread_id = threadIdx.x;",
    "metal": "const int group_x = threadgroup_position_in_grid.x;\n"
    "const int group_y = threadgroup_position_in_grid.y;\n"
    "const int thread_id = thread_position_in_threadgroup.x;",
}
# Blocks that a table has room for: MLX tells on Metal, and on CUDA it is an argument.
COLUMNS = "const int max_blocks = block_tables_shape[1];"

BITS = "KEY_BITS", "VALUE_BITS"  # of a code; 0: numbers as they are
Constants = tuple[tuple[str, int | str], ...]


@cache
def source(
    body: str, backend: str, constants: Constants, scalars: tuple[str, ...] = ()
) -> tuple[str, str]:
    """Compose a kernel's text.

    Parameters
    ----------
    body : str
        Name of an algorithm, a key of `INPUTS`.
    backend : str
        The dialect, ``"cuda"`` or ``"metal"``.
    constants : tuple of (str, int or str)
        Compile-time constants by name; a string is the name of a type.
    scalars : tuple of str
        Names of integers that a launch is given: arguments on CUDA, elements of ``numbers`` on
        Metal.

    Returns
    -------
    tuple of (str, str)
        Header and body.
    """
    files = [FOLDER / f"{name}.h" for name in (backend, "codes", body)]
    header, codes, text = (_without_comments(file.read_text()) for file in files)
    if not any(value for name, value in constants if name in BITS):
        codes = ""
    defines = "".join(f"#define {name} {value}\n" for name, value in constants)
    given = ""
    if backend == "metal":
        given = f"{COLUMNS}\n" if "max_blocks" in text else ""
        for place, name in enumerate(scalars):
            given += f"const int {name} = numbers[{place}];\n"
    return header + defines + codes, f"{PLACE[backend]}\n{given}{text}"


def _without_comments(text: str) -> str:
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


_ATTENDS = "queries", "keys", "values", "block_tables", "plan"
INPUTS: Mapping[str, tuple[str, ...]] = {
    "split": _ATTENDS,
    "gather": ("keys", "values", "block_tables"),
    "tensor": _ATTENDS,
    "merge": ("partials", "spans"),
    "write": ("keys", "values", "new_keys", "new_values", "slots", "after"),
    "copy": ("keys", "values", "copies", "after"),
    "patch": (),
}


_CTYPES = {
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.int32: "int",
    mx.uint32: "unsigned",
}


class CudaKernel:
    """A kernel for CUDA: a text, and once the dtypes of its arrays are known its machine code.

    It is called with inputs, grid, threadgroup, output_shapes and output_dtypes, and returns the
    outputs, lazy. The dtypes follow from the constants, so that they are the same each time.
    """

    def __init__(
        self,
        body: str,
        constants: Constants,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        scalars: tuple[str, ...] = (),
    ) -> None:
        self._body, self._constants = body, constants
        self._inputs, self._outputs, self._scalars = inputs, outputs, scalars
        self._tables = inputs.index("block_tables") if "block_tables" in inputs else None
        self._kept: tuple[str, bytes] | None = None
        self._symbol = f"pagedkv_{body}"

    def text(self, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype]) -> str:
        """Return the translation unit for arrays of such dtypes."""
        header, text = source(self._body, "cuda", self._constants)
        arguments = [
            f"const {_CTYPES[dtype]}* {name}"
            for name, dtype in zip(self._inputs, inputs, strict=True)
        ]
        made = zip(self._outputs, outputs, strict=True)
        arguments += [f"{_CTYPES[dtype]}* {name}" for name, dtype in made]
        columns = () if self._tables is None else ("max_blocks",)
        arguments += [f"const int {name}" for name in (*self._scalars, *columns)]
        bounds = "__launch_bounds__(WARPS * 32)"
        signature = f'extern "C" __global__ void {bounds} {self._symbol}({", ".join(arguments)})'
        return f"{header}\n{signature} {{\n{text}}}\n"

    def prepare(self, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype]) -> None:
        """Compile it for arrays of such dtypes."""
        self._kept = nvrtc.kept(self.text(inputs, outputs), self._symbol)

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        scalars: Sequence[int] = (),
    ) -> list[mx.array]:
        """Launch it, lazily."""
        if self._kept is None:
            self.prepare([array.dtype for array in inputs], output_dtypes)
            assert self._kept is not None
        given = [*scalars]
        if self._tables is not None:
            given.append(inputs[self._tables].shape[1])
        return nvrtc.launch(
            *self._kept, inputs, given, grid, threadgroup, output_shapes, output_dtypes
        )


@lru_cache(maxsize=64)
def _on_device(scalars: tuple[int, ...]) -> mx.array:
    """Return integers as an array that Metal takes as one of the device's: of 8 at least."""
    return mx.array([*scalars, *[0] * (8 - len(scalars))], mx.int32)


def metal_kernel(
    body: str,
    constants: Constants,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    scalars: tuple[str, ...],
) -> Callable[..., list[mx.array]]:
    """Return a kernel for Metal; see `kernel`."""
    header, text = source(body, "metal", constants, scalars)
    variant = "_".join(str(value) for _, value in constants)
    arguments: dict[str, Any] = {
        "name": f"pagedkv_{body}_{variant}",
        "input_names": [*inputs, *["numbers"] * bool(scalars)],
        "output_names": [*outputs],
        "header": header,
        "source": text,
    }
    made: Any = mx.fast.metal_kernel(**arguments)
    if not scalars:
        return made  # type: ignore[no-any-return]

    def launch(
        *, inputs: list[mx.array], scalars: tuple[int, ...], **launch: Any
    ) -> list[mx.array]:
        return made(inputs=[*inputs, _on_device(scalars)], **launch)  # type: ignore[no-any-return]

    return launch


@cache
def kernel(
    body: str,
    backend: str,
    constants: Constants,
    extra: tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("outputs",),
    scalars: tuple[str, ...] = (),
) -> Callable[..., list[mx.array]]:
    """Return a kernel for a backend, compiled when it is first called.

    Parameters
    ----------
    body : str
        Name of an algorithm, a key of `INPUTS`.
    backend : str
        ``"cuda"`` or ``"metal"``.
    constants : tuple of (str, int or str)
        Compile-time constants by name. The dtypes of all arrays follow from them.
    extra, outputs : tuple of str
        Names of inputs that only these constants have a use for, and of the outputs.
    scalars : tuple of str
        Names of integers that each launch is given.

    Returns
    -------
    callable
        Takes inputs, grid, threadgroup, output_shapes and output_dtypes, and scalars, a tuple, if
        it has some; returns the outputs, lazy.
    """
    inputs = (*INPUTS[body], *extra)
    if backend == "cuda":
        return CudaKernel(body, constants, inputs, outputs, scalars)
    return metal_kernel(body, constants, inputs, outputs, scalars)


class Variants:
    """A kernel as it may be launched: with new tokens to write or without, after something or not.

    Parameters
    ----------
    body, backend, constants, extra, outputs, scalars
        As `kernel` takes them, without what writing and order add.
    """

    def __init__(
        self,
        body: str,
        backend: str,
        constants: Constants,
        extra: tuple[str, ...],
        outputs: tuple[str, ...] = ("outputs",),
        *,
        scalars: tuple[str, ...],
    ) -> None:
        self._of = body, backend, constants, extra, outputs, scalars
        self._made: dict[tuple[bool, bool], Callable[..., list[mx.array]]] = {}

    def __call__(self, writes: bool, ordered: bool) -> Callable[..., list[mx.array]]:
        """Return a variant: ``new_keys``, ``new_values`` and ``after`` come before `extra`."""
        made = self._made.get((writes, ordered))
        if made is None:
            body, backend, constants, extra, outputs, scalars = self._of
            constants = (*constants, ("WRITE", int(writes)))
            new = ("new_keys", "new_values") if writes else ()
            after = ("after",) if ordered else ()
            made = kernel(body, backend, constants, (*new, *after, *extra), outputs, scalars)
            self._made[writes, ordered] = made
        return made


FEW = 16, 128, 512, 960  # integers that are worth a launch of their own, which takes 1023
_WARPS = 8


def array_of(numbers: NDArray[np.int32], backend: str) -> mx.array:
    """Return a small array of int32, flat, on the device.

    MLX on CUDA moves what the host has written by page faults: the first kernel that reads 16
    integers waits 0.1 ms for them (H200, MLX 0.32.4). Arguments of a launch come with it.

    Parameters
    ----------
    numbers : ndarray
        Of any shape.
    backend : str
        ``"cuda"``, ``"metal"`` or ``"cpu"``.
    """
    flat = numbers.ravel()
    if backend != "cuda" or flat.size > FEW[-1]:
        return mx.array(flat)
    return _patch(flat, flat.size, None)


def patched(base: mx.array, places: NDArray[np.int64], numbers: NDArray[np.int32]) -> mx.array:
    """Return a flat array of int32 on a CUDA device with other numbers in some places, a few.

    Parameters
    ----------
    base : mx.array
        What is copied.
    places, numbers : ndarray
        Where, and what is there then, shape [n] each, n at most half of the last of `FEW`.
    """
    return _patch(np.stack([places, numbers], axis=1).ravel(), base.size, base)


def _patch(given: NDArray[np.integer], size: int, base: mx.array | None) -> mx.array:
    count = next(few for few in FEW if given.size <= few)
    threads = _WARPS * 32
    [out] = _patch_kernel(count, base is not None)(
        inputs=[] if base is None else [base],
        grid=(-(-size // threads) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.int32],
        scalars=(size, *given.tolist(), *[-1] * (count - given.size)),
    )
    return out


@cache
def _patch_kernel(count: int, has_base: bool) -> Callable[..., list[mx.array]]:
    names = tuple(f"given{number}" for number in range(count))
    if has_base:
        pairs = zip(names[::2], names[1::2], strict=True)
        every = " ".join(f"GIVEN({place}, {number})" for place, number in pairs)
    else:
        every = " ".join(f"GIVEN({place}, {number})" for place, number in enumerate(names))
    constants = (("WARPS", _WARPS), ("BASE", int(has_base)), ("EVERY_GIVEN", every))
    extra = ("base",) if has_base else ()
    return kernel("patch", "cuda", constants, extra, scalars=("size", *names))
