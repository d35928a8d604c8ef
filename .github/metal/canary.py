"""Check that this machine's GPU does what the package's kernels need; exit 1 if not.

A workload can leave the virtual GPU of a hosted Mac in a state in which no kernel compiles, in this
process or a later one: then the machine is broken, not the kernel.
"""

import sys
import time

import mlx.core as mx
import numpy as np

SIZE = 64  # two SIMD groups
ERRORS = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1.6e-1}  # relative, of SDPA, at most


def launch(text, dtype, **inputs):
    """Run a kernel of one thread an element."""
    # A new text each time: Metal keeps what it has compiled, also for later processes.
    place = f"threadgroup_position_in_grid.x * {SIZE} + thread_position_in_threadgroup.x"
    text = f"const uint i = {place};\n{text}\n// {time.time_ns()}\n"
    name, names = f"canary_{'_'.join(inputs)}_{time.time_ns()}", [*inputs]
    kernel = mx.fast.metal_kernel(name=name, input_names=names, output_names=["out"], source=text)
    grid = {"grid": (SIZE, 1, 1), "threadgroup": (SIZE, 1, 1)}
    made = {"output_shapes": [(SIZE,)], "output_dtypes": [dtype]}
    return kernel(inputs=[*inputs.values()], **grid, **made)[0]


def normal(*shape, dtype=mx.float32):
    """Return random numbers, as the device has them and in float64."""
    made = mx.array(np.random.default_rng(0).standard_normal(shape, np.float32)).astype(dtype)
    return made, np.array(made.astype(mx.float32), np.float64)


def error(out, right):
    """Return the relative error of an array."""
    return np.linalg.norm(np.array(out.astype(mx.float32)) - right) / np.linalg.norm(right)


def matmul():
    """Multiply two matrices with MLX's own kernel."""
    array, numbers = normal(SIZE, SIZE)
    return error(array @ array, numbers @ numbers) < 1e-3


def simd_shuffle_xor():
    """Exchange numbers between the lanes of a SIMD group."""
    array, numbers = normal(SIZE)
    out = launch("out[i] = simd_shuffle_xor(x[i], ushort(8));", mx.float32, x=array)
    return np.array_equal(np.array(out), numbers[np.arange(SIZE) ^ 8])


def bfloat16():
    """Read and write bfloat16 in a kernel."""
    array, numbers = normal(SIZE, dtype=mx.bfloat16)
    out = launch("out[i] = bfloat16_t(2.0f * float(x[i]));", mx.bfloat16, x=array)
    return error(out, 2 * numbers) == 0


def write_through_an_input():
    """Write into an input's buffer; a kernel that takes the writer's output reads it."""
    pool, (new, numbers) = mx.zeros(SIZE), normal(SIZE)
    mx.eval(pool)
    text = "((device float*)pool)[i] = new_values[i]; out[i] = 0.0f;"
    done = launch(text, mx.float32, pool=pool, new_values=new)
    out = launch("out[i] = pool[i] + done[i];", mx.float32, pool=pool, done=done)
    return np.array_equal(np.array(out), numbers)


def sdpa():
    """Attend with MLX's own kernel."""
    found = {}
    for dtype in ERRORS:
        array, numbers = normal(500, 128, dtype=dtype)
        one = array[None, None]
        out = mx.fast.scaled_dot_product_attention(one[:, :, :1], one, one, scale=0.1)
        weights = np.exp(0.1 * numbers @ numbers[0])
        found[dtype] = error(out[0, 0, 0], weights / weights.sum() @ numbers)
    print("relative error of SDPA:", {str(dtype): f"{e:.1e}" for dtype, e in found.items()})
    return all(e < ERRORS[dtype] for dtype, e in found.items())


def problems():
    """Return what is wrong with this machine, a line each."""
    device = mx.default_device()
    if device.type != mx.gpu:
        return [f"expected a GPU as the default device, got {device}"]
    found = []
    for check in (matmul, simd_shuffle_xor, bfloat16, write_through_an_input, sdpa):
        try:
            if not check():
                found.append(f"{check.__name__}: wrong numbers")
        except Exception as failure:  # a machine on which MLX raises is broken, whatever it raises
            found.append(f"{check.__name__}: {' '.join(str(failure).split())[:200]}")
    return found


if __name__ == "__main__":
    print(f"{mx.device_info()}, MLX {mx.__version__}")
    wrong = problems()
    print("; ".join(wrong) or "alive")
    sys.exit(bool(wrong))
