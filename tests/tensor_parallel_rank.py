"""One rank of a model in two parts: prints its tokens and what its pools hold, as JSON."""

import json

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from small_models import small_model, tokens_of

from pagedkv.mlx_lm import PagedStore

PROMPTS = [[5, 7, 11, 2, 3], list(range(1, 40)), [9]]


def run(group):
    model = small_model("llama")
    if group:
        model.shard(group)
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        steps = generate_step(
            mx.array(PROMPTS[1]),
            model,
            max_tokens=12,
            prompt_cache=store.cache(PROMPTS[1]),
        )
        single = [int(token) for token, _ in steps]
        generator = BatchGenerator(model, max_tokens=12)
        batch = tokens_of(generator, generator.insert(PROMPTS))
        return {
            "single": single,
            "batch": batch,
            "block_bytes": store.stats().block_bytes,
        }


if __name__ == "__main__":
    print(json.dumps(run(mx.distributed.init(strict=True, backend="ring"))))
