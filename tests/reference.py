"""The oracle: attention in NumPy, float64, one sequence and one head at a time."""

import numpy as np


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def attend_one(query, keys, values, scale):
    """query [D], keys and values [L, D] -> [D], all float64."""
    return softmax(keys @ query * scale) @ values


def paged_attention(queries, keys, values, block_tables, context_lens, scale):
    """Attend over a block-major pool token by token.

    queries [B, Hq, 1, D], keys and values [N, S, Hkv, D], tables a list of lists of block ids.
    Returns [B, Hq, 1, D] in float64.
    """
    queries, keys, values = (np.asarray(x, dtype=np.float64) for x in (queries, keys, values))
    block_size, kv_heads = keys.shape[1:3]
    group = queries.shape[1] // kv_heads
    out = np.empty(queries.shape)
    for b, (table, length) in enumerate(zip(block_tables, context_lens, strict=True)):
        slots = [(table[t // block_size], t % block_size) for t in range(length)]
        for h in range(queries.shape[1]):
            k = np.stack([keys[block, offset, h // group] for block, offset in slots])
            v = np.stack([values[block, offset, h // group] for block, offset in slots])
            out[b, h, 0] = attend_one(queries[b, h, 0], k, v, scale)
    return out
