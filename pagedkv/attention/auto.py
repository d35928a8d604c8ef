"""What "auto" is: the table's path where somebody has measured, else what is found out here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.findings import kind_of
from pagedkv.attention.inputs import Call, gpu_name
from pagedkv.attention.measured import Trial, find
from pagedkv.attention.paths import DECODE_PATHS, KNOWN_GPUS, choose, refusal
from pagedkv.attention.scores import ScoreOptions

AUTOTUNE = "PAGEDKV_AUTOTUNE"  # environment variable: whether to measure what nobody has measured
KERNEL = "fused"
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

    On a GPU that nobody has measured, the first call of a kind is measured; see `find` for what
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

    def own_blocks(dtype: mx.Dtype) -> list[mx.array]:
        return [mx.take(pool, tables.reshape(-1), axis=0).astype(dtype) for pool in pools]

    def attend(name: str) -> Callable[[], mx.array]:
        path = DECODE_PATHS[name]
        prepared = cache(lambda: path.prepare(batch, call, scores))
        return lambda: path.attend(*arrays, prepared(), scores)

    def exact() -> mx.array:
        """Gather in float32."""
        gather = DECODE_PATHS[rivals[1]]
        keys, values = own_blocks(mx.float32)
        shape, dtype = keys.shape, mx.float32
        exactly = call._replace(
            keys=shape, values=shape, dtype=dtype, keys_dtype=dtype, values_dtype=dtype
        )
        prepared = gather.prepare(own, exactly, scores)
        return gather.attend(queries.astype(mx.float32), keys, values, prepared, scores)

    def written() -> mx.array:
        """Let the kernel write the queries' own K and V into copies that lack them."""
        query_len, size = call.queries[2], batch.block_size
        positions = batch.lens[:, None] + np.arange(-query_len, 0)
        rows = np.arange(len(positions))[:, None] * tables.shape[1]
        slots = mx.array(((rows + positions // size) * size + positions % size).astype(np.int32))
        whole, new, lacking = own_blocks(call.dtype), [], []
        for pool in whole:
            flat = pool.reshape(-1, *pool.shape[2:])
            new.append(mx.contiguous(flat[slots].swapaxes(1, 2)))
            flat[slots] = mx.array(0, call.dtype)
            lacking.append(mx.contiguous(flat.reshape(pool.shape)))
        mx.eval(new, lacking)
        shape = whole[0].shape
        prepared = kernel.prepare(own, call._replace(keys=shape, values=shape), scores)
        out = kernel.attend(queries, *lacking, prepared, scores, None, tuple(new))
        mx.eval(out)
        if not all(
            mx.array_equal(a, b, equal_nan=True).item() for a, b in zip(lacking, whole, strict=True)
        ):
            raise ValueError("expected just the new tokens to be written, got other contents")
        return out

    calls = {name: attend(name) for name in rivals}
    return Trial(calls, exact, inputs, written if kernel.writes else None)
