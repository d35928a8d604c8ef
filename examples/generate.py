"""Generate text with a small model: many requests at once, over a paged cache.

    python examples/generate.py --requests 8

The model has two layers and random weights: nothing is downloaded, and the answers mean nothing.
The part to read is `generate`: the scheduler chooses what to compute, the cache turns it into
steps, and the model attends through them. `generate_ahead` keeps one step in flight.
"""

import argparse
import sys

import mlx.core as mx
import numpy as np

from pagedkv import PagedKVCache, Scheduler, blocks_needed

VOCABULARY, WIDTH, LAYERS = 50, 32, 2
QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5
BLOCK_SIZE, NEW = 4, 8  # tokens


class Model:
    """Embedding, attention layers, logits. What a token attends to decides what follows it."""

    def __init__(self):
        rng = np.random.default_rng(21)

        def random(*shape):
            return mx.array(rng.standard_normal(shape).astype(np.float32))

        heads = {"q": QUERY_HEADS, "k": KV_HEADS, "v": KV_HEADS, "o": WIDTH // HEAD_DIM}
        self.embedding, self.head = random(VOCABULARY, WIDTH), random(WIDTH, VOCABULARY)
        self.weights = [
            {name: random(WIDTH, count * HEAD_DIM) for name, count in heads.items()}
            for _ in range(LAYERS)
        ]

    def __call__(self, tokens, attend):
        """Return logits [B, L, V] of tokens [B, L]; `attend` is `Step.attend` or its like."""
        x = self.embedding[tokens]
        rows, length = tokens.shape
        for layer, w in enumerate(self.weights):
            normed = mx.fast.rms_norm(x, None, 1e-5) / WIDTH**0.5
            q, k, v = (
                (normed @ w[name]).reshape(rows, length, -1, HEAD_DIM).swapaxes(1, 2)
                for name in "qkv"
            )
            out = attend(layer, q, k, v, scale=SCALE).swapaxes(1, 2).reshape(rows, length, -1)
            x = x / 4 + out @ w["o"]
        return mx.fast.rms_norm(x, None, 1e-5) @ self.head


def compute_lazily(model, cache, schedule, sampled=None):
    """Begin to compute a schedule; return the next token of each of its `samples`, in order, lazy.

    `sampled` are those of the schedule before, if that is in flight.
    """
    step = cache.step(schedule, sampled)
    logits = model(step.tokens, step.attend)[:, -1]
    rows = mx.array(step.sample_rows, mx.int32)
    sampled = mx.argmax(logits, axis=-1)[rows].astype(mx.int32)
    mx.async_eval(sampled)  # and all that it follows from, K and V too
    return sampled


def compute(model, cache, schedule):
    """Return the most likely next token of each request in the schedule's `samples`."""
    sampled = compute_lazily(model, cache, schedule).tolist()
    return dict(zip(schedule.samples, sampled, strict=True))


def generate(model, cache, scheduler, requests):
    """Run requests to their end; return the new tokens of each."""
    generated = {request_id: [] for request_id in requests}
    running = set(requests)
    while running:
        sampled = compute(model, cache, scheduler.schedule())
        for request_id, token in sampled.items():
            generated[request_id].append(token)
        running -= set(scheduler.update(sampled))
    return generated


def generate_ahead(model, cache, scheduler, requests):
    """As `generate`, but choose each step while the one before is computed."""
    generated = {request_id: [] for request_id in requests}
    running = set(requests)
    in_flight = []  # schedules and their tokens, oldest first
    while running:
        schedule = scheduler.schedule()
        if schedule.request_ids:
            before = in_flight[-1][1] if in_flight else None
            in_flight.append((schedule, compute_lazily(model, cache, schedule, before)))
            if len(in_flight) == 1:
                continue
        computed, tokens = in_flight.pop(0)
        sampled = dict(zip(computed.samples, tokens.tolist(), strict=True))
        for request_id, token in sampled.items():
            generated[request_id].append(token)
        running -= set(scheduler.update(sampled))
    return generated


def main():
    """Parse the command line, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=24, help=f"of {BLOCK_SIZE} tokens")
    parser.add_argument("--ahead", action="store_true", help="one step in flight")
    args = parser.parse_args()

    rng = np.random.default_rng(22)
    prompts = [rng.integers(0, VOCABULARY, rng.integers(1, 24)) for _ in range(args.requests)]
    needed = max(
        (blocks_needed(len(prompt) + NEW - 1, BLOCK_SIZE) for prompt in prompts), default=1
    )
    if args.blocks < needed:
        sys.exit(f"expected --blocks of {needed} at least, got {args.blocks}")
    cache = PagedKVCache(
        num_layers=LAYERS,
        num_blocks=args.blocks,
        block_size=BLOCK_SIZE,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=mx.float32,
    )
    scheduler = Scheduler(cache.pool, cache.block_size)
    for number, prompt in enumerate(prompts):
        scheduler.add(number, prompt, max_new_tokens=NEW)
    run = generate_ahead if args.ahead else generate
    generated = run(Model(), cache, scheduler, range(args.requests))
    for number, tokens in generated.items():
        print(f"request {number}: {tokens}")


if __name__ == "__main__":
    main()
