"""Time to the first token: prompts over a store, compared with mlx-lm's own caches.

`generate.py` says which model that is. Both sides compute the same tokens through mlx-lm's
`generate_step`; ratios of speeds are mlx-lm's time over the package's, above 1 the package is
faster.
"""

import gc
from inspect import signature
from itertools import count

import mlx.core as mx
import numpy as np

from . import cold, generate
from .common import (
    DTYPE,
    KV_HEADS,
    QUERY_HEADS,
    block_tables,
    feature,
    on_gpu,
    random,
    require_gpu,
    require_memory,
    series_of_host_share,
    settle,
)
from .generate import (
    BLOCK_SIZE,
    first_token,
    import_mlx_lm,
    random_model,
    require_prompts,
    store_for,
)

CHUNK = 2048  # tokens of a prompt that mlx-lm computes at once


def gemma():
    """Return a random model of Gemma 3's shape, evaluated: five of six layers see a window."""
    from mlx_lm.models import gemma3_text

    large = on_gpu()
    sizes = {
        "hidden_size": 2048 if large else 256,
        "num_hidden_layers": 12 if large else 6,
        "intermediate_size": 8192 if large else 512,
        "num_attention_heads": 8 if large else 4,
        "num_key_value_heads": 4 if large else 2,
        "head_dim": 256,
        "vocab_size": 32000 if large else 8000,
        "sliding_window": 1024 if large else 64,
        "sliding_window_pattern": 6,
    }
    return random_model(gemma3_text, model_type="gemma3_text", **sizes)


def states(cache):
    """Return what is evaluated to have all tokens in a prompt cache."""
    return [layer.state for layer in cache]


def fill(model, tokens, cache):
    """Compute a prompt into a cache, as mlx-lm does, without a token of an answer."""
    for start in range(0, len(tokens), CHUNK):
        model(mx.array([tokens[start : start + CHUNK]]), cache=cache)
        mx.eval(states(cache))


def require_prompt(model, tokens):
    """Raise NotImplementedError (n/a) for a prompt that does not fit on both sides."""
    heads = model.args.num_attention_heads
    # A mask of numbers takes as much as the scores of one head of all.
    scores = heads * min(tokens, CHUNK) * tokens * DTYPE.size
    require_memory(6 * tokens * generate.token_bytes(model) + 3 * scores)


class _Sampled(generate.Stored):
    """Nothing is in flight when either call of a pair begins."""

    version = "1"
    timeout = 900
    warmup_time = 0.1
    repeat = (3, 15, 6.0)
    unit = "x mlx-lm"
    between = staticmethod(settle)


class _Uncached(_Sampled):
    """Time to the first token, with nothing of the prompt cached."""

    better = "larger"

    def begin(self, model, length, **options):
        """Make a store with room for two prompts of so many tokens, and one of them."""
        self.model = model
        require_prompt(model, length)
        [self.tokens] = generate.prompts_of(model, [length])
        self.prompt = mx.array(self.tokens)
        self.store = store_for(model, [length] * 2, **options)
        self.namespaces = count()

    def plain(self):
        """Return the first token over mlx-lm's own caches."""
        return first_token(self.model, self.prompt, self.store.own_caches())

    def paged(self):
        """Return the first token over the store, in a namespace in which nothing is cached."""
        cache = self.store.cache(self.tokens, namespace=next(self.namespaces))
        assert cache.cached == 0
        return first_token(self.model, self.prompt, cache)

    def ratio_speed(self, *cell):
        return self.plain, self.paged

    def ours(self):
        return self.paged

    track_host_share = series_of_host_share


class FirstToken(_Uncached):
    """Time from a prompt of so many tokens to its first token, mlx-lm's over the store's.

    With the store's that includes what the request before left to do: keeping its prompt, and
    evicting an older one to make room. `ratio_null` is mlx-lm over itself; the width of its samples
    is what no difference looks like.
    """

    params = [[512, 2048, 8192, 32768, 65536]]
    param_names = ["prompt"]

    def setup(self, prompt):
        require_prompts(prompt)
        import_mlx_lm()
        self.begin(generate.llama(), prompt)

    def ratio_null(self, prompt):
        return self.plain, self.plain


