"""Attention over a paged K/V pool, and the contiguous attention it is measured against.

Shapes: B batch, Hq query heads, Hkv KV heads, Q query tokens, D head dim, N blocks in the pool,
S block size, L context length.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from pagedkv.attention import fused
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.inputs import DTYPES, Call, check_heads, check_one_token, check_rank, finite
from pagedkv.attention.paths import DECODE_PATHS, refusal
from pagedkv.attention.plan import plan_for
from pagedkv.attention.scores import PLAIN, ScoreOptions


def contiguous_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float
) -> mx.array:
    """Attend over contiguous K/V with MLX's own kernel: the baseline for paged attention.

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
    check_rank("keys", keys.shape)
    check_one_token(queries)
    scale = finite(scale, "scale")
    shapes = queries.shape, keys.shape, values.shape
    dtypes = queries.dtype, keys.dtype, values.dtype
    call = Call(mx.default_device().type, "contiguous", scale, *shapes, *dtypes)
    check_heads(call, kv_heads=keys.shape[1], head_dim=keys.shape[3])
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
    scores: ScoreOptions = PLAIN,
) -> mx.array:
    """Attend with one query token per sequence over the blocks in its table.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, 1, D]; float16, bfloat16 or float32.
    keys, values : mx.array
        K and V pools of one layer in the path's layout, [N, S, Hkv, D] for ``"auto"``; dtype of
        `queries`; Hq is a multiple of Hkv.
    batch : DecodeBatch
        The block tables, the same for every layer.
    scale : float
        Factor on the scores, usually D ** -0.5.
    path : str
        A key of `DECODE_PATHS`, or ``"auto"`` for the package's choice; `explain` returns that
        choice, and the environment variable PAGEDKV_DECODE_PATH overrides it. On an unmeasured GPU,
        the first call of a kind measures which path is faster, unless the environment has
        PAGEDKV_AUTOTUNE=0.
    scores : ScoreOptions
        Options of the scores, such as a window.

    Returns
    -------
    mx.array
        Shape [B, Hq, 1, D], dtype of `queries`; lazy.

    Raises
    ------
    ValueError
        If the path is unknown, shapes or dtypes do not fit together, or `scale` is not finite.
    UnsupportedPathError
        If the path cannot run this dtype, shape or option on the default device.

    Warns
    -----
    RuntimeWarning
        If a measurement found a kernel that fails on this GPU. That kernel is not used.
    """
    check_one_token(queries)
    plan = plan_for(queries, keys, values, batch, scale, path, scores)
    return plan.attend(queries, keys, values, scores)[0]


def paged_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    *,
    scale: float,
    path: str = "auto",
    scores: ScoreOptions = PLAIN,
) -> mx.array:
    """Attend with the last Q tokens of each sequence, causally: a prefill chunk, a verification.

    float16 scores, before a soft cap, hold up to 2**20 in `gather_rows_grouped`, and up to 65,504
    where a gather calls MLX's SDPA on a CPU; the fused kernels keep them in float32.

    Parameters
    ----------
    queries : mx.array
        Shape [B, Hq, Q, D]; query i is the token at position context length - Q + i and sees the
        positions up to its own. K and V of all Q tokens are in the pools.
    keys, values, batch, scale, path, scores
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
    plan = plan_for(queries, keys, values, batch, scale, path, scores)
    return plan.attend(queries, keys, values, scores)[0]


@dataclass(frozen=True)
class Explanation:
    """The path that a call would run, and why.

    Attributes
    ----------
    path : str
        The key of `DECODE_PATHS`.
    because : str
        The reason: the argument, the environment, the package's table and where it was measured, or
        a measurement on this machine, with its times or its failure.
    refused : dict of str to str
        Why other paths cannot run it, for those that cannot.
    launches : int or None
        Kernels per layer, for the fused path.
    items : int or None
        Work items that the contexts are cut into, for the fused path.
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
    scores: ScoreOptions = PLAIN,
) -> Explanation:
    """Return what `paged_attention` would run with these arguments, without running it.

    On an unmeasured GPU, this runs the measurement now, so the first call does not have to.

    Parameters
    ----------
    queries, keys, values, batch, scale, path, scores
        As for `paged_attention`.

    Returns
    -------
    Explanation
        The path, the reason for it, and why other paths cannot run the call.

    Raises
    ------
    ValueError, UnsupportedPathError
        As `paged_attention`.
    """
    plan = plan_for(queries, keys, values, batch, scale, path, scores)
    reasons = {other: refusal(other, plan.call) for other in DECODE_PATHS if other != plan.name}
    refused = {other: reason for other, reason in reasons.items() if reason}
    if not isinstance(plan.prepared, fused.Plan):
        return Explanation(plan.name, plan.because, refused)
    return Explanation(
        plan.name, plan.because, refused, plan.prepared.launches, plan.prepared.items
    )
