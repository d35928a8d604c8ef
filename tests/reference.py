"""The oracle: attention in NumPy, float64, one sequence and one head at a time; and its inputs."""

import mlx.core as mx
import numpy as np

from pagedkv import Layout


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def attend_one(query, keys, values, scale):
    """query [D], keys and values [L, D] -> [D], all float64."""
    return softmax(keys @ query * scale) @ values


def paged_attention(queries, keys, values, block_tables, context_lens, scale):
    """Attend over a block-major pool token by token.

    queries [B, Hq, Q, D], the last Q tokens of each sequence; keys and values [N, S, Hkv, D];
    tables a list of lists of block ids. Returns [B, Hq, Q, D] in float64.
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
                seen = length - query_len + i + 1
                out[b, h, i] = attend_one(queries[b, h, i], k[:seen], v[:seen], scale)
    return out


def in_layout(pool, layout):
    """Bring a block-major pool into `layout`."""
    return pool if layout is Layout.BLOCK_MAJOR else mx.contiguous(pool.transpose(2, 0, 1, 3))


def random(rng, shape, dtype):
    """Normal numbers from a seeded generator."""
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
