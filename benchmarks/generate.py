"""What a user of mlx-lm gets: tokens of a whole model, over mlx-lm's own caches.

A random llama, seeded: of Llama-3.2-1B's shape on a GPU, a small one on a CPU. Both sides go
through mlx-lm's own `BatchGenerator` or `generate_step` and compute the same prompts.
"""

import copy
from inspect import signature

import mlx.core as mx
import numpy as np

from .common import DTYPE, feature, on_gpu, require_memory, series_of_host_share, settle
from .kinds import NotApplicableError

STEPS = 8  # of a sample
BLOCK_SIZE = 32
MOST = 256  # tokens that a measured sequence may grow by
PREFILL = 512  # tokens of each prompt at once: a GPU keeps all scores of attention with a mask


def import_mlx_lm():
    """Return `pagedkv.mlx_lm`; n/a where the package or the environment has none."""
    feature("PagedKVCache")
    try:
        import pagedkv.mlx_lm
    except ImportError as error:
        raise NotImplementedError(f"no mlx-lm over the package: {error}") from None
    return pagedkv.mlx_lm


def random_model(family, **sizes):
    """Return a model of one of mlx-lm's modules, with seeded random weights, evaluated."""
    mx.random.seed(0)
    model = family.Model(family.ModelArgs(**sizes))
    model.set_dtype(DTYPE)
    mx.eval(model.parameters())
    return model


def llama():
    """Return a random model of Llama's kind, evaluated."""
    from mlx_lm.models import llama

    large = on_gpu()
    sizes = {
        "hidden_size": 2048 if large else 512,
        "num_hidden_layers": 16 if large else 4,
        "intermediate_size": 8192 if large else 1024,
        "num_attention_heads": 32 if large else 16,
        "num_key_value_heads": 8 if large else 4,
        "head_dim": 64,
        "vocab_size": 32000 if large else 8000,
    }
    return random_model(llama, model_type="llama", rms_norm_eps=1e-5, **sizes)


def token_bytes(model):
    """Bytes of K and V of a token in all layers."""
    args = model.args
    return 2 * args.num_hidden_layers * args.num_key_value_heads * args.head_dim * DTYPE.size


def prompts_of(model, lengths):
    """Return seeded prompts, none of which begins as another."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.args.vocab_size, length).tolist() for length in lengths]


def require_prompts(tokens):
    """Raise NotImplementedError (n/a) for prompts of so many tokens that a CPU takes minutes."""
    if not on_gpu() and tokens > 512:
        raise NotApplicableError(f"prompts of {tokens} tokens take a CPU minutes", "too slow")


def store_for(model, lengths, **options):
    """Return a paged store with room for sequences that grow from so many tokens.

    n/a where a store takes no such options.
    """
    blocks = sum(-(-(length + MOST) // BLOCK_SIZE) + 1 for length in lengths)
    store = import_mlx_lm().PagedStore
    for name in options:
        if name not in signature(store).parameters:
            raise NotImplementedError(f"PagedStore has no {name} at this commit")
    return store(model, num_blocks=blocks, block_size=BLOCK_SIZE, **options)


def first_token(model, prompt, cache):
    """Return the first token after a prompt, an array; mlx-lm begins the second before it."""
    from mlx_lm.generate import generate_step

    steps = generate_step(prompt, model, max_tokens=1, prompt_cache=cache)
    token, _ = next(steps)
    steps.close()
    return token


class _Decoding:
    """A `BatchGenerator` past its prompts, one call a decode step of all sequences."""

    def __init__(self, model, prompts, make_cache):
        from mlx_lm.generate import BatchGenerator

        count = len(prompts)
        self.generator = BatchGenerator(
            model, max_tokens=MOST, completion_batch_size=count, prefill_step_size=PREFILL
        )
        self.generator.insert(prompts, caches=[make_cache() for _ in prompts])
        while len(self.next()) < count:
            pass

    def next(self):
        return self.generator.next()[1]

    def steps(self):
        """Take the steps of a sample, and wait: the generator begins a step before it is asked."""
        for _ in range(STEPS):
            self.next()
        settle()


class Stored:
    """Closes its store, if it got so far as to open one."""

    store = None

    def teardown(self, *cell):
        if self.store is not None:
            self.store.close()


class _Paired(Stored):
    """Decode steps over mlx-lm's caches and over a store, of the same prompts.

    Version 2: neither side's steps are in flight while the other is timed.
    """

    version = "2"
    timeout = 900
    warmup_time = 0.1
    # A sequence may grow by `MOST` tokens.
    repeat = (5, MOST // STEPS - 4, 6.0)
    unit = "x mlx-lm"
    better = "larger"

    def start(self, lengths, *, is_null=False):
        """Compute the prompts on both sides; with `is_null` both are mlx-lm's."""
        import_mlx_lm()
        from mlx_lm.models.cache import KVCache

        self.model = llama()
        # Both caches, and mlx-lm's once more, which it copies as it grows; the weights are small.
        require_memory(4 * sum(lengths) * token_bytes(self.model))
        prompts = prompts_of(self.model, lengths)
        layers = self.model.args.num_hidden_layers

        def own():
            return _Decoding(self.model, prompts, lambda: [KVCache() for _ in range(layers)])

        self.plain = own()
        if is_null:
            self.paged = own()
        else:
            self.store = store_for(self.model, lengths)
            self.paged = _Decoding(self.model, prompts, self.store.cache)

    def pair(self):
        """Return what makes the ratio one of speeds: mlx-lm's time over the store's."""
        return self.plain.steps, self.paged.steps

    def ours(self):
        return self.paged.steps

    track_host_share = series_of_host_share


