"""All of it together: a small model generates through the scheduler what it does with dense K/V."""

import mlx.core as mx
import numpy as np
import pytest

from pagedkv import (
    DecodeBatch,
    PagedKVCache,
    Scheduler,
    SlotMapping,
    paged_attention,
)

VOCABULARY, WIDTH, LAYERS = 50, 32, 2
QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5
SIZES = {"block_size": 4, "num_blocks": 18}


class Model:
    """Embedding, attention layers with residuals, and the most likely next token."""

    def __init__(self):
        rng = np.random.default_rng(21)
        self.embedding = mx.array(rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32))
        heads = {"q": QUERY_HEADS, "k": KV_HEADS, "v": KV_HEADS}
        self.weights = [
            {
                name: mx.array(rng.standard_normal((WIDTH, count * HEAD_DIM)).astype(np.float32))
                for name, count in {**heads, "o": WIDTH // HEAD_DIM}.items()
            }
            for _ in range(LAYERS)
        ]

    def __call__(self, tokens, attend):
        """Return the next token after each of [B, L]; attend(layer, q, k, v) -> [B, Hq, L, D]."""
        x = self.embedding[mx.array(tokens)]
        rows, length = tokens.shape
        for layer, w in enumerate(self.weights):
            normed = mx.fast.rms_norm(x, None, 1e-5) / WIDTH**0.5
            q, k, v = (
                (normed @ w[name]).reshape(rows, length, -1, HEAD_DIM).swapaxes(1, 2)
                for name in "qkv"
            )
            out = attend(layer, q, k, v).swapaxes(1, 2).reshape(rows, length, -1)
            x = x + out @ w["o"] / WIDTH**0.5
        return np.array(mx.argmax(mx.fast.rms_norm(x, None, 1e-5) @ self.embedding.T, axis=-1))


def generate_dense(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(np.array([tokens]), attend_dense)[0, -1]))
    return tokens


def attend_dense(layer, q, k, v):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")


def compute(model, cache, step):
    """Run the model over a step, sequences with the same number of new tokens together."""
    cache.copy_blocks(step.copies)
    ends = np.cumsum(step.counts)
    sampled = {}
    for count in sorted(set(step.counts), reverse=True):
        rows = [row for row, other in enumerate(step.counts) if other == count]
        new = np.concatenate([np.arange(ends[row] - count, ends[row]) for row in rows])
        tables = [step.tables[row] for row in rows]
        lens = [table.num_tokens for table in tables]
        slots = np.concatenate([t.slots(n - count) for t, n in zip(tables, lens, strict=True)])
        slots = SlotMapping.from_slots(slots, **SIZES)
        batch = DecodeBatch.from_tables([table.block_ids for table in tables], lens, **SIZES)

        def attend(layer, q, k, v, slots=slots, batch=batch):
            cache.write(layer, k, v, slots)
            return paged_attention(q, cache.keys[layer], cache.values[layer], batch, scale=SCALE)

        following = model(step.tokens[new].reshape(len(rows), count), attend)[:, -1]
        sampled |= {
            step.request_ids[row]: int(token) for row, token in zip(rows, following, strict=True)
        }
    return {request_id: sampled[request_id] for request_id in step.samples}


@pytest.mark.parametrize("max_tokens", [7, 64])
def test_generation_under_pressure_equals_dense(max_tokens):
    model = Model()
    rng = np.random.default_rng(22)
    shared = rng.integers(0, VOCABULARY, 14).tolist()
    requests = {}
    for number in range(14):
        own = rng.integers(0, VOCABULARY, rng.integers(1, 12)).tolist()
        requests[number] = (shared + own if number % 3 else own), int(rng.integers(1, 16))
    cache = PagedKVCache(
        num_layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=mx.float32, **SIZES
    )
    scheduler = Scheduler(cache.pool, cache.block_size, max_tokens=max_tokens, max_running=6)
    generated = {}
    for number, (prompt, count) in requests.items():
        scheduler.add(number, prompt, count)
        generated[number] = list(prompt)
    done = set()
    while len(done) < len(requests):
        step = scheduler.schedule()
        sampled = compute(model, cache, step)
        for number, token in sampled.items():
            generated[number].append(token)
        done |= set(scheduler.update(sampled))
    for number, (prompt, count) in requests.items():
        assert generated[number] == generate_dense(model, prompt, count), number
    stats = scheduler.stats()
    assert stats.preemptions > 0
    assert stats.hit_tokens > 0
    assert stats.evicted_blocks > 0
    assert stats.blocks_live == 0
    assert len({token for tokens in generated.values() for token in tokens}) > 10
    assert cache.pool.num_free + stats.blocks_cached == SIZES["num_blocks"]
