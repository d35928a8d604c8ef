"""Fused paged attention: a batch's plan, made once on the host, and its launches, one a layer.

Split-KV flash decoding (Dao et al., Flash-Decoding, 2023) over block tables, with the work of a
ragged batch cut into even items on the host as FlashInfer's plan does (Ye et al., 2025).
Shapes: B batch, Hq query heads, Hkv KV heads, Q query tokens, D head dim, S block size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from pagedkv import kernels
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.codes import row_bytes
from pagedkv.attention.cut import MOST_ITEMS, Tuning, cut, tuning_for
from pagedkv.attention.inputs import New, gpu_name
from pagedkv.attention.scores import ScoreOptions
from pagedkv.limits import INT32_MAX

HEAD_DIMS = (64, 80, 96, 128, 256)
MOST_QUERIES = 8  # tokens
MOST_QUERY_HEADS = 16  # of a KV head
TYPES = {mx.float16: "Float16", mx.bfloat16: "BFloat16", mx.float32: "Float32"}
VECTOR = 8  # elements a lane reads at once, as split.h has it


def refusal(queries: tuple[int, ...], keys: tuple[int, ...]) -> str | None:
    """Return why the kernels cannot take these shapes, or None if they can.

    Parameters
    ----------
    queries, keys : tuple of int
        Shapes [B, Hq, Q, D] and [N, S, Hkv, D].
    """
    sequences, heads, query_len, _ = queries
    num_blocks, block_size, kv_heads, _ = keys
    if sequences > MOST_ITEMS:
        return f"{sequences} sequences (it takes up to {MOST_ITEMS})"
    if query_len > MOST_QUERIES:
        return f"{query_len} query tokens (it takes up to {MOST_QUERIES})"
    if heads // kv_heads > MOST_QUERY_HEADS:
        return f"{heads // kv_heads} query heads a KV head (it takes up to {MOST_QUERY_HEADS})"
    if not 8 <= block_size <= 128:
        return f"block size {block_size} (it takes 8 to 128)"
    if num_blocks * block_size > INT32_MAX:
        return f"{num_blocks * block_size} slots (it takes up to {INT32_MAX})"
    return None


@dataclass(frozen=True, eq=False)
class Plan:
    """A batch's launches: made once, and called for every layer with its queries, K and V.

    Attributes
    ----------
    items : int
        Work items that the contexts are cut into.
    launches : int
        Kernels a layer: 2 where partial outputs have to be joined, else 1.
    warps : int
        Warps of a thread group that attends.
    """

    items: int
    launches: int
    warps: int
    _tables: mx.array
    _numbers: mx.array  # what the kernel reads beside the tables
    _room: int  # tokens by which all may grow before it is better to cut anew
    _kernels: _Kernels
    _advance: int = 0  # tokens by which all have grown

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scores: ScoreOptions,
        after: mx.array | None = None,
        new: New | None = None,
        tables: mx.array | None = None,
    ) -> mx.array:
        """Attend in one layer; see `DecodePath.attend`."""
        slopes, sinks = scores.alibi_slopes, scores.sinks
        tables = self._tables if tables is None else tables
        inputs = [queries, keys, values, tables, self._numbers]
        if new is not None:
            inputs += new
        if after is not None:
            inputs.append(after)
        if slopes is not None:
            inputs.append(slopes)
        splits, split, joins, spans, merge = self._kernels
        attends, advance = splits(new is not None, after is not None), (self._advance,)
        if self.launches == 1:
            if sinks is not None:
                inputs.append(sinks)
            return attends(inputs=inputs, scalars=advance, **split)[0]
        [parts] = attends(inputs=inputs, scalars=advance, **split)
        inputs = [parts, spans]
        if sinks is not None:
            inputs.append(sinks)
        return joins(inputs=inputs, **merge)[0]

    def advanced(self, batch: DecodeBatch, by: int) -> Plan | None:
        """Return the plan of the same sequences, each `by` tokens longer; None to cut anew."""
        if not 0 <= by <= self._room:
            return None
        # Nothing is moved to the device: how far they have grown comes with each launch.
        return Plan(
            self.items,
            self.launches,
            self.warps,
            batch.block_tables,
            self._numbers,
            self._room - by,
            self._kernels,
            self._advance + by,
        )


class _Kernels(NamedTuple):
    """The launches of a plan, and their constant arguments."""

    splits: kernels.Variants
    split: dict[str, Any]
    joins: Callable[..., list[mx.array]]
    spans: mx.array  # see merge.h
    merge: dict[str, Any]


def make_plan(
    batch: DecodeBatch,
    backend: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: mx.Dtype,
    scale: float,
    scores: ScoreOptions,
    bits: tuple[int | None, int | None] = (None, None),
    tuning: Tuning | None = None,
) -> Plan:
    """Cut a batch into work items and choose the kernels that run it.

    Parameters
    ----------
    batch : DecodeBatch
        The block tables.
    backend : str
        ``"cuda"`` or ``"metal"``.
    queries, keys : tuple of int
        Shapes that `refusal` lets pass.
    dtype : mx.Dtype
        Of queries, K and V.
    scale : float
        Factor on the scores.
    scores : ScoreOptions
        What else happens to them.
    bits : tuple of (int or None, int or None)
        Bits of quantized K and V, None where not quantized.
    tuning : Tuning, optional
        Instead of the device's own.

    Returns
    -------
    Plan
        The launches.
    """
    tuning = tuning or tuning_for(gpu_name(mx.default_device().type), backend)
    rows_of_batch, heads, query_len, head_dim = queries
    _, block_size, kv_heads, _ = keys
    group = heads // kv_heads
    lanes = lanes_of(head_dim)
    row_sizes = [row_bytes(head_dim, each, dtype) for each in bits]
    # Query rows that a thread group takes, tokens that a warp reads in a trip.
    if is_tensor := _multiplies_codes(backend, bits, head_dim, block_size, dtype):
        rows = 8
        tokens = warp_tokens = 16
    else:
        rows = min(8, _power_of_two(group * query_len))
        # A team's scores fit its lanes; more tokens than these would not fit the registers.
        tokens = min(lanes // rows, 8 if rows <= 2 else 4)
        warp_tokens = 32 // lanes * tokens
    chunks = -(-group * query_len // rows)
    lens = batch.lens
    starts = np.zeros_like(lens)
    if scores.window is not None:
        starts = np.maximum(lens - query_len + 1 - scores.window, 0) // tokens * tokens
    warps, tile, work, rows_of_work = cut(
        lens,
        starts,
        tuning,
        groups=kv_heads * chunks,
        warp_tokens=warp_tokens,
        token_bytes=sum(row_sizes),
        heavy=not is_tensor and (rows == 8 or dtype == mx.float32),
    )
    items = len(work)
    divided = items > rows_of_batch
    header = np.array([scale, scores.softcap or 0.0, 0, 0, 0, 0, 0, 0], np.float32).view(np.int32)
    header[2], header[4] = scores.window or 0, items
    numbers = np.concatenate([header, work.ravel()]).astype(np.int32)
    spans = np.concatenate([[items, 0], rows_of_work.ravel()]).astype(np.int32)
    shape = (("D", head_dim), ("HKV", kv_heads), ("G", group), ("Q", query_len))
    sinks = scores.sinks is not None
    by_lanes = (
        ("R", rows),
        ("TOKENS", tokens),
        ("LOG2_LANES", lanes.bit_length() - 1),
    )
    splits = kernels.Variants(
        "tensor" if is_tensor else "split",
        backend,
        (
            *shape,
            ("BLOCK_SIZE", block_size),
            *((("MATRIX", 1),) if is_tensor else by_lanes),
            ("CHUNKS", chunks),
            *row_constants(head_dim, bits),
            ("WARPS", warps),
            ("T", TYPES[dtype]),
            ("SPLIT", int(divided)),
            ("SOFTCAP", int(scores.softcap is not None)),
            ("WINDOW", int(scores.window is not None)),
            ("ALIBI", int(scores.alibi_slopes is not None)),
            ("SINKS", int(sinks and not divided)),
            ("OUT", "Float32" if divided else TYPES[dtype]),
            *_types(scores),
        ),
        (("slopes",) if scores.alibi_slopes is not None else ())
        + (("sinks",) if sinks and not divided else ()),
        scalars=("advance",),
    )
    joins = kernels.kernel(
        "merge",
        backend,
        (
            *shape,
            *(("WARPS", tuning.merge_warps), ("SINKS", int(sinks)), ("OUT", TYPES[dtype])),
            *_types(scores),
        ),
        ("sinks",) if sinks else (),
    )
    output = {"output_shapes": [queries], "output_dtypes": [dtype]}
    # Outputs first, then their log-sum-exps.
    partial = {
        "output_shapes": [(items * heads * query_len * (head_dim + 1),)],
        "output_dtypes": [mx.float32],
    }
    return Plan(
        items=items,
        launches=1 + divided,
        warps=warps,
        _tables=batch.block_tables,
        _numbers=kernels.array_of(numbers, backend),
        _room=tile,
        _kernels=_Kernels(
            splits,
            {
                "grid": (kv_heads * chunks * warps * 32, items, 1),
                "threadgroup": (warps * 32, 1, 1),
                **(partial if divided else output),
            },
            joins,
            kernels.array_of(spans, backend),
            {
                "grid": (heads * query_len * tuning.merge_warps * 32, rows_of_batch, 1),
                "threadgroup": (tuning.merge_warps * 32, 1, 1),
                **output,
            },
        ),
    )


def _multiplies_codes(
    backend: str,
    bits: tuple[int | None, int | None],
    head_dim: int,
    block_size: int,
    dtype: mx.Dtype,
) -> bool:
    """Whether ``tensor.h`` can take such pools. It has queries in float16."""
    return (
        backend == "cuda"
        and None not in bits
        and head_dim in (64, 128)
        and block_size % 16 == 0
        and dtype != mx.float32
    )


def _types(scores: ScoreOptions) -> kernels.Constants:
    """Return the dtypes of options that are arrays."""
    arrays = (("SLOPES_T", scores.alibi_slopes), ("SINKS_T", scores.sinks))
    return tuple((name, TYPES[array.dtype]) for name, array in arrays if array is not None)


def lanes_of(head_dim: int) -> int:
    """Return the lanes that have a row of D numbers, `VECTOR` each."""
    return _power_of_two(-(-head_dim // VECTOR))


def row_constants(head_dim: int, bits: tuple[int | None, int | None]) -> kernels.Constants:
    """Return what kernels have to know of how pools keep a row, a team of lanes for each."""
    names = zip(kernels.BITS, bits, strict=True)
    return (("LANES", lanes_of(head_dim)), *((name, each or 0) for name, each in names))


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than `number`."""
    return 1 << (number - 1).bit_length()
