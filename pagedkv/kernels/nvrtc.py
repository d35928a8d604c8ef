"""CUDA text made machine code by NVRTC, which MLX brings, and kept where MLX keeps its own.

MLX compiles a custom kernel with headers that take 1.6 s each time, one kernel after the other, and
again in each process (MLX 0.32.4). Without them it is a fraction of that, and several at once.
What MLX is given for machine code it hashes at each launch, 40 kB for some kernels; but first it
looks for a file in its folder. So the code goes into such a file, and MLX is given nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from pagedkv.kernels.files import write_whole

NAMES = "libnvrtc.so.13", "libnvrtc.so.12"


@cache
def _library() -> ctypes.CDLL:
    for name in NAMES:  # MLX has loaded one of them
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise RuntimeError(f"expected one of {', '.join(NAMES)}, which MLX's CUDA backend needs, too")


@cache
def _options() -> tuple[str, ...]:
    """Return NVRTC's options: for the GPU's own machine code, with CUDA's headers."""
    info = mx.device_info()
    major, minor = (int(info[f"compute_capability_{part}"]) for part in ("major", "minor"))
    places = [Path(folder, "nvidia") for folder in sys.path]
    found = [place for root in places for place in root.glob("*/include")]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            found.append(Path(os.environ[name], "include"))
    found.append(Path("/usr/local/cuda/include"))
    headers = [folder for folder in found if (folder / "cuda_fp16.h").is_file()]
    if not headers:
        raise RuntimeError("expected cuda_fp16.h in an nvidia package, $CUDA_HOME or $CUDA_PATH")
    return (
        f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}",
        "--std=c++17",
        "--device-as-default-execution-space",
        f"--include-path={headers[0]}",
    )


def kept(text: str, symbol: str) -> tuple[str, bytes]:
    """Compile a CUDA text for the default device, if no process has; return what MLX is given.

    May be called by several threads at once.

    Parameters
    ----------
    text : str
        A translation unit.
    symbol : str
        Its kernel, ``extern "C"``.

    Returns
    -------
    tuple of (str, bytes)
        A name that stands for the text, NVRTC's version and its options, and the machine code:
        empty if MLX finds it by the name.

    Raises
    ------
    RuntimeError
        If NVRTC refuses the text, with what it says; or if NVRTC or CUDA's headers are missing.
    """
    name = _name(text, symbol)
    form = _form()
    if form is None:
        return name, _compile(text)
    file = folder() / f"{form.format(name)}.ptx"
    if not (file.is_file() and file.with_suffix(".txt").is_file()):
        code = _compile(text)
        if not _keep(file, code, name, symbol):
            return name, code
    return name, b""


def folder() -> Path:
    """Return where MLX keeps what it compiles."""
    own = os.environ.get("MLX_PTX_CACHE_DIR")
    if own:
        return Path(own)
    return Path(tempfile.gettempdir(), "mlx", vars(mx)["__version__"], "ptx")


def _name(text: str, symbol: str) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    what = repr((text, _options(), major.value, minor.value))
    return f"{symbol}_{hashlib.sha256(what.encode()).hexdigest()[:32]}"


PROBE = 'extern "C" __global__ void pagedkv_probe(float* output) { output[threadIdx.x] = 1; }'
# How MLX may call the file of a kernel whose machine code is an empty string, which it hashes.
FORMS = "{}_553e93901e462a6e", "{}_6142509188972423790"


@cache
def _form() -> str | None:
    """Return how MLX calls a kernel's file; None if it does not find any of ours."""
    code = _compile(PROBE)
    for form in FORMS:
        name = f"pagedkv_probe_{os.getpid()}_{len(form)}"
        file = folder() / f"{form.format(name)}.ptx"
        try:
            if _keep(file, code, name, "pagedkv_probe"):
                mx.eval(launch(name, b"", [], [], (8, 1, 1), (8, 1, 1), [(8,)], [mx.float32]))
                return form
        except Exception:  # MLX found nothing, and tells that by an error of its own
            continue
        finally:
            with suppress(OSError):
                for suffix in (".ptx", ".txt"):
                    file.with_suffix(suffix).unlink(missing_ok=True)
    return None


def launch(
    name: str,
    code: bytes,
    inputs: list[mx.array],
    scalars: list[int],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: list[tuple[int, ...]],
    output_dtypes: list[mx.Dtype],
) -> list[mx.array]:
    """Launch what `kept` returned, lazily; the arrays are the kernel's first arguments."""
    made: Any = mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=code,
        inputs=inputs,
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
        scalars=scalars,
        grid=grid,
        threadgroup=threadgroup,
        ensure_row_contiguous=True,
    )
    return made  # type: ignore[no-any-return]


def _keep(file: Path, code: bytes, name: str, symbol: str) -> bool:
    """Write a kernel's files as MLX reads them, each whole or not at all; False if that fails."""
    try:
        write_whole(file.with_suffix(".txt"), f"{name}\t{symbol}\n".encode())
        write_whole(file, code)  # last: MLX looks for it first
    except OSError:
        return False
    return True


def _compile(text: str) -> bytes:
    library, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()

    def fetched(kind: str) -> bytes:
        getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw

    options = [option.encode() for option in _options()]
    arguments = (ctypes.c_char_p * len(options))(*options)
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"pagedkv.cu", 0, None, None
    )
    if status:
        raise RuntimeError(f"NVRTC did not begin: status {status}")
    try:
        if library.nvrtcCompileProgram(program, len(options), arguments):
            said = fetched("ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"NVRTC refused a kernel: {said}")
        return fetched("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
