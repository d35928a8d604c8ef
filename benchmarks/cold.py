"""Answers of a process that has just begun and finds no compiled kernel, for `prompt.Cold`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from .common import settle
from .generate import first_token, llama, prompts_of, store_for

COUNTING = """
import mlx.core as mx

called, make = set(), mx.fast.cuda_kernel

def cuda_kernel(*arguments, **options):
    kernel = make(*arguments, **options)

    def call(*arguments, **options):
        called.add(id(kernel))
        return kernel(*arguments, **options)

    return call

mx.fast.cuda_kernel = cuda_kernel
launch = getattr(mx.fast, "precompiled_cuda_kernel", None)

def precompiled_cuda_kernel(*, name, **options):
    called.add(name)
    return launch(name=name, **options)

mx.fast.precompiled_cuda_kernel = precompiled_cuda_kernel
"""
"""Counts the kernels that are called from here on, compiled by MLX or before, in `called`."""

PROCESS = f"""{COUNTING}
import importlib.util, json, sys

folder, asked = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "benchmarks", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from benchmarks.cold import answer

said = answer(**json.loads(asked))
print(json.dumps(dict(said, kernels=len(called))))
"""
"""A process that answers with the package of its path and these benchmarks."""


def answers_of(side, prompt, prompts, answers):
    """Answer prompts over a side in a new process that finds no compiled kernel.

    Parameters
    ----------
    side : str
        "store" or "mlx-lm".
    prompt : int
        Tokens of the first prompt, which is answered with one token.
    prompts, answers : list of int
        Tokens of the others, which are answered in batches, and of their answers.

    Returns
    -------
    dict
        What `answer` does, and how many kernels of the package were called.
    """
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
    with tempfile.TemporaryDirectory() as folder:
        asked = {"side": side, "prompt": prompt, "prompts": prompts, "answers": answers}
        asked["began"] = time.monotonic()
        package = str(Path(__file__).parent)
        # The folder is no checkout, whose package would be another commit's.
        process = subprocess.run(
            [sys.executable, "-c", PROCESS, package, json.dumps(asked)],
            env={**os.environ, "PYTHONPATH": path, "MLX_PTX_CACHE_DIR": folder},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(process.stdout.splitlines()[-1])


def answer(side, began, prompt, prompts, answers):
    """Answer as `answers_of` asks for; return tokens, and seconds since `began`."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache

    model = llama()
    first, *others = prompts_of(model, [prompt, *prompts])
    lengths = [length + answer for length, answer in zip(prompts, answers, strict=True)]
    store = store_for(model, [prompt, *lengths]) if side == "store" else None
    make = store.cache if store else lambda tokens: make_prompt_cache(model)
    said = {"tokens": [[first_token(model, mx.array(first), make(first))]]}
    said["first_token"] = time.monotonic() - began
    generator = BatchGenerator(model)
    uids = generator.insert(others, answers, caches=[make(tokens) for tokens in others])
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    settle()
    said["answers"] = time.monotonic() - began
    said["tokens"] += found.values()
    return said
