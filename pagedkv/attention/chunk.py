"""Attention over gathered K and V: contexts copied to where they are contiguous, then MLX's own.

MLX's fused attention takes "causal" for a mask, aligned at the end, at a fraction of what an array
costs (H200, 2048 tokens over 8192: a sixth). So a chunk is cut into pieces that need no array:
sequences of one length together, and of a layer with a window first the tokens that see everything
before them. What is left of it goes in tiles, a batch of them, over a window and a tile of K and V
each; one mask of that size serves all.
Shapes: B batch, Hq query heads, Hkv KV heads, Q query tokens, D head dim, S block size; of a piece
R rows of K and V, L tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv import kernels
from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.codes import take
from pagedkv.attention.fused import TYPES, row_constants
from pagedkv.attention.inputs import Call, New
from pagedkv.attention.scores import ScoreOptions

WARPS, TOKENS = 16, 16  # of a thread group that gathers
# Query tokens are rounded up to so many where MLX's attention is cuDNN's, which takes 38 ms to
# prepare for each new number of them (H200, MLX 0.32.4).
ROUND = 64
CUDNN_HEAD_DIM = 128  # at most
# Query tokens whose scores are kept at once, of attention by matrix products. Where nothing comes
# before 512 tokens, by 64, 128, 256, all: 234, 375, 322, 443 ms, MLX's own attention 534; 2048:
# 3.5, 4.0, 5.5, 8.4 s, 10.0 (2-core EPYC, 16 and 4 heads of 64, float16, MLX 0.32.4).
SCORED = 128
# A float16 product of queries and K ends at 65,504. Queries this much smaller leave room for scores
# up to 2**20. More would cost digits where K is many thousand times as large as the queries.
HEADROOM = 2.0**4


SCALARS = (
    *("length", "new_tokens", "context", "begin", "end"),
    *("first_sequence", "tiles", "tile", "first_query", "past_query"),
)
"""Arguments of a launch of ``gather.h``."""


def tile_of(window: int) -> int:
    """Return the query tokens of a tile, which sees a window and a tile of K and V.

    A quarter of the window: shorter ones copy more, longer ones score more that is not seen. H200,
    2048 tokens, MLX 0.32.4, tiles of 1/8, 1/4, 1/2, 1 of the window: 631, 619, 684, 945 us with
    head dim 256 and a window of 1024, 380, 389, 414, 595 with 128.
    """
    return min(max(1 << max((window // 4).bit_length() - 1, 0), 128), 512)


class Piece(NamedTuple):
    """Query tokens that one call of attention takes.

    Attributes
    ----------
    rows, tokens : slice
        Of the batch; of the chunk.
    padding : int
        Query tokens to add at the end.
    tiles : int
        Tiles of each sequence, 1 if they are not tiled.
    spans : ndarray
        Of each row of K and V (sequence, first token, tokens, context length, first query token of
        the chunk, query tokens), int32, [R, 6].
    length : int
        L. Tokens past a row's own are zeros or tokens again.
    mask : str, mx.array or None
        As MLX takes it; an array is bool.
    """

    rows: slice
    tokens: slice
    padding: int
    tiles: int
    spans: NDArray[np.int32]
    length: int
    mask: str | mx.array | None


def pieces_of(
    lens: NDArray[np.int64], query_len: int, window: int | None, rounded: int
) -> list[list[Piece]]:
    """Cut the last `query_len` tokens of each sequence into pieces.

    Parameters
    ----------
    lens : ndarray
        Context lengths in tokens, shape [B], no shorter than Q.
    query_len : int
        Q.
    window : int or None
        Tokens that each sees at most.
    rounded : int
        What query tokens of a piece are rounded up to.

    Returns
    -------
    list of list of Piece
        For runs of sequences of one length, in their order, the pieces of their tokens in order.
    """
    if query_len == 1:
        first = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
        none, one = np.zeros_like(lens), np.ones_like(lens)
        spans = np.stack([np.arange(len(lens)), first, lens - first, lens, none, one], axis=1)
        seen, length = spans[:, 2], int(spans[:, 2].max())
        mask = None
        if (seen < length).any():
            mask = (mx.arange(length) < mx.array(seen)[:, None])[:, None, None]
        every = slice(0, len(lens)), slice(0, 1)
        return [[Piece(*every, 0, 1, spans.astype(np.int32), length, mask)]]
    runs, start = [], 0
    for length, run in groupby(lens.tolist()):
        rows = slice(start, start + len(list(run)))
        runs.append(list(_pieces_of_run(rows, length, query_len, window, rounded)))
        start = rows.stop
    return runs


def _pieces_of_run(
    rows: slice, length: int, query_len: int, window: int | None, rounded: int
) -> Iterator[Piece]:
    before = length - query_len
    whole = query_len  # tokens that see all before them
    if window is not None and window < length:
        whole = min(max(window - before, 0), query_len)
    sequences = range(rows.start, rows.stop)
    if whole:
        padding = -whole % rounded
        end = before + whole
        spans = [(sequence, 0, end, length, 0, whole) for sequence in sequences]
        yield Piece(
            rows,
            slice(0, whole),
            padding,
            1,
            np.array(spans, np.int32),
            end + padding,
            "causal",
        )
    rest = query_len - whole
    if rest:
        assert window is not None
        tile = min(tile_of(window), rest + -rest % rounded)
        tiles = -(-rest // tile)
        begins = range(before + whole, length, tile)
        spans = []
        for sequence in sequences:
            for begin in begins:
                first, end = begin - window + 1, min(begin + tile, length)
                spans.append((sequence, first, end - first, length, begin - before, end - begin))
        own, seen = mx.arange(tile)[:, None], mx.arange(window + tile - 1)
        mask = (own <= seen) & (seen < own + window)
        yield Piece(
            rows,
            slice(whole, query_len),
            tiles * tile - rest,
            tiles,
            np.array(spans, np.int32),
            window + tile - 1,
            mask,
        )


class Scored(NamedTuple):
    """Query tokens of a piece whose scores are kept at once.

    Attributes
    ----------
    tokens : slice
        Of the piece.
    seen : int
        Tokens of K and V, from the first on.
    mask, distances : mx.array or None
        As `grouped` takes them.
    """

    tokens: slice
    seen: int
    mask: mx.array | None
    distances: mx.array | None


def scored(piece: Piece, window: int | None, *, far: bool) -> list[Scored]:
    """Cut a piece for `grouped`: no array of scores is larger than `SCORED` query tokens need.

    Parameters
    ----------
    piece : Piece
        What is cut; its mask is bool.
    window : int or None
        Tokens that each query token sees at most.
    far : bool
        Whether distances are asked for.
    """
    mask = piece.mask
    count = (piece.tokens.stop - piece.tokens.start + piece.padding) // piece.tiles
    made = []
    for start in range(0, count, SCORED):
        stop = min(start + SCORED, count)
        seen = piece.length
        if isinstance(mask, str):  # aligned at the end
            seen -= count - stop
            own = mx.arange(seen - stop + start, seen)
        elif mask is None or mask.ndim == 4:  # one token of each sequence, its last
            own = mx.array(piece.spans[:, 2, None] - 1)
        else:
            assert window is not None
            own = mx.arange(start, stop) + (window - 1)
        distances = mx.arange(seen) - own[..., None]
        if distances.ndim == 3:
            distances = distances[:, None]
        if isinstance(mask, str):
            shown: mx.array | None = distances <= 0
        else:
            shown = mask if mask is None or mask.ndim == 4 else mask[start:stop]
        made.append(Scored(slice(start, stop), seen, shown, distances if far else None))
    return made


class _Work(NamedTuple):
    """A piece, what gathers its K and V, and how it is cut for `grouped`."""

    piece: Piece
    gather: _ByKernel | _ByIndex
    scored: list[Scored]


@dataclass(frozen=True, eq=False)
class Plan:
    """Gathers K and V of a batch and attends over them, in every layer.

    Attributes
    ----------
    call : Call
        The kind of call.
    """

    call: Call
    _runs: list[list[_Work]]
    _tables: mx.array

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
        """Attend in one layer; see `DecodePath.attend`."""
        tables = self._tables if tables is None else tables
        outputs = []
        for run in self._runs:
            parts = []
            for work in run:
                gathered = work.gather(queries, keys, values, tables, after, new)
                after = gathered[3]
                parts.append(self._attend(gathered, work, scores))
            outputs.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2))
        return (outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)), after

    def _attend(self, gathered: Gathered, work: _Work, scores: ScoreOptions) -> mx.array:
        """Return a piece's outputs, [B, Hq, Q, D], of its queries in tiles, [R, Hq, tile, D]."""
        queries, keys, values, _ = gathered
        piece, scale = work.piece, self.call.scale
        if work.scored:
            parts = [
                grouped(
                    queries[:, :, each.tokens],
                    keys[:, :, : each.seen],
                    values[:, :, : each.seen],
                    scale,
                    each.mask,
                    each.distances,
                    scores,
                )
                for each in work.scored
            ]
            out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        else:
            sinks = scores.sinks
            out = mx.fast.scaled_dot_product_attention(
                queries,
                keys,
                values,
                scale=scale,
                mask=piece.mask,
                sinks=None if sinks is None else sinks.astype(queries.dtype),
            )
        if piece.tiles > 1:
            rows, heads, tile, head_dim = out.shape
            shape = rows // piece.tiles, piece.tiles * tile, heads, head_dim
            out = out.swapaxes(1, 2).reshape(shape).swapaxes(1, 2)
        if piece.padding:
            out = out[:, :, : piece.tokens.stop - piece.tokens.start]
        return out


