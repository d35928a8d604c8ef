"""Decode attention over a paged K/V pool, and the contiguous attention it is measured against.

Shapes: B batch, Hq query heads, Hkv KV heads, D head dim, N blocks in the pool, S block size,
M blocks of the longest table, L context length.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.inputs import DTYPES, Layout, check_pool, check_rank
from pagedkv.attention.paths import DECODE_PATHS, Call, choose, refusal
from pagedkv.attention.scores import PLAIN, Scores
from pagedkv.errors import UnsupportedPathError

FORCE = "PAGEDKV_DECODE_PATH"  # environment variable: what "auto" is


def contiguous_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float
) -> mx.array:
    """Attend over contiguous K/V with MLX's own kernel: the bound that paged paths are held to.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, 1, D]; float16, bfloat16 or float32.
    keys, values : mx.array
        Shape [B, Hkv, L, D], same dtype; Hq is a multiple of Hkv.
    scale : float
        Factor on the scores, usually D ** -0.5.

    Returns
    -------
    mx.array
        Shape [B, Hq, 1, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit together or `scale` is not finite.
    """
    check_rank("keys", keys)
    _check_one_token(queries)
    _check_queries(queries, keys, values, kv_heads=keys.shape[1], head_dim=keys.shape[3])
    _check_scale(scale)
    if keys.shape[0] != queries.shape[0]:
        raise ValueError(f"expected K/V of batch {queries.shape[0]}, got {keys.shape[0]}")
    if queries.dtype not in DTYPES:
        raise ValueError(f"expected float16, bfloat16 or float32, got {queries.dtype}")
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)


def decode_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    *,
    scale: float,
    path: str = "auto",
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    alibi_slopes: mx.array | None = None,
) -> mx.array:
    """Attend with one query token a sequence over the blocks that its table names.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, 1, D]; float16, bfloat16 or float32.
    keys, values : mx.array
        K and V pools of one layer in the path's layout, [N, S, Hkv, D] for ``"auto"``; dtype of
        `queries`; Hq is a multiple of Hkv.
    batch : DecodeBatch
        The step's tables, the same for every layer.
    scale : float
        Factor on the scores, usually D ** -0.5.
    path : str
        A key of `DECODE_PATHS`, or ``"auto"`` for what the package chooses; `explain` tells what
        that is, and the environment variable PAGEDKV_DECODE_PATH replaces it.
    window : int, optional
        See at most so many tokens, a query's own the last of them.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    sinks : mx.array, optional
        A logit for each query head that joins the softmax without a value, shape [Hq].
    alibi_slopes : mx.array, optional
        What a score loses for every token of distance, by query head, shape [Hq].

    Returns
    -------
    mx.array
        Shape [B, Hq, 1, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        If the path is unknown, shapes or dtypes do not fit together, `scale` is not finite, or an
        option is malformed.
    UnsupportedPathError
        If the path cannot run this dtype, shape or option on the default device.
    """
    scores = _scores(window, softcap, sinks, alibi_slopes)
    attend, plan = _prepared(queries, keys, values, batch, scale, path, scores, one=True)
    return attend(queries, keys, values, plan, scores)


def paged_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    *,
    scale: float,
    path: str = "auto",
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    alibi_slopes: mx.array | None = None,
) -> mx.array:
    """Attend with the last Q tokens of each sequence, causally: a prefill chunk, a verification.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, Q, D]; query i is the token at position context length - Q + i and sees the
        positions up to its own. K and V of all Q tokens are in the pools.
    keys, values, batch, scale, path, window, softcap, sinks, alibi_slopes
        As for `decode_attention`, which is the same for Q = 1.

    Returns
    -------
    mx.array
        Shape [B, Hq, Q, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        As `decode_attention`, and if a context is shorter than Q.
    UnsupportedPathError
        If the path cannot run this dtype, shape, Q or option on the default device.
    """
    scores = _scores(window, softcap, sinks, alibi_slopes)
    attend, plan = _prepared(queries, keys, values, batch, scale, path, scores)
    return attend(queries, keys, values, plan, scores)


@dataclass(frozen=True)
class Explanation:
    """What a call would run.

    Attributes
    ----------
    path : str
        The key of `DECODE_PATHS`.
    because : str
        Who chose it: the argument, the environment, or the package.
    refused : dict of str to str
        Why each of the other paths could not run it, if it could not.
    launches : int or None
        Kernels a layer, of the fused path.
    items : int or None
        Work items that the contexts are cut into, of the fused path.
    """

    path: str
    because: str
    refused: dict[str, str]
    launches: int | None = None
    items: int | None = None


def explain(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    *,
    scale: float,
    path: str = "auto",
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    alibi_slopes: mx.array | None = None,
) -> Explanation:
    """Tell what `paged_attention` would run with these arguments, without running it.

    Parameters
    ----------
    queries, keys, values, batch, scale, path, window, softcap, sinks, alibi_slopes
        As for `paged_attention`.

    Returns
    -------
    Explanation
        The path, who chose it, and what the others lack.

    Raises
    ------
    ValueError, UnsupportedPathError
        As `paged_attention`.
    """
    scores = _scores(window, softcap, sinks, alibi_slopes)
    name = _check(queries, keys, values, batch, scale, path, scores)
    if path != "auto":
        because = "asked for by name"
    elif os.environ.get(FORCE):
        because = f"{FORCE}={os.environ[FORCE]}"
    else:
        because = "the package's choice"
    call = _call(queries, keys, batch, scores)
    reasons = {other: refusal(other, call) for other in DECODE_PATHS if other != name}
    refused = {other: reason for other, reason in reasons.items() if reason}
    if name != "fused":
        return Explanation(name, because, refused)
    plan = DECODE_PATHS[name].prepare(batch, call, scale, scores)
    return Explanation(name, because, refused, plan.launches, plan.items)


def _call(queries: mx.array, keys: mx.array, batch: DecodeBatch, scores: Scores) -> Call:
    return Call(
        device=mx.default_device(),
        tokens=len(batch.lens) * batch.longest,
        queries=queries.shape,
        keys=keys.shape,
        dtype=queries.dtype,
        options=scores.used(),
    )


def _scores(
    window: int | None,
    softcap: float | None,
    sinks: mx.array | None,
    alibi_slopes: mx.array | None,
) -> Scores:
    if window is None and softcap is None and sinks is None and alibi_slopes is None:
        return PLAIN
    return Scores(window, softcap, sinks, alibi_slopes)


def _prepared(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    scale: float,
    path: str,
    scores: Scores,
    *,
    one: bool = False,
) -> tuple[Callable[..., mx.array], Any]:
    """Return how to attend, and its plan, everything checked: once a step for calls of a kind."""
    kind = (
        path,
        scale,
        queries.shape,
        keys.shape,
        values.shape,
        queries.dtype,
        keys.dtype,
        values.dtype,
        mx.default_device().type,
        None if scores is PLAIN else scores.kind(),
        one,
    )
    prepared = batch.plans.get(kind)
    if prepared is None:
        if one:
            _check_one_token(queries)
        chosen = DECODE_PATHS[_check(queries, keys, values, batch, scale, path, scores)]
        call = _call(queries, keys, batch, scores)
        prepared = chosen.attend, chosen.prepare(batch, call, scale, scores)
        batch.plans[kind] = prepared
    return prepared


def _check(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    scale: float,
    path: str,
    scores: Scores,
) -> str:
    """Check everything and choose; nothing has been computed when this raises."""
    if path == "auto":
        path = os.environ.get(FORCE) or "auto"
    if path != "auto" and path not in DECODE_PATHS:
        known = ", ".join(["auto", *DECODE_PATHS])
        raise ValueError(f"expected path to be one of {known}, got {path!r}")
    layout = Layout.BLOCK_MAJOR if path == "auto" else DECODE_PATHS[path].layout
    _, _, kv_heads, head_dim = check_pool("keys", keys, batch, layout)
    _check_queries(queries, keys, values, kv_heads=kv_heads, head_dim=head_dim)
    _check_scale(scale)
    scores.check(queries.shape[1])
    if queries.shape[0] != len(batch.lens):
        raise ValueError(f"expected queries of batch {len(batch.lens)}, got {queries.shape[0]}")
    query_len = queries.shape[2]
    if not 1 <= query_len <= batch.shortest:
        raise ValueError(
            f"expected 1 to {batch.shortest} query tokens, the shortest context, got {query_len}"
        )
    call = _call(queries, keys, batch, scores)
    name = choose(call) if path == "auto" else path
    reason = refusal(name, call)
    if reason:
        raise UnsupportedPathError(f"path {name!r} {reason}")
    return name


def _check_one_token(queries: mx.array) -> None:
    if queries.ndim != 4 or queries.shape[2] != 1:
        raise ValueError(f"expected queries of shape [B, Hq, 1, D], got {queries.shape}")


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite scale, got {scale}")


def _check_queries(
    queries: mx.array, keys: mx.array, values: mx.array, *, kv_heads: int, head_dim: int
) -> None:
    if values.shape != keys.shape:
        raise ValueError(f"expected values of shape {keys.shape}, got {values.shape}")
    if queries.ndim != 4 or queries.shape[3] != head_dim:
        raise ValueError(f"expected queries of shape [B, Hq, Q, {head_dim}], got {queries.shape}")
    if 0 in keys.shape:
        raise ValueError(f"expected keys without empty dimensions, got shape {keys.shape}")
    if queries.shape[1] == 0 or queries.shape[1] % kv_heads:
        raise ValueError(
            f"expected query heads to be a multiple of {kv_heads} KV heads, got {queries.shape[1]}"
        )
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"expected one dtype, got {queries.dtype}, {keys.dtype} and {values.dtype} "
            f"for queries, keys and values"
        )
