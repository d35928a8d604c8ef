"""How "auto" chooses a path: by the table on measured devices, else by a measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np

from pagedkv.attention import chunk
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.codes import put, take
from pagedkv.attention.findings import kind_of
from pagedkv.attention.inputs import Call, gpu_name
from pagedkv.attention.measured import Trial, find
from pagedkv.attention.paths import DECODE_PATHS, KNOWN_GPUS, choose, refusal
from pagedkv.attention.scores import ScoreOptions

AUTOTUNE = "PAGEDKV_AUTOTUNE"  # environment variable: whether to measure on unmeasured GPUs
KERNEL = "fused"
OFF = 0.1  # of a token's norm: what another code of few bits may change
GATHERS = "gather_rows", "gather_rows_grouped"  # the first that can take a call is trusted

Arrays = tuple[mx.array, mx.array, mx.array]


def auto(
    batch: DecodeBatch,
    call: Call,
    arrays: Arrays,
    scores: ScoreOptions,
    after: mx.array | None = None,
) -> tuple[str, str]:
    """Return the path behind "auto" and where that choice comes from.

    On an unmeasured GPU, the first call of a kind is measured; see `find` for what
    that costs.

    Parameters
    ----------
    batch : DecodeBatch
        The block tables.
    call : Call
        The kind of call, checked.
    arrays : tuple of mx.array
        Queries [B, Hq, Q, D] and the pools [N, S, Hkv, D] of K and V. Read, at most.
    scores : ScoreOptions
        What else happens to the scores.
    after : mx.array, optional
        The pools may be read once it is computed.

    Returns
    -------
    tuple of (str, str)
        A key of `DECODE_PATHS`, and a text for `explain`.

    Raises
    ------
    ValueError
        If PAGEDKV_AUTOTUNE is neither 0 nor 1.

    Warns
    -----
    RuntimeWarning
        As `find`.
    """
    tokens = call.queries[0] * batch.longest
    setting = os.environ.get(AUTOTUNE) or "1"
    if setting not in ("0", "1"):
        raise ValueError(f"expected {AUTOTUNE} to be 0 or 1, got {setting!r}")
    gpu = gpu_name(call.device)
    if gpu is None:
        return choose(call, tokens), "the package's choice"
    if gpu in KNOWN_GPUS:
        return choose(call, tokens), f"the package's table, measured on {gpu} ({KNOWN_GPUS[gpu]})"
    if refusal(KERNEL, call):
        return choose(call, tokens), "the package's choice"
    if setting == "0":
        return choose(call, tokens), f"the package's table, {AUTOTUNE}=0"
    rivals = KERNEL, next(name for name in GATHERS if refusal(name, call) is None)
    inputs = arrays if after is None else (*arrays, after)
    found = find(
        gpu,
        kind_of(call, tokens),
        rivals,
        lambda: _trial(batch, call, arrays, scores, rivals, inputs),
    )
    return found.path or choose(call, tokens), found.because


def _trial(
    batch: DecodeBatch,
    call: Call,
    arrays: Arrays,
    scores: ScoreOptions,
    rivals: tuple[str, str],
    inputs: Sequence[mx.array],
) -> Trial:
    queries, *pools = arrays
    kernel = DECODE_PATHS[KERNEL]
    tables = batch.block_tables
    # The batch's own blocks alone: the pools may be large.
    own = replace(
        batch,
        block_tables=mx.arange(tables.size).reshape(tables.shape),
        num_blocks=tables.size,
    )

    own_pools = [mx.take(pool, tables.reshape(-1), axis=0) for pool in pools]
    head_dim, has_codes = queries.shape[3], any(call.bits)

    def numbers(pool: mx.array, which: int, dtype: mx.Dtype) -> mx.array:
        rows = mx.arange(math.prod(pool.shape[:3]))
        taken = take(pool, rows, head_dim, dtype, is_keys=which == 0).astype(dtype)
        return taken.reshape(*pool.shape[:3], head_dim)

    def attend(name: str) -> Callable[[], mx.array]:
        path = DECODE_PATHS[name]
        prepared = cache(lambda: path.prepare(batch, call, scores))
        return lambda: path.attend(*arrays, prepared(), scores)[0]

    def exact() -> mx.array:
        """Gather in float32, by MLX's own operations."""
        keys, values = (numbers(pool, i, mx.float32) for i, pool in enumerate(own_pools))
        shape, dtype = keys.shape, mx.float32
        exactly = call._replace(
            keys=shape, values=shape, dtype=dtype, keys_dtype=dtype, values_dtype=dtype
        )
        prepared = chunk.make_plan(own, "cpu", exactly, scores, grouped=True)
        return prepared.attend(queries.astype(mx.float32), keys, values, scores)[0]

    def written() -> mx.array:
        """Let the kernel write the queries' own K and V into copies that lack them."""
        query_len, size = call.queries[2], batch.block_size
        positions = batch.lens[:, None] + np.arange(-query_len, 0)
        rows = np.arange(len(positions))[:, None] * tables.shape[1]
        slots = mx.array(((rows + positions // size) * size + positions % size).astype(np.int32))
        new: list[mx.array] = []
        lacking: list[mx.array] = []
        whole: list[mx.array] = []
        for i, pool in enumerate(own_pools):
            tokens = mx.flatten(numbers(pool, i, call.dtype), 0, 1)[slots]  # [B, Q, Hkv, D]
            new.append(mx.contiguous(tokens.swapaxes(1, 2)))
            tokens = mx.flatten(tokens, 0, 1)
            for made, content in ((lacking, mx.zeros_like(tokens)), (whole, tokens)):
                made.append(mx.contiguous(put(pool, slots.reshape(-1), content, is_keys=i == 0)))
        mx.eval(new, lacking, whole)
        small = call._replace(keys=whole[0].shape, values=whole[1].shape)
        prepared = kernel.prepare(own, small, scores)
        out, _ = kernel.attend(queries, *lacking, prepared, scores, None, tuple(new))
        mx.eval(out)
        for i, (pool, wanted) in enumerate(zip(lacking, whole, strict=True)):
            got, expected = (numbers(x, i, mx.float32) for x in (pool, wanted))
            most = OFF if call.bits[i] else 0.0  # a number between two codes may be either
            off = mx.linalg.norm(got - expected, axis=-1) > most * mx.linalg.norm(expected, axis=-1)
            if off.any().item() or not mx.array_equal(mx.isnan(got), mx.isnan(expected)).item():
                raise ValueError("expected just the new tokens to be written, got other contents")
        if has_codes:  # of numbers that codes stood for: others, by a little
            gather = DECODE_PATHS[rivals[1]]
            prepared = gather.prepare(own, small, scores)
            right, _ = gather.attend(queries, *whole, prepared, scores)
            if not (mx.linalg.norm(out - right) <= OFF * mx.linalg.norm(right)).item():
                raise ValueError("expected attention over what was written, got another output")
            return calls[KERNEL]()
        return out

    calls = {name: attend(name) for name in rivals}
    return Trial(calls, exact, inputs, written if kernel.writes else None)