def grouped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None,
    distances: mx.array | None,
    scores: ScoreOptions,
) -> mx.array:
    """All query heads of a KV head in one matrix product; K and V are read once for them.

    Parameters
    ----------
    queries : mx.array
        Shape [R, Hq, Q, D].
    keys, values : mx.array
        Shape [R, Hkv, L, D].
    scale : float
        Factor on the scores.
    mask, distances : mx.array or None
        Whether a query token sees a position, and how far it lies behind, [Q, L] or
        [R, 1, Q, L] each.
    scores : ScoreOptions
        What else happens to the scores.
    """
    rows, heads, query_len, head_dim = queries.shape
    kv_heads = keys.shape[1]
    together = (queries * (scale / HEADROOM)).reshape(rows, kv_heads, -1, head_dim)
    logits = together @ keys.swapaxes(2, 3)  # [R, Hkv, G * Q, L]
    logits = logits * mx.array(HEADROOM)  # in float32 from here, which is no slower
    by_query = (rows, kv_heads, heads // kv_heads, query_len, logits.shape[-1])
    if scores.softcap is not None:
        logits = scores.softcap * mx.tanh(logits / scores.softcap)
    if distances is not None and scores.alibi_slopes is not None:
        slopes = scores.alibi_slopes.astype(mx.float32).reshape(kv_heads, -1, 1, 1)
        behind = distances if distances.ndim == 2 else distances[:, :, None]
        logits = (logits.reshape(by_query) + slopes * behind).reshape(logits.shape)
    if mask is not None:
        shown = mask if mask.ndim == 2 else mask[:, :, None]
        logits = mx.where(shown, logits.reshape(by_query), -mx.inf).reshape(logits.shape)
    if scores.sinks is None:
        weights = mx.softmax(logits, axis=-1)
    else:
        sinks = scores.sinks.astype(mx.float32).reshape(1, kv_heads, -1, 1, 1)
        sinks = mx.broadcast_to(sinks, (*by_query[:-1], 1)).reshape(*logits.shape[:-1], 1)
        weights = mx.softmax(mx.concatenate([logits, sinks], axis=-1), axis=-1)[..., :-1]
    out = weights.astype(queries.dtype) @ values
    return out.reshape(rows, heads, query_len, head_dim)


Gathered = tuple[mx.array, mx.array, mx.array, mx.array | None]
"""Queries, K and V of a piece, and what is computed when the pools were read and written."""


class _ByIndex:
    """Gathers a piece by MLX's own operations; new tokens that nothing comes before, it takes."""

    def __init__(self, batch: DecodeBatch, call: Call, piece: Piece) -> None:
        sequences, first, tokens, context = piece.spans.T[:4]
        self._rows = batch.rows_from(sequences, first, tokens, piece.length, call.keys[2])
        query_len = call.queries[2]
        self._call, self._piece = call, piece
        self._is_first = bool((context == query_len).all()) and query_len > 1
        self._places: mx.array | None = None
        if self._is_first and piece.tiles > 1:
            ends = np.minimum(first[: piece.tiles, None] + np.arange(piece.length), query_len - 1)
            self._places = mx.array(ends)

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        tables: mx.array,
        after: mx.array | None,
        new: New | None,
    ) -> Gathered:
        piece, head_dim, dtype = self._piece, self._call.queries[3], self._call.dtype
        asked = queries[piece.rows, :, piece.tokens]
        if piece.padding:
            asked = mx.pad(asked, [(0, 0), (0, 0), (0, piece.padding), (0, 0)])
        if piece.tiles > 1:
            sequences, heads = asked.shape[:2]
            tiled = asked.reshape(sequences, heads, piece.tiles, -1, head_dim)
            asked = mx.flatten(tiled.swapaxes(1, 2), 0, 1)
        if new is not None and self._is_first and not any(self._call.bits):
            return asked, self._tiles_of(new[0]), self._tiles_of(new[1]), None
        held_keys = take(keys, self._rows, head_dim, dtype, is_keys=True)
        held_values = take(values, self._rows, head_dim, dtype, is_keys=False)
        return asked, held_keys, held_values, None

    def _tiles_of(self, tokens: mx.array) -> mx.array:
        own = tokens[self._piece.rows]
        if self._places is None:
            begin = int(self._piece.spans[0, 1])
            return own[:, :, begin : begin + self._piece.length]
        return mx.flatten(own[:, :, self._places].swapaxes(1, 2), 0, 1)