class Bits(_Uncached):
    """`FirstToken` where the store keeps K and V in 8 bits, and mlx-lm's cache in 16."""

    params = [[512, 8192]]
    param_names = ["prompt"]

    def setup(self, prompt):
        require_prompts(prompt)
        import_mlx_lm()
        self.begin(generate.llama(), prompt, kv_bits=8)


class Windows(_Uncached):
    """`FirstToken` of a model of Gemma 3's shape, over the caches that mlx-lm has for it.

    Five layers of six see a window: 1024 tokens on a GPU, 64 on a CPU.
    """

    params = [[512, 8192, 16384]]
    param_names = ["prompt"]

    def setup(self, prompt):
        require_prompts(prompt)
        import_mlx_lm()
        self.begin(gemma(), prompt)


class Cached(_Sampled):
    """Time to the first token where only the last `new` tokens of a prompt are not cached.

    The store's, `PagedStore.cache` included, over that of mlx-lm's own cache, which holds the same
    first tokens and is trimmed back to them after each call. Below 1 a hit of the store is cheaper
    than a cache that its user kept.
    """

    params = [[448, 2048, 8192, 30720], [32, 256]]
    param_names = ["cached", "new"]
    better = "smaller"
    room = 64  # calls that the store has room for without evicting anything

    def setup(self, cached, new):
        require_prompts(cached + new)
        import_mlx_lm()
        self.model = generate.llama()
        require_prompt(self.model, cached + new)
        self.cached, self.new = cached, new
        self.rng = np.random.default_rng(1)
        [self.prefix] = generate.prompts_of(self.model, [cached])
        self.store = store_for(self.model, [cached, *[new] * self.room])
        self.own = self.store.own_caches()
        fill(self.model, self.prefix, self.own)
        self.between()
        first_token(self.model, self.prompt, self.store.cache(self.tokens))
        self.between()

    def between(self):
        settle()
        self.rest = self.rng.integers(0, self.model.args.vocab_size, self.new).tolist()
        self.tokens = self.prefix + self.rest
        self.prompt, self.rest = mx.array(self.tokens), mx.array(self.rest)
        mx.eval(self.prompt, self.rest)

    def plain(self):
        """Return the first token over mlx-lm's cache, and trim it."""
        token = first_token(self.model, self.rest, self.own)
        for layer in self.own:
            layer.trim(layer.offset - self.cached)
        return token

    def paged(self):
        """Return the first token over the store."""
        cache = self.store.cache(self.tokens)
        if cache.cached != self.cached:
            raise AssertionError(f"expected {self.cached} tokens cached, got {cache.cached}")
        return first_token(self.model, self.prompt, cache)

    def ratio_time(self, cached, new):
        return self.paged, self.plain

    def ours(self):
        return self.paged

    track_host_share = series_of_host_share


class Chunk(_Sampled):
    """Time of a chunk of a prompt after a context, without logits, mlx-lm's over the store's.

    What one pass of a long prompt costs, or of the new tokens after a cached prefix. Both caches
    are trimmed back to the context after each call. 8 is the most that the kernels of a decode step
    compute, 9 the least that they do not.
    """

    params = [
        [
            "2048 after 30000",
            "256 after 30000",
            "64 after 8000",
            "16 after 8000",
            "9 after 8000",
            "8 after 8000",
            "64 after 448",
            "9 after 448",
        ]
    ]
    param_names = ["chunk"]
    better = "larger"

    def setup(self, chunk):
        new, context = map(int, chunk.split(" after "))
        require_prompts(context + new)
        import_mlx_lm()
        self.model = generate.llama()
        require_prompt(self.model, context + new)
        [tokens] = generate.prompts_of(self.model, [context + new])
        self.chunk = mx.array([tokens[context:]])
        self.store = store_for(self.model, [context + new])
        self.own, self.cache = self.store.own_caches(), self.store.cache()
        for cache in (self.own, self.cache):
            fill(self.model, tokens[:context], cache)

    def compute(self, cache):
        """Compute the chunk, forget it again, and return its logits, lazy."""
        logits = self.model(self.chunk, cache=cache)
        mx.eval(states(cache))
        settle()
        for layer in cache:
            layer.trim(self.chunk.size)
        return logits

    def ratio_speed(self, chunk):
        return lambda: self.compute(self.own), self.ours()

    def ours(self):
        return lambda: self.compute(self.cache)

    track_host_share = series_of_host_share


