"""The oracle: attention in NumPy, float64, one sequence and one head at a time; and its inputs."""

import mlx.core as mx
import numpy as np

from pagedkv import Layout


def attend_one(query, keys, values, scale, *, softcap=None, slope=0.0, sink=None):
    """query [D], keys and values [L, D] of the tokens it sees, its own the last -> [D]."""
    scores = keys @ query * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = scores - slope * np.arange(len(scores))[::-1]
    highest = max(scores.max(), -np.inf if sink is None else sink)
    weights = np.exp(scores - highest)
    total = weights.sum() + (0.0 if sink is None else np.exp(sink - highest))
    return weights / total @ values


def paged_attention(
    queries,
    keys,
    values,
    block_tables,
    context_lens,
    scale,
    *,
    window=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
):
    """Attend over a block-major pool token by token.

    queries [B, Hq, Q, D], the last Q tokens of each sequence; keys and values [N, S, Hkv, D];
    tables a list of lists of block ids; sinks and slopes [Hq]. Returns [B, Hq, Q, D] in float64.
    """
    queries, keys, values = (np.asarray(x, dtype=np.float64) for x in (queries, keys, values))
    block_size, kv_heads = keys.shape[1:3]
    _, query_heads, query_len, _ = queries.shape
    group = query_heads // kv_heads
    out = np.empty(queries.shape)
    for b, (table, length) in enumerate(zip(block_tables, context_lens, strict=True)):
        slots = [(table[t // block_size], t % block_size) for t in range(length)]
        for h in range(query_heads):
            k = np.stack([keys[block, offset, h // group] for block, offset in slots])
            v = np.stack([values[block, offset, h // group] for block, offset in slots])
            for i in range(query_len):
                end = length - query_len + i + 1
                seen = slice(0 if window is None else max(0, end - window), end)
                out[b, h, i] = attend_one(
                    queries[b, h, i],
                    k[seen],
                    v[seen],
                    scale,
                    softcap=softcap,
                    slope=0.0 if alibi_slopes is None else alibi_slopes[h],
                    sink=None if sinks is None else sinks[h],
                )
    return out


def in_layout(pool, layout):
    """Bring a block-major pool into `layout`."""
    return pool if layout is Layout.BLOCK_MAJOR else mx.contiguous(pool.transpose(2, 0, 1, 3))


def random(rng, shape, dtype):
    """Normal numbers from a seeded generator."""
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
