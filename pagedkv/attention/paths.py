"""The decode paths: gathers before attention, the fused kernels, and which one `auto` is.

Shapes: B batch, Hq query heads, Hkv KV heads, Q query tokens, D head dim, N blocks in the pool,
S block size, L longest context length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx

from pagedkv.attention import chunk, fused
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.gather import take_blocks
from pagedkv.attention.inputs import DTYPES, Call, Layout, Shape
from pagedkv.attention.scores import ScoreOptions

Attended = tuple[mx.array, mx.array | None]


@dataclass(frozen=True)
class DecodePath:
    """One way to attend over a pool.

    Attributes
    ----------
    layout : Layout
        The pool layout it reads.
    attend : callable
        (queries, keys, values, prepared, scores, after, new, tables) -> (output, last), arguments
        already checked. The last three as for `AttentionPlan.attend`, `new` and `tables` of paths
        that `writes` alone; `last` is computed once the pools were read and written, None if that
        is the output.
    prepare : callable
        (batch, call, scores) -> what `attend` takes for every layer; it must not hold the batch.
    advance : callable or None
        (prepared, batch, by) -> the same for a batch whose sequences grew by `by` tokens, or None
        to prepare again. Paths without it always prepare again.
    writes : bool
        Whether on a GPU it can write new tokens' K and V into the pools itself.
    supports : callable
        (device, dtype, head_dim) -> whether it can run.
    causal : bool
        Whether it takes several query tokens a sequence, each seeing those before it.
    options : frozenset of str
        The options of `ScoreOptions` that it supports.
    refusal : callable
        (queries, keys) -> why it cannot take these shapes, or None.
    codes : bool
        Whether it reads pools of quantized values.
    """

    layout: Layout
    attend: Callable[..., Attended]
    prepare: Callable[[DecodeBatch, Call, ScoreOptions], Any]
    supports: Callable[[mx.Device, mx.Dtype, int], bool]
    advance: Callable[[Any, DecodeBatch, int], Any] | None = None
    writes: bool = False
    causal: bool = False
    options: frozenset[str] = frozenset()
    refusal: Callable[[Shape, Shape], str | None] = lambda queries, keys: None
    codes: bool = False


class Blocks(NamedTuple):
    """The part of a batch that a gather of blocks uses."""

    scale: float
    block_tables: mx.array  # [B, M]
    mask: mx.array | None  # [B, 1, 1, M * S]

    def ordered(self, after: mx.array | None) -> Blocks:
        """Return the same, known only when `after` is computed."""
        if after is None:
            return self
        nothing = after.reshape(-1)[:1].view(mx.uint8)[:1] & 0
        return self._replace(block_tables=self.block_tables + nothing.astype(mx.int32))


def _gather_then_sdpa(
    queries: mx.array, keys: mx.array, values: mx.array, blocks: Blocks, layout: Layout
) -> mx.array:
    scale, tables, mask = blocks
    keys, values = take_blocks(keys, tables, layout), take_blocks(values, tables, layout)
    if mask is not None:
        # A weight of zero does not silence a stale NaN, so positions past the context are zeroed.
        keep = mask.swapaxes(2, 3)
        zero = mx.zeros((), dtype=keys.dtype)
        keys, values = mx.where(keep, keys, zero), mx.where(keep, values, zero)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _gather_block_major(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    blocks: Blocks,
    scores: ScoreOptions,
    after: mx.array | None = None,
    *_: Any,
) -> Attended:
    blocks = blocks.ordered(after)
    return _gather_then_sdpa(queries, keys, values, blocks, Layout.BLOCK_MAJOR), None


def _gather_head_major(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    blocks: Blocks,
    scores: ScoreOptions,
    after: mx.array | None = None,
    *_: Any,
) -> Attended:
    blocks = blocks.ordered(after)
    return _gather_then_sdpa(queries, keys, values, blocks, Layout.HEAD_MAJOR), None


# Each a function of its own: what ran is told from the calls of a profile.
def _gather_rows(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    plan: chunk.Plan,
    scores: ScoreOptions,
    *access: Any,
) -> Attended:
    """Gather K and V, then MLX's own attention; see `pagedkv.attention.chunk`."""
    return plan.attend(queries, keys, values, scores, *access)


def _gather_rows_grouped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    plan: chunk.Plan,
    scores: ScoreOptions,
    *access: Any,
) -> Attended:
    """Gather K and V, then matrix products; see `pagedkv.attention.chunk`."""
    return plan.attend(queries, keys, values, scores, *access)


def _fused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    plan: fused.Plan,
    scores: ScoreOptions,
    *access: Any,
) -> Attended:
    """Read K and V where they lie; see `pagedkv.attention.fused`."""
    return plan.attend(queries, keys, values, scores, *access), None


