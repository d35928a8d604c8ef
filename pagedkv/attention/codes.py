"""Quantized K and V: how a pool stores them, and their conversion.

Each number of a row, the D numbers of a token in a head, is stored as a code: the number of steps
above the row's lowest. Step and lowest number are float16, one word for both beside the block's
codes. K in 4 bits are rotated before by a Hadamard matrix (QuaRot, Ashkboos et al., 2024): a row
whose large elements are spread over all loses less, and queries that are rotated likewise score the
same. The kernels do the same, see ``kernels/codes.h``.

A pool of codes is uint32, [N, S, Hkv, W] with W = D * bits / 32 + 1 words for each row. That is how
much a block holds; in it lie the codes of all rows first, [S, Hkv, W - 1], then [Hkv, S] words of
steps and lowest numbers.
Shapes: N blocks, S block size, Hkv KV heads, D head dim, T tokens.
"""

from __future__ import annotations

import operator
from math import gcd
from typing import Any

import mlx.core as mx

from pagedkv.limits import INT32_MAX

BITS = (8, 4)
"""Of a code."""
MOST = 256  # numbers of a row
ROTATED = 4  # bits of K that are rotated
WORD = 32  # bits
# Of a word's codes: which bit each begins at. Those of 4 bits are as kernels read them well.
_PLACES = {8: (0, 8, 16, 24), 4: (0, 16, 4, 20, 8, 24, 12, 28)}
_LARGEST = 65504.0  # of float16


def bits_of_each(bits: Any, name: str = "bits") -> tuple[int | None, int | None]:
    """Return the bits of K and V, of one number for both or one each; ValueError for others."""
    given = bits if isinstance(bits, (tuple, list)) else (bits, bits)
    try:
        each = [None if one is None else operator.index(one) for one in given]
    except TypeError:
        each = []
    if len(each) != 2 or not {*each} <= {None, *BITS}:
        raise ValueError(f"expected {name} of 8, 4 or None, or these of K and of V, got {bits!r}")
    return each[0], each[1]


def has_codes(head_dim: int) -> bool:
    """Whether rows of `head_dim` numbers can be quantized: what a team of lanes of a GPU takes."""
    return head_dim % 8 == 0 and head_dim <= MOST


def width(head_dim: int, bits: int | None) -> int:
    """Return the elements, or words of codes, that a pool has for a row."""
    return head_dim if bits is None else head_dim * bits // WORD + 1


def row_bytes(head_dim: int, bits: int | None, dtype: mx.Dtype) -> int:
    """Return the bytes of a row in a pool."""
    return width(head_dim, bits) * (dtype if bits is None else mx.uint32).size


def bits_of(pool: tuple[int, ...], dtype: mx.Dtype, head_dim: int) -> int | None:
    """Return the bits of a pool's codes, None of one that has numbers as they are.

    ValueError if rows of `head_dim` numbers do not fit a pool of this shape and dtype.
    """
    kinds = (None,) if dtype != mx.uint32 else BITS if has_codes(head_dim) else ()
    for bits in kinds:
        if pool[3] == width(head_dim, bits):
            return bits
    raise ValueError(f"expected a pool for head dim {head_dim}, got {dtype} of shape {pool}")