class Decode(_Paired):
    """Tokens a second of decode steps over those with mlx-lm's own caches: above 1 is faster."""

    params = [[1, 8, 32], [512, 4096, 16384]]
    param_names = ["sequences", "context"]

    def setup(self, sequences, context):
        require_prompts(max(context, sequences * context // 8))
        self.start([context] * sequences)

    def ratio_tokens_per_second(self, sequences, context):
        return self.pair()


class Null(_Paired):
    """`Decode` with mlx-lm's own caches on both sides: the noise floor."""

    version = "1"
    params = [[1, 8], [512, 4096]]
    param_names = ["sequences", "context"]

    def setup(self, sequences, context):
        require_prompts(max(context, sequences * context // 8))
        self.start([context] * sequences, is_null=True)

    def ratio_tokens_per_second(self, sequences, context):
        return self.pair()


class Skewed(_Paired):
    """`Decode` where one sequence is long and seven are short: mlx-lm pads all to the longest."""

    params = [[512, 8192]]
    param_names = ["longest"]

    def setup(self, longest):
        require_prompts(longest)
        self.start([longest, *[longest // 16] * 7])

    def ratio_tokens_per_second(self, longest):
        return self.pair()


class FirstToken(Stored):
    """Time to the first token of a prompt whose first tokens are cached, over none being cached.

    mlx-lm begins the second token before it hands out the first; since version 2 neither call waits
    for the second token of the other.
    """

    version = "2"
    params = [[512, 2048]]
    param_names = ["cached"]
    timeout = 900
    repeat = (5, 15, 6.0)
    unit = "x uncached"
    own = 32  # tokens that no prompt shares

    def setup(self, cached):
        require_prompts(cached)
        import_mlx_lm()
        self.model = llama()
        require_memory(8 * cached * token_bytes(self.model))
        self.prompt, *_ = prompts_of(self.model, [cached + self.own])
        self.store = store_for(self.model, [cached + self.own] * 4)
        self.namespaces = iter(range(10**9))
        self.first("shared")
        settle()

    def first(self, namespace):
        prompt = mx.array(self.prompt)
        cache = self.store.cache(self.prompt, namespace=namespace)
        first_token(self.model, prompt, cache)
        return cache.cached

    between = staticmethod(settle)

    def ratio_first_token(self, cached):
        def hit():
            assert self.first("shared") == cached

        def miss():
            assert self.first(next(self.namespaces)) == 0

        return hit, miss


class Forks:
    """Memory of K and V of 8 forks of a sequence over that of one, also when each has grown.

    A deep copy of mlx-lm's cache takes 8.
    """

    version = "1"
    params = [[512, 4096], [0, 1]]
    param_names = ["tokens", "grown"]
    timeout = 900
    unit = "x one"
    better = "smaller"

    def setup(self, tokens, grown):
        import_mlx_lm()
        self.model = llama()
        require_memory(4 * tokens * token_bytes(self.model))
        [self.prompt] = prompts_of(self.model, [tokens])

    def track_memory(self, tokens, grown):
        with store_for(self.model, [tokens] * 2) as store:
            cache = store.cache()
            for start in range(0, tokens, 512):
                self.model(mx.array([self.prompt[start : start + 512]]), cache=cache)
                mx.eval([layer.state for layer in cache])
            one = held_blocks(store)
            forks = [copy.deepcopy(cache) for _ in range(8)]
            if grown:
                for token, fork in enumerate(forks):
                    mx.eval(self.model(mx.array([[token] * grown]), cache=fork))
            return held_blocks(store) / one


def held_blocks(store):
    """Return how many blocks of a store are not free."""
    stats = store.stats()
    return stats.num_blocks - stats.free_blocks
