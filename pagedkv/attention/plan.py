"""Plans: a path and its inputs for a batch, made once for all calls of a kind."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from pagedkv.attention.auto import Arrays, auto
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.inputs import Call, Layout, New, check_heads, check_pool, finite
from pagedkv.attention.paths import DECODE_PATHS, DecodePath, refusal
from pagedkv.attention.scores import ScoreOptions
from pagedkv.errors import UnsupportedPathError

FORCE = "PAGEDKV_DECODE_PATH"  # environment variable: what "auto" is


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How a batch is attended over by calls of one kind: checked, chosen, prepared.

    Attributes
    ----------
    call : Call
        The kind of call.
    name : str
        The path's key of `DECODE_PATHS`.
    path : DecodePath
        The path that runs.
    prepared : object
        What the path made of the batch. It holds arrays of the batch, never the batch.
    because : str
        Where the choice comes from.
    """

    call: Call
    name: str
    path: DecodePath
    prepared: Any
    because: str

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of an output."""
        return math.prod(self.call.queries) * self.call.dtype.size

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scores: ScoreOptions,
        after: mx.array | None = None,
        new: New | None = None,
        tables: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """Attend in one layer, with arguments of this kind.

        Parameters
        ----------
        queries, keys, values, scores
            As for `paged_attention`.
        after : mx.array, optional
            Of the pools' dtype: K and V are not read before it is computed.
        new : tuple of (mx.array, mx.array), optional
            K and V of the query tokens, [B, Hkv, Q, D] each, to be put into the pools first, if the
            path `writes`. MLX does not know of it: what reads or writes the pools next has to take
            what this returns as its `after`.
        tables : mx.array, optional
            Block tables in place of the batch's, if the path `writes`; `over` is for the others.

        Returns
        -------
        tuple of (mx.array, mx.array or None)
            The output, and what is computed once the pools were read and written: None for the
            output itself.
        """
        prepared = self.prepared
        return self.path.attend(queries, keys, values, prepared, scores, after, new, tables)

    def advanced(self, batch: DecodeBatch, by: int) -> AttentionPlan | None:
        """Return the plan of the same sequences, each `by` tokens longer; None to plan anew."""
        prepared = self.path.advance and self.path.advance(self.prepared, batch, by)
        return prepared and AttentionPlan(self.call, self.name, self.path, prepared, self.because)

    def over(self, batch: DecodeBatch, group: int, scores: ScoreOptions) -> AttentionPlan:
        """Return the plan of a batch by the tables of one of its groups of layers."""
        prepared = self.path.prepare(batch.of_group(group), self.call, scores)
        return AttentionPlan(self.call, self.name, self.path, prepared, self.because)


def plan_for(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: DecodeBatch,
    scale: float,
    path: str,
    scores: ScoreOptions,
    after: mx.array | None = None,
) -> AttentionPlan:
    """Return the batch's plan for such a call, made when the first one comes.

    Parameters
    ----------
    queries, keys, values, batch, scale, path, scores
        As for `paged_attention`.
    after : mx.array, optional
        K and V may be read once it is computed: if there is something to measure.

    Returns
    -------
    AttentionPlan
        The same for every layer whose arguments are of the same kind.

    Raises
    ------
    ValueError, UnsupportedPathError
        As `paged_attention`. Nothing has been computed then.
    """
    kind = (  # of call; in the order of `Call`, which would take longer to make than to look up
        mx.default_device().type,
        path,
        scale,
        queries.shape,
        keys.shape,
        values.shape,
        queries.dtype,
        keys.dtype,
        values.dtype,
        scores.kind,
    )
    return batch.once(kind, _make_plan, batch, kind, scores, (queries, keys, values), after)


def _make_plan(
    batch: DecodeBatch,
    kind: tuple[Any, ...],
    scores: ScoreOptions,
    arrays: Arrays,
    after: mx.array | None,
) -> AttentionPlan:
    if before := batch.carried.get(kind):
        plan: AttentionPlan
        plan, position = before
        if advanced := plan.advanced(batch, batch.position - position):
            batch.carried[kind] = advanced, batch.position
            return advanced
    call = Call(*kind)
    path, because = call.path, "asked for by name"
    if path == "auto":
        path = os.environ.get(FORCE) or "auto"
        because = f"{FORCE}={path}"
    if path != "auto" and path not in DECODE_PATHS:
        known = ", ".join(["auto", *DECODE_PATHS])
        raise ValueError(f"expected path to be one of {known}, got {path!r}")
    layout = Layout.BLOCK_MAJOR if path == "auto" else DECODE_PATHS[path].layout
    _, _, kv_heads, head_dim = check_pool("keys", call.keys, batch, layout)
    check_heads(call, kv_heads=kv_heads, head_dim=head_dim)
    call = call._replace(scale=finite(call.scale, "scale"))
    sequences, heads, query_len, _ = call.queries
    scores.check_heads(heads)
    if sequences != len(batch.lens):
        raise ValueError(f"expected queries of batch {len(batch.lens)}, got {sequences}")
    if not 1 <= query_len <= batch.shortest:
        raise ValueError(
            f"expected 1 to {batch.shortest} query tokens, the shortest context, got {query_len}"
        )
    if path == "auto":
        path, because = auto(batch, call, arrays, scores, after)
    if reason := refusal(path, call):
        raise UnsupportedPathError(f"path {path!r} {reason}")
    chosen = DECODE_PATHS[path]
    made = AttentionPlan(call, path, chosen, chosen.prepare(batch, call, scores), because)
    if chosen.advance:
        batch.carried[kind] = made, batch.position
    return made