def encode(rows: mx.array, bits: int, *, rotate: bool) -> tuple[mx.array, mx.array]:
    """Return the codes of rows, and what measures them.

    Numbers beyond 65,504, the largest of float16, are kept as that (of K that are rotated, numbers
    as they are then). A step is 6e-8 at least: rows of smaller differences are all their lowest,
    and where it is below 6e-5 a number may be off by 3e-8 for each step that it is above the
    lowest, besides half a step. A row with a number that is not finite is none at all.

    Parameters
    ----------
    rows : mx.array
        Shape [..., D]; float16, bfloat16 or float32.
    bits : int
        Of a code, 8 or 4.
    rotate : bool
        Whether they are K that are to be rotated.

    Returns
    -------
    tuple of (mx.array, mx.array)
        Codes [..., D * bits / 32] and measures [...], uint32.
    """
    rows = rows.astype(mx.float32)
    if rotate:
        rows = rotated(rows)
    levels = 2**bits - 1
    is_finite = mx.isfinite(rows).all(axis=-1)
    rows = mx.clip(rows, -_LARGEST, _LARGEST)
    lowest = rows.min(axis=-1).astype(mx.float16)
    spread = rows.max(axis=-1) - lowest.astype(mx.float32)
    step = mx.maximum(spread / levels, 0).astype(mx.float16)
    lowest, step = (mx.where(is_finite, x, mx.array(mx.nan, mx.float16)) for x in (lowest, step))
    measures = mx.stack([step, lowest], axis=-1).view(mx.uint32)[..., 0]
    step, lowest = step[..., None].astype(mx.float32), lowest[..., None].astype(mx.float32)
    steps = mx.where(step > 0, mx.round((rows - lowest) / step), 0)
    codes = mx.clip(steps, 0, levels).astype(mx.uint32)
    codes = codes.reshape(*codes.shape[:-1], -1, WORD // bits) << mx.array(_PLACES[bits], mx.uint32)
    return codes.sum(axis=-1), measures


def decode(
    codes: mx.array, measures: mx.array, bits: int, dtype: mx.Dtype, *, rotate: bool
) -> mx.array:
    """Return the rows that codes stand for, [..., D], as `encode` was given them."""
    parts = codes[..., None] >> mx.array(_PLACES[bits], mx.uint32)
    steps = (parts & (2**bits - 1)).reshape(*codes.shape[:-1], -1).astype(mx.float32)
    step, lowest = mx.split(measures[..., None].view(mx.float16).astype(mx.float32), 2, axis=-1)
    rows: mx.array = steps * step + lowest
    rows = rotated(rows) if rotate else rows
    if dtype == mx.float16:
        rows = mx.clip(rows, -_LARGEST, _LARGEST)
    return rows.astype(dtype)


def rotated(rows: mx.array) -> mx.array:
    """Return rows [..., D] times a Hadamard matrix of the largest power of two in D.

    It is its own inverse.
    """
    head_dim = rows.shape[-1]
    size = head_dim & -head_dim
    return mx.hadamard_transform(rows.reshape(*rows.shape[:-1], -1, size)).reshape(rows.shape)


def take(
    pool: mx.array, rows: mx.array, head_dim: int, dtype: mx.Dtype, *, is_keys: bool
) -> mx.array:
    """Return rows of a pool, whatever it keeps them in.

    Parameters
    ----------
    pool : mx.array
        K or V, [N, S, Hkv, D], or of codes.
    rows : mx.array
        slot * Hkv + head of each row, any shape, integers.
    head_dim : int
        D.
    dtype : mx.Dtype
        Of the rows that come from codes.
    is_keys : bool
        Whether these are K.

    Returns
    -------
    mx.array
        Shape [*rows.shape, D]; lazy, contiguous.
    """
    bits = bits_of(pool.shape, pool.dtype, head_dim)
    if bits is None:
        return mx.take(pool.reshape(-1, head_dim), rows, axis=0)
    run, codes, measures = _places(pool, rows)
    taken = mx.take(pool.reshape(-1, run), codes, axis=0).reshape(*rows.shape, -1)
    measured = mx.take(pool.reshape(-1), measures)
    return decode(taken, measured, bits, dtype, rotate=is_keys and bits == ROTATED)


def put(pool: mx.array, slots: mx.array, tokens: mx.array, *, is_keys: bool) -> mx.array:
    """Return a pool with tokens in their slots; in place if there is no other reference to it.

    Parameters
    ----------
    pool : mx.array
        K or V, [N, S, Hkv, D], or of codes.
    slots : mx.array
        Shape [T], int32.
    tokens : mx.array
        Shape [T, Hkv, D].
    is_keys : bool
        Whether these are K.
    """
    shape, (_, kv_heads, head_dim) = pool.shape, tokens.shape
    bits = bits_of(shape, pool.dtype, head_dim)
    if bits is None:
        flat = pool.reshape(-1, kv_heads, head_dim)
        flat[slots] = tokens
        return flat.reshape(shape)
    made, measured = encode(tokens, bits, rotate=is_keys and bits == ROTATED)
    run, codes, measures = _places(pool, slots[:, None] * kv_heads + mx.arange(kv_heads))
    flat = pool.reshape(-1, run)
    flat[codes] = made.reshape(*codes.shape, run)
    flat = flat.reshape(-1)
    flat[measures] = measured
    return flat.reshape(shape)


def _places(pool: mx.array, rows: mx.array) -> tuple[int, mx.array, mx.array]:
    """Return where rows lie in a pool of codes.

    Words in a run; the runs of each row, [..., W - 1 words / run]; the word that measures each.
    """
    _, block_size, kv_heads, row_words = pool.shape
    in_block, words = block_size * kv_heads, row_words - 1
    run = gcd(words, in_block)  # so blocks are whole runs, too
    if pool.size > INT32_MAX:
        rows = rows.astype(mx.int64)
    block, row = rows // in_block, rows % in_block
    first = block * (in_block * row_words // run) + row * (words // run)
    token, head = row // kv_heads, row % kv_heads
    measures = block * (in_block * row_words) + (in_block * words + head * block_size) + token
    return run, first[..., None] + mx.arange(words // run), measures