class _ByKernel:
    """Gathers a piece by ``gather.h``, which also puts new tokens into the pools."""

    def __init__(self, backend: str, call: Call, piece: Piece, *, is_all: bool) -> None:
        heads, query_len, head_dim = call.queries[1:]
        _, block_size, kv_heads, _ = call.keys
        rows, length = len(piece.spans), piece.length
        name, size = TYPES[call.dtype], call.dtype.size
        tile = (piece.tokens.stop - piece.tokens.start + piece.padding) // piece.tiles
        # Else they are passed on as they are.
        self._copies_queries = not is_all or piece.padding > 0 or piece.tiles > 1
        # Rows follow from a few numbers, which a launch is given: MLX on CUDA moves an array from
        # the host by page faults, 0.15 ms for the smallest (H200, MLX 0.32.4).
        firsts, own = piece.spans[:, 1], piece.spans[0]
        has_spans = query_len == 1 and rows > 1
        self._spans = [mx.array(piece.spans[:, :4].ravel())] if has_spans else []
        scalars = (
            *(length, query_len, int(own[3]), int(own[1]), int((firsts + piece.spans[:, 2]).max())),
            *(int(own[0]), piece.tiles, tile, piece.tokens.start, piece.tokens.stop),
        )
        constants: kernels.Constants = (
            *(("D", head_dim), ("HKV", kv_heads), ("HQ", heads), ("BLOCK_SIZE", block_size)),
            *(("TOKENS", TOKENS), ("WARPS", WARPS)),
            ("VECTOR", 1 if head_dim % 8 else 16 // size),
            *row_constants(head_dim, call.bits),
            *(("T", name), ("QUERIES", int(self._copies_queries)), ("SPANS", int(has_spans))),
        )
        groups, threads = -(-length // TOKENS), WARPS * 32
        shapes = [(rows, kv_heads, length, head_dim)] * 2 + [(8,)]
        outputs: tuple[str, ...] = ("gathered_keys", "gathered_values", "done")
        if self._copies_queries:
            shapes.append((rows, tile, heads, head_dim))
            outputs = (*outputs, "gathered_queries")
        extra = ("queries",) * self._copies_queries + ("spans",) * has_spans
        self._gathers = kernels.Variants(
            "gather", backend, constants, extra, outputs, scalars=SCALARS
        )
        self._launch = {
            "grid": (groups * threads, rows, 1),
            "threadgroup": (threads, 1, 1),
            "output_shapes": shapes,
            "output_dtypes": [call.dtype] * len(shapes),
            "scalars": scalars,
        }

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        tables: mx.array,
        after: mx.array | None,
        new: New | None,
    ) -> Gathered:
        inputs = [keys, values, tables]
        if new is not None:  # token by token, as projections leave them
            inputs += [new[0].swapaxes(1, 2), new[1].swapaxes(1, 2)]
        if after is not None:
            inputs.append(after)
        if self._copies_queries:
            inputs.append(queries.swapaxes(1, 2))
        inputs += self._spans
        gathers = self._gathers(new is not None, after is not None)
        held_keys, held_values, done, *copied = gathers(inputs=inputs, **self._launch)
        return copied[0].swapaxes(1, 2) if copied else queries, held_keys, held_values, done


def make_plan(
    batch: DecodeBatch, backend: str, call: Call, scores: ScoreOptions, *, grouped: bool
) -> Plan:
    """Cut a batch into pieces.

    Parameters
    ----------
    batch : DecodeBatch
        The block tables.
    backend : str
        ``"cuda"`` or ``"metal"``, where a kernel gathers, or ``"cpu"``.
    call : Call
        The kind of call, checked.
    scores : ScoreOptions
        What else happens to the scores.
    grouped : bool
        Whether to attend by matrix products, which know all options, and not by MLX's attention.

    Returns
    -------
    Plan
        For every layer with such calls.
    """
    query_len, head_dim = call.queries[2:]
    by_cudnn = backend == "cuda" and call.dtype != mx.float32 and head_dim <= CUDNN_HEAD_DIM
    rounded = ROUND if by_cudnn and query_len > 8 and not grouped else 1

    def work(piece: Piece) -> _Work:
        gather: _ByKernel | _ByIndex
        if backend == "cpu":
            gather = _ByIndex(batch, call, piece)
        else:
            is_all = len(runs) == len(runs[0]) == 1
            gather = _ByKernel(backend, call, piece, is_all=is_all)
        if grouped:
            far = scores.alibi_slopes is not None
            return _Work(piece, gather, scored(piece, scores.window, far=far))
        if isinstance(piece.mask, mx.array):  # MLX would make numbers of it in each layer
            least, none = mx.array(-mx.inf, call.dtype), mx.array(0.0, call.dtype)
            piece = piece._replace(mask=mx.where(piece.mask, none, least))
        return _Work(piece, gather, [])

    runs = pieces_of(batch.lens, query_len, scores.window, rounded)
    return Plan(call, [[work(piece) for piece in run] for run in runs], batch.block_tables)
