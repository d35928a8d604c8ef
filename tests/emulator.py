"""Run the kernels' Metal text on a CPU: a C++ compiler in the place of Metal's."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from pagedkv import kernels

COMPILER = shutil.which("c++")
HERE = Path(__file__).parent
NAMES = {
    mx.float16: "half",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.int32: "int",
    mx.uint32: "uint",
}
DTYPES = {"float16": mx.float16}  # of NumPy arrays
ATTRIBUTES = ("threadgroup_position_in_grid", "thread_position_in_threadgroup")


def signature(name, inputs, dtypes_and_sizes, outputs, text):
    """The function MLX writes around a Metal kernel's text; small inputs are `constant`.

    `outputs` are dtypes by name.
    """
    arguments = []
    for argument, (dtype, size) in zip(inputs, dtypes_and_sizes, strict=True):
        space = "constant" if size < 8 else "device"
        arguments.append(f"const {space} {NAMES[dtype]}* {argument}")
        if f"{argument}_shape" in text:
            arguments.append(f"const constant int* {argument}_shape")
    arguments += [f"device {NAMES[dtype]}* {output}" for output, dtype in outputs.items()]
    arguments += [f"uint3 {attribute}" for attribute in ATTRIBUTES if attribute in text]
    return f"void {name}({', '.join(arguments)}) {{\n{text}\n}}\n"


def program(header, text, inputs, dtypes_and_sizes, outputs):
    """A translation unit with a C function that a thread of a group runs."""
    casts = []
    for argument, (dtype, _) in zip(inputs, dtypes_and_sizes, strict=True):
        casts.append(f"(const {NAMES[dtype]}*)buffers[{len(casts)}]")
        if f"{argument}_shape" in text:
            casts.append(f"(const int*)buffers[{len(casts)}]")
    for dtype in outputs.values():
        casts.append(f"({NAMES[dtype]}*)buffers[{len(casts)}]")
    return f"""#include "{HERE / "metal_on_cpu.h"}"
{header}
{signature("kernel_text", inputs, dtypes_and_sizes, outputs, text)}
extern "C" void kernel(void** buffers, uint3 group, uint3 thread_of_group) {{
  kernel_text({", ".join(casts)}, group, thread_of_group);
}}
"""


def build(source, made, *libraries):
    """Compile a file into a shared library that uses others, and return its path.

    Most kernels run once: optimizing takes longer than it saves.
    """
    options = ["-std=c++17", "-O0", "-w", "-fPIC", "-shared", "-fno-strict-aliasing"]
    command = [COMPILER, *options, source, *libraries, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


class Emulator:
    """Compiles kernels into a folder and stands in for `pagedkv.kernels.kernel`."""

    def __init__(self, folder):
        self.folder, self.launches, self.seed = folder, [], 0
        self.runtime = build(HERE / "metal_on_cpu.cpp", folder / "metal_on_cpu.so")
        self.launch = ctypes.PyDLL(str(self.runtime)).launch  # one thread at a time: one group
        self.compiled = cache(self.compiled)

    def compiled(self, text):
        """Compile a program, once for each text."""
        path = self.folder / f"kernel{len(list(self.folder.glob('*.cpp')))}.cpp"
        path.write_text(text)
        return ctypes.CDLL(str(build(path, path.with_suffix(".so"), self.runtime)))

    def kernel(self, body, backend, constants, extra=(), outputs=("outputs",), scalars=()):
        """Return something to call as what `mx.fast.metal_kernel` returns."""
        header, text = kernels.source(body, "metal", constants, scalars)
        names = [*kernels.INPUTS[body], *extra, *["numbers"] * bool(scalars)]

        def call(*, inputs, grid, threadgroup, output_shapes, output_dtypes, scalars=()):
            if scalars:
                inputs = [*inputs, mx.array([*scalars, *[0] * 8], mx.int32)]
            groups = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
            assert [g * t for g, t in zip(groups, threadgroup, strict=True)] == list(grid)
            self.launches.append((body, groups))
            made = dict(zip(outputs, output_dtypes, strict=True))
            return self.run(
                header, text, names, inputs, made, output_shapes, groups, threadgroup[0]
            )

        return call

    def run(self, header, text, names, inputs, outputs, shapes, groups, threads):
        """Run a kernel's text over a grid of groups and return its outputs."""
        kinds = tuple((DTYPES.get(str(x.dtype), x.dtype), min(x.size, 8)) for x in inputs)
        library = self.compiled(program(header, text, names, kinds, outputs))
        made = [
            poisoned(shape, dtype) for shape, dtype in zip(shapes, outputs.values(), strict=True)
        ]
        buffers = []
        for name, array in zip(names, inputs, strict=True):
            buffers.append(as_numpy(array))
            if f"{name}_shape" in text:
                buffers.append(np.array(array.shape, np.int32))
        buffers += made
        self.seed += 1
        status = self.launch(
            library.kernel,
            (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers)),
            (ctypes.c_int * 3)(*groups),
            threads,
            self.seed,
        )
        assert status == 0, "threads of a group wait for each other at different places"
        return [
            mx.array(out).view(dtype) for out, dtype in zip(made, outputs.values(), strict=True)
        ]


def poisoned(shape, dtype):
    """An array in which what is not written shows."""
    poison = {mx.float16: 0x7E00, mx.bfloat16: 0x7FC0}.get(dtype, 0x7FC00000)
    return np.full(shape, poison, np.uint32 if dtype.size == 4 else np.uint16)


def as_numpy(array):
    """The memory of an array, which a kernel may write; bfloat16 as the uint16 it is."""
    if isinstance(array, np.ndarray):
        return array
    mx.eval(array)  # NumPy would not hear of a failure
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.asarray(array))