def _prepare_blocks(batch: DecodeBatch, call: Call, scores: ScoreOptions) -> Blocks:
    return Blocks(call.scale, batch.block_tables, batch.mask)


def _prepare_rows(batch: DecodeBatch, call: Call, scores: ScoreOptions) -> chunk.Plan:
    return chunk.make_plan(batch, backend_of(mx.Device(call.device)), call, scores, grouped=False)


def _prepare_grouped(batch: DecodeBatch, call: Call, scores: ScoreOptions) -> chunk.Plan:
    return chunk.make_plan(batch, backend_of(mx.Device(call.device)), call, scores, grouped=True)


def _prepare_fused(batch: DecodeBatch, call: Call, scores: ScoreOptions) -> fused.Plan:
    backend, shapes = backend_of(mx.Device(call.device)), (call.queries, call.keys)
    return fused.make_plan(batch, backend, *shapes, call.dtype, call.scale, scores, call.bits)


def _any_head_dim(device: mx.Device, dtype: mx.Dtype, head_dim: int) -> bool:
    return dtype in DTYPES  # MLX falls back to an unfused graph for any head dim


def _fused_supports(device: mx.Device, dtype: mx.Dtype, head_dim: int) -> bool:
    return device.type == mx.gpu and dtype in DTYPES and head_dim in fused.HEAD_DIMS


EVERY_OPTION = frozenset({"window", "softcap", "sinks", "alibi_slopes"})

DECODE_PATHS: Mapping[str, DecodePath] = MappingProxyType(
    {
        "gather_block_major": DecodePath(
            Layout.BLOCK_MAJOR, _gather_block_major, _prepare_blocks, _any_head_dim
        ),
        "gather_head_major": DecodePath(
            Layout.HEAD_MAJOR, _gather_head_major, _prepare_blocks, _any_head_dim
        ),
        "gather_rows": DecodePath(
            Layout.BLOCK_MAJOR,
            _gather_rows,
            _prepare_rows,
            _any_head_dim,
            writes=True,
            causal=True,
            codes=True,
            options=frozenset({"window", "sinks"}),
        ),
        "gather_rows_grouped": DecodePath(
            Layout.BLOCK_MAJOR,
            _gather_rows_grouped,
            _prepare_grouped,
            _any_head_dim,
            writes=True,
            causal=True,
            codes=True,
            options=EVERY_OPTION,
        ),
        "fused": DecodePath(
            Layout.BLOCK_MAJOR,
            _fused,
            _prepare_fused,
            _fused_supports,
            advance=fused.Plan.advanced,
            writes=True,
            causal=True,
            options=EVERY_OPTION,
            refusal=fused.refusal,
            codes=True,
        ),
    }
)
"""Every decode path by name."""


# How "auto" chooses: by kind of device, the path up to a number of tokens in the batch; a path that
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
        # Not measured: the gather that SDPA reads without a copy, unless the fused kernels turn
        # out to be right and faster there, see `pagedkv.attention.auto`.
        "metal": ((math.inf, "gather_rows"), (math.inf, "gather_rows_grouped")),
    }
)

# The GPUs that the table was measured on, by MLX's `device_name`, and where the numbers are. On any
# other the table decides only what cannot be measured.
KNOWN_GPUS: Mapping[str, str] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": "by hand",  # results/h100 compares no paths
        "NVIDIA H200": "results/h200",
    }
)


def backend_of(device: mx.Device) -> str:
    """Return ``"cpu"``, ``"cuda"`` or ``"metal"``."""
    if device.type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def refusal(name: str, call: Call) -> str | None:
    """Return why the path called `name` cannot run a call, or None if it can."""
    path, device = DECODE_PATHS[name], mx.Device(call.device)
    query_len, head_dim = call.queries[2:]
    if not path.supports(device, call.dtype, head_dim):
        return f"does not support {call.dtype} with head dim {head_dim} on {device}"
    if query_len > 1 and not path.causal:
        return f"takes one query token, got {query_len}"
    if mx.uint32 in (call.keys_dtype, call.values_dtype) and not path.codes:
        return "does not read pools of quantized values"
    unknown = [option for option, _ in call.options if option not in path.options]
    if unknown:
        return f"does not know {', '.join(unknown)}"
    reason = path.refusal(call.queries, call.keys)
    return f"does not support {reason}" if reason else None


def choose(call: Call, tokens: int) -> str:
    """Return the name of the path behind ``"auto"``, for `tokens` tokens in the batch.

    Tokens are counted as sequences times the longest context.
    """
    fitting = [name for limit, name in AUTO[backend_of(mx.Device(call.device))] if tokens <= limit]
    # If none can run it, the caller hears what the last one, which can do most, has against it.
    return next((name for name in fitting if refusal(name, call) is None), fitting[-1])
