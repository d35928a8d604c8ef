"""The decode paths: gathers before attention, the fused kernels, and which one `auto` is.

Shapes: B batch, Hq query heads, Hkv KV heads, Q query tokens, D head dim, N blocks in the pool,
S block size, L longest context length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from pagedkv.attention import fused
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.gather import take_blocks, take_rows
from pagedkv.attention.inputs import DTYPES, Layout
from pagedkv.attention.scores import Scores

Shape = tuple[int, ...]
Gather = tuple[DecodeBatch, float]  # what a gather needs of a step: the batch and the scale


@dataclass(frozen=True)
class Call:
    """What decides which paths can run a call, and which one is best.

    Attributes
    ----------
    device : mx.Device
        Where it would run.
    tokens : int
        Sequences of the batch times its longest context length.
    queries, keys : tuple of int
        Shapes [B, Hq, Q, D] and, of the pool, [N, S, Hkv, D].
    dtype : mx.Dtype
        Of queries, K and V.
    options : tuple of str
        Options of `Scores` that are set.
    """

    device: mx.Device
    tokens: int
    queries: Shape
    keys: Shape
    dtype: mx.Dtype
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodePath:
    """One way to attend over a pool.

    Attributes
    ----------
    layout : Layout
        The pool layout it reads.
    attend : callable
        (queries, keys, values, plan, scores) -> output, arguments already checked.
    prepare : callable
        (batch, call, scale, scores) -> the plan that `attend` takes for every layer of a step.
    supports : callable
        (device, dtype, head_dim) -> whether it can run.
    causal : bool
        Whether it takes several query tokens a sequence, each seeing those before it.
    options : frozenset of str
        The options of `Scores` that it knows.
    refusal : callable
        (queries, keys) -> why it cannot take these shapes, or None.
    """

    layout: Layout
    attend: Callable[[mx.array, mx.array, mx.array, Any, Scores], mx.array]
    prepare: Callable[[DecodeBatch, Call, float, Scores], Any]
    supports: Callable[[mx.Device, mx.Dtype, int], bool]
    causal: bool = False
    options: frozenset[str] = frozenset()
    refusal: Callable[[Shape, Shape], str | None] = lambda queries, keys: None


def _gather_then_sdpa(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Gather,
    layout: Layout,
) -> mx.array:
    batch, scale = step
    keys, values = take_blocks(keys, batch, layout), take_blocks(values, batch, layout)
    if batch.mask is not None:
        # A weight of zero does not silence a stale NaN, so positions past the context are zeroed.
        keep = batch.mask.swapaxes(2, 3)
        zero = mx.zeros((), dtype=keys.dtype)
        keys, values = mx.where(keep, keys, zero), mx.where(keep, values, zero)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=batch.mask)


def _gather_block_major(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Gather,
    scores: Scores,
) -> mx.array:
    return _gather_then_sdpa(queries, keys, values, step, Layout.BLOCK_MAJOR)


def _gather_head_major(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Gather,
    scores: Scores,
) -> mx.array:
    return _gather_then_sdpa(queries, keys, values, step, Layout.HEAD_MAJOR)


def _gather_rows(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Gather,
    scores: Scores,
) -> mx.array:
    batch, scale = step
    sinks = scores.sinks
    return mx.fast.scaled_dot_product_attention(
        queries,
        take_rows(keys, batch),
        take_rows(values, batch),
        scale=scale,
        mask=batch.causal_mask(queries.shape[2], scores.window),
        sinks=None if sinks is None else sinks.astype(queries.dtype),
    )


def _gather_rows_grouped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Gather,
    scores: Scores,
) -> mx.array:
    """All query heads of a KV head in one matrix product; K and V are read once for them."""
    batch, scale = step
    rows, heads, query_len, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = (queries * scale).reshape(rows, kv_heads, -1, head_dim)  # [B, Hkv, G * Q, D]
    logits = grouped @ take_rows(keys, batch).swapaxes(2, 3)
    by_query = (rows, kv_heads, heads // kv_heads, query_len, logits.shape[-1])
    if scores.softcap is not None:
        logits = scores.softcap * mx.tanh(logits / scores.softcap)
    if scores.alibi_slopes is not None:
        slopes = scores.alibi_slopes.reshape(kv_heads, -1, 1, 1)
        logits = (logits.reshape(by_query) + slopes * batch.distances(query_len)).astype(
            queries.dtype
        )
        logits = logits.reshape(*by_query[:2], -1, by_query[-1])
    mask = batch.causal_mask(query_len, scores.window)
    if mask is not None:
        masked = mx.where(
            mask[:, :, None], logits.reshape(by_query), mx.array(-mx.inf, logits.dtype)
        )
        logits = masked.reshape(logits.shape)
    if scores.sinks is None:
        weights = mx.softmax(logits, axis=-1, precise=True)
    else:
        sinks = scores.sinks.astype(logits.dtype).reshape(1, kv_heads, -1, 1, 1)
        sinks = mx.broadcast_to(sinks, (*by_query[:-1], 1)).reshape(*logits.shape[:-1], 1)
        joined = mx.concatenate([logits, sinks], axis=-1)
        weights = mx.softmax(joined, axis=-1, precise=True)[..., :-1]
    out = weights @ take_rows(values, batch)
    return out.reshape(rows, heads, query_len, head_dim)


def _fused(
    queries: mx.array, keys: mx.array, values: mx.array, plan: fused.Plan, scores: Scores
) -> mx.array:
    """Read K and V where they lie; see `pagedkv.attention.fused`."""
    return plan.attend(queries, keys, values, scores.alibi_slopes, scores.sinks)


def _plan_gather(batch: DecodeBatch, call: Call, scale: float, scores: Scores) -> Gather:
    return batch, scale


def _plan_fused(batch: DecodeBatch, call: Call, scale: float, scores: Scores) -> fused.Plan:
    backend = backend_of(call.device)
    return fused.make_plan(batch, backend, call.queries, call.keys, call.dtype, scale, scores)


def _any_head_dim(device: mx.Device, dtype: mx.Dtype, head_dim: int) -> bool:
    return dtype in DTYPES  # MLX falls back to an unfused graph for any head dim


def _fused_supports(device: mx.Device, dtype: mx.Dtype, head_dim: int) -> bool:
    return device.type == mx.gpu and dtype in DTYPES and head_dim in fused.HEAD_DIMS


EVERY_OPTION = frozenset({"window", "softcap", "sinks", "alibi_slopes"})

DECODE_PATHS: Mapping[str, DecodePath] = MappingProxyType(
    {
        "gather_block_major": DecodePath(
            Layout.BLOCK_MAJOR, _gather_block_major, _plan_gather, _any_head_dim
        ),
        "gather_head_major": DecodePath(
            Layout.HEAD_MAJOR, _gather_head_major, _plan_gather, _any_head_dim
        ),
        "gather_rows": DecodePath(
            Layout.BLOCK_MAJOR,
            _gather_rows,
            _plan_gather,
            _any_head_dim,
            causal=True,
            options=frozenset({"window", "sinks"}),
        ),
        "gather_rows_grouped": DecodePath(
            Layout.BLOCK_MAJOR,
            _gather_rows_grouped,
            _plan_gather,
            _any_head_dim,
            causal=True,
            options=EVERY_OPTION,
        ),
        "fused": DecodePath(
            Layout.BLOCK_MAJOR,
            _fused,
            _plan_fused,
            _fused_supports,
            causal=True,
            options=EVERY_OPTION,
            refusal=fused.refusal,
        ),
    }
)
"""Every decode path by name."""


# What "auto" is: by kind of device, up to so many tokens in the batch, which path; a path that
# cannot take the call leaves it to the next. The order was the same for every dtype measured.
AUTO: Mapping[str, tuple[tuple[float, str], ...]] = MappingProxyType(
    {
        # MLX's SDPA is an unfused graph here. Times over contiguous SDPA, 128 to 4096 tokens, batch
        # 1 and 4 (linux-2core-xeon, MLX 0.32.4), rows and grouped: float16 1.06-1.18 and 0.52-0.64,
        # bfloat16 1.15-1.33 and 0.81-0.96, float32 1.3-1.9 and 1.4-1.8. Block-major: 1.9 to 12.
        "cpu": ((math.inf, "gather_rows_grouped"),),
        # H200, float16, 1 to 16 sequences of 1k to 32k tokens, MLX 0.32.4: fused 0.68-0.99 times
        # contiguous SDPA, rows 1.7-17, block-major 2.2-24. The others take what fused cannot.
        "cuda": (
            (math.inf, "fused"),
            (math.inf, "gather_rows"),
            (math.inf, "gather_rows_grouped"),
        ),
        # Not measured: until somebody runs `python -m pagedkv.tune` on a Mac, the gather that SDPA
        # reads without a copy. path="fused" runs the kernels there.
        "metal": ((math.inf, "gather_rows"), (math.inf, "gather_rows_grouped")),
    }
)


def backend_of(device: mx.Device) -> str:
    """Return ``"cpu"``, ``"cuda"`` or ``"metal"``."""
    if device.type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def refusal(name: str, call: Call) -> str | None:
    """Return why the path called `name` cannot run a call, or None if it can."""
    path = DECODE_PATHS[name]
    query_len, head_dim = call.queries[2:]
    if not path.supports(call.device, call.dtype, head_dim):
        return f"does not support {call.dtype} with head dim {head_dim} on {call.device}"
    if query_len > 1 and not path.causal:
        return f"takes one query token, got {query_len}"
    unknown = [option for option in call.options if option not in path.options]
    if unknown:
        return f"does not know {', '.join(unknown)}"
    reason = path.refusal(call.queries, call.keys)
    return f"does not support {reason}" if reason else None


def choose(call: Call) -> str:
    """Return the name of the path behind ``"auto"``."""
    fitting = [name for limit, name in AUTO[backend_of(call.device)] if call.tokens <= limit]
    # If none can run it, the caller hears what the last one, which can do most, has against it.
    return next((name for name in fitting if refusal(name, call) is None), fitting[-1])
