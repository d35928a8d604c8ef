"""Random requests in small stores, as mlx-lm's server handles them: all end, no block is lost."""

import random

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import BatchGenerator
from small_models import small_model

from pagedkv.mlx_lm import PagedStore
from pagedkv.mlx_lm.server import PromptCaches

SYSTEMS = [list(range(10, 10 + count)) for count in (0, 3, 6, 9, 14)]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    """One whose layers see everything, and one whose layers are in groups."""
    layers = {"num_hidden_layers": 1} if request.param == "llama" else {}
    return small_model(request.param, **layers)


class Requests:
    """A batch generator, the caches of its prompts, and what was asked: prompt, count, tokens."""

    def __init__(self, model, store, rng, room):
        self.rng, self.caches = rng, PromptCaches(rng.choice([0, 1, 3, 10]))
        self.caches.store = store if rng.random() < 0.7 else None
        store.memory.kv.pool.reclaimers.insert(0, self.caches.give_up)
        self.generator = BatchGenerator(
            model,
            prefill_step_size=rng.choice([1, 3, 7, 100]),
            completion_batch_size=rng.choice([1, 3, 8]),
            prefill_batch_size=rng.choice([1, 3]),
        )
        self.room, self.asked, self.running = room, {}, set()

    def insert(self):
        rng = self.rng
        prompt = rng.choice(SYSTEMS) + [rng.randint(40, 42) for _ in range(rng.randint(1, 6))]
        count = rng.randint(1, 12)
        if len(prompt) + count > self.room:
            return
        cache, rest = self.caches.fetch_nearest_cache("m", prompt)
        cut = rng.randint(0, len(rest))
        [uid] = self.generator.insert_segments(
            [[rest[:cut], rest[cut:]]],
            max_tokens=[count],
            caches=[cache],
            all_tokens=[prompt[: len(prompt) - len(rest)]],
        )
        self.asked[uid] = prompt, count, []
        self.running.add(uid)

    def remove(self):
        uid = self.rng.choice(sorted(self.running))
        self.generator.remove([uid])
        self.running.remove(uid)
        del self.asked[uid]

    def step(self):
        prompts, answers = self.generator.next()
        for one in prompts:
            if one.end_of_segment and not one.end_of_prompt:
                [(cache, tokens)] = self.generator.extract_cache([one.uid]).values()
                self.caches.insert_cache("m", tokens[:], cache)
        for one in answers:
            self.asked[one.uid][2].append(one.token)
            if one.finish_reason:
                self.running.remove(one.uid)
                self.caches.insert_cache("m", one.all_tokens[:], one.prompt_cache)
        return bool(prompts or answers)


@pytest.mark.parametrize("seed", range(10))
def test_random_requests(model, seed):
    rng = random.Random(seed)
    blocks, block_size = rng.randint(9, 30), rng.choice([1, 2, 4, 8])
    with PagedStore(model, num_blocks=blocks, block_size=block_size) as store:
        requests, to_come = Requests(model, store, rng, blocks * block_size), rng.randint(3, 14)
        while to_come or requests.running:
            if to_come and rng.random() < 0.5:
                to_come -= 1
                requests.insert()
            elif requests.running and rng.random() < 0.05:
                requests.remove()
            else:
                assert requests.step() or not requests.running
        requests.caches.trim_to(n_sequences=0)
        store.forget()
        assert store.stats().free_blocks == store.stats().num_blocks
    for prompt, count, tokens in requests.asked.values():
        generator, alone = BatchGenerator(model), []
        generator.insert([prompt], max_tokens=[count])
        while responses := generator.next_generated():
            alone += [response.token for response in responses]
        assert tokens == alone