class Attention:
    """Attention of a chunk over blocks, over MLX's own over contiguous K and V, several layers.

    `paged_attention` with the last 2048 tokens of a context, half of it if that is less, in
    scattered blocks of 32; `scaled_dot_product_attention(mask="causal")` with the same. Below 1 the
    blocks are faster. Queries of a layer are the output of the one before.
    """

    version = "1"
    params = [[512, 4096, 8192, 32768], [64, 128]]
    param_names = ["context", "head_dim"]
    timeout = 900
    warmup_time = 0.1
    repeat = (5, 25, 4.0)
    unit = "x contiguous SDPA"
    better = "smaller"
    between = staticmethod(settle)
    apart = 0.02  # relative

    def setup(self, context, head_dim):
        require_prompts(context)
        self.prepare(context, head_dim)
        one = self.run(self.paged_layer, 1).astype(mx.float32)
        right = self.run(self.contiguous_layer, 1).astype(mx.float32)
        relative = (mx.linalg.norm(one - right) / mx.linalg.norm(right)).item()
        if not relative < self.apart:
            raise AssertionError(f"attention over blocks is off from SDPA by {relative:.1%}")

    def prepare(self, context, head_dim):
        """Make the queries, and K and V of each layer, contiguous and in blocks."""
        attend = feature("paged_attention")
        self.begin(context, head_dim)
        tables, num_blocks = block_tables(1, context, BLOCK_SIZE, "random")
        self.batch = feature("DecodeBatch").from_tables(
            tables, [context], block_size=BLOCK_SIZE, num_blocks=num_blocks
        )
        self.pools = [
            [self.blocks(x, tables[0], num_blocks) for x in layer] for layer in self.layers
        ]
        self.attend = lambda layer, queries: attend(
            queries, *self.pools[layer], self.batch, scale=self.scale
        )

    def begin(self, context, head_dim):
        """Make the queries, and contiguous K and V of each layer."""
        self.scale = head_dim**-0.5
        num_layers = 8 if on_gpu() else 2
        chunk = min(CHUNK, context // 2)
        layer_bytes = 2 * KV_HEADS * context * head_dim * DTYPE.size
        scores = QUERY_HEADS * chunk * context * DTYPE.size
        require_memory(4 * num_layers * layer_bytes + 3 * scores)
        mx.random.seed(0)
        self.queries = random(1, QUERY_HEADS, chunk, head_dim, limit=4)
        self.layers = [
            [random(1, KV_HEADS, context, head_dim) for _ in "kv"] for _ in range(num_layers)
        ]

    def blocks(self, contiguous, table, num_blocks):
        """Return a pool whose blocks in `table` hold a contiguous [1, Hkv, L, D]."""
        _, heads, _, dim = contiguous.shape
        pool = mx.zeros((num_blocks, BLOCK_SIZE, heads, dim), DTYPE)
        pool[mx.array(table)] = contiguous[0].swapaxes(0, 1).reshape(-1, BLOCK_SIZE, heads, dim)
        mx.eval(pool)
        return pool

    def paged_layer(self, layer, queries):
        return self.attend(layer, queries)

    def contiguous_layer(self, layer, queries):
        return mx.fast.scaled_dot_product_attention(
            queries, *self.layers[layer], scale=self.scale, mask="causal"
        )

    def run(self, layer_of, num_layers):
        """Attend in layers, evaluate them together, and return the output of the last."""
        out = self.queries
        for layer in range(num_layers):
            out = layer_of(layer, out)
        mx.eval(out)
        return out

    def paged(self):
        return self.run(self.paged_layer, len(self.layers))

    def contiguous(self):
        return self.run(self.contiguous_layer, len(self.layers))

    def ratio_time(self, context, head_dim):
        return self.paged, self.contiguous

    def ours(self):
        return self.paged

    track_host_share = series_of_host_share


class AttentionBits(Attention):
    """`Attention` over blocks that hold K and V in 8 bits, by `PagedKVCache.attend`."""

    apart = 0.1

    def prepare(self, context, head_dim):
        cache = feature("PagedKVCache")
        if "bits" not in signature(cache).parameters:
            raise NotImplementedError("PagedKVCache has no bits at this commit")
        self.begin(context, head_dim)
        num_blocks = 2 * context // BLOCK_SIZE
        self.cache = cache(
            num_layers=len(self.layers),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            kv_heads=KV_HEADS,
            head_dim=head_dim,
            dtype=DTYPE,
            bits=8,
        )
        self.cache.pool.allocate(num_blocks)
        self.cache.pool.release(np.random.default_rng(1).permutation(num_blocks).tolist())
        table = self.cache.new_table()
        with self.cache.extend([table], [context]) as step:
            for layer, (keys, values) in enumerate(self.layers):
                self.cache.write(layer, keys, values, step.slots)
        batch = self.cache.batch([table])
        self.attend = lambda layer, queries: self.cache.attend(
            layer, queries, batch, scale=self.scale
        )


class Memory:
    """Peak memory from a prompt to its first token, weights included, over mlx-lm's.

    The store has as many blocks as the prompt takes. Each side is measured alone.
    """

    version = "1"
    params = [[512, 32768]]
    param_names = ["prompt"]
    timeout = 900
    unit = "x mlx-lm"
    better = "smaller"

    def setup(self, prompt):
        require_prompts(prompt)
        import_mlx_lm()
        self.model = generate.llama()
        require_prompt(self.model, prompt)
        [self.tokens] = generate.prompts_of(self.model, [prompt])

    def plain(self):
        from mlx_lm.models.cache import make_prompt_cache

        first_token(self.model, mx.array(self.tokens), make_prompt_cache(self.model))
        settle()

    def paged(self):
        blocks = -(-(len(self.tokens) + 1) // BLOCK_SIZE)  # mlx-lm begins the second token
        store = import_mlx_lm().PagedStore(self.model, num_blocks=blocks, block_size=BLOCK_SIZE)
        with store:
            first_token(self.model, mx.array(self.tokens), store.cache(self.tokens))
            settle()

    def track_peak(self, prompt):
        plain, paged = peak(self.plain), peak(self.paged)
        return paged / plain


def peak(call):
    """Return the most bytes that MLX holds while `call` runs."""
    settle()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    call()
    return mx.get_peak_memory()


class _Cold:
    version = "1"
    timeout = 900
    unit = "s"
    better = "smaller"

    def setup_cache(self):
        # asv gives the benchmarks what is returned, once for both classes, unless it is None.
        try:
            require_cuda()
            import_mlx_lm()
        except NotImplementedError:
            return {}
        rng = np.random.default_rng(0)
        asked = {
            "prompt": 700,
            "prompts": rng.integers(32, 3001, 20).tolist(),
            "answers": rng.integers(8, 65, 20).tolist(),
        }
        return {side: cold.answers_of(side, **asked) for side in ("mlx-lm", "store")}

    setup_cache.timeout = 900

    def setup(self, found, side):
        require_cuda()
        import_mlx_lm()


class Cold(_Cold):
    """Seconds from the start of a process that finds no compiled kernel, to answers.

    Python and the model of random weights are part of it, on both sides. `track_first_token` is a
    prompt of 700 tokens, `track_answers` 20 more, of 32 to 3000 tokens with answers of 8 to 64,
    through `BatchGenerator`.
    """

    params = [["store", "mlx-lm"]]
    param_names = ["side"]

    def track_first_token(self, found, side):
        return found[side]["first_token"]

    def track_answers(self, found, side):
        return found[side]["answers"]


class ColdKernels(_Cold):
    """Kernels of the package that were made and called for the answers of `Cold`."""

    params = [["store"]]
    param_names = ["side"]
    unit = "kernels"

    def track_kernels(self, found, side):
        return found[side]["kernels"]


def require_cuda():
    """Raise NotImplementedError (n/a) where MLX compiles into no folder of the process's own."""
    require_gpu()
    if not mx.cuda.is_available():
        raise NotImplementedError("MLX has a folder for compiled kernels on CUDA alone")
