"""What the index of cached prefixes costs on the host: look up, cache, forget; blocks of 32."""

import tracemalloc

import numpy as np

from .common import feature

BLOCK_SIZE = 32
RUN = 8192  # tokens of the prompts that fill the tree


def _pool(tokens):
    feature("RadixTree")
    return feature("BlockPool")(2 * (tokens + 2**16) // BLOCK_SIZE)


def _tree(tokens, pool):
    """Return a tree of up to `tokens` seeded tokens, in prompts that share nothing."""
    rng = np.random.default_rng(0)
    tree = feature("RadixTree")(pool, BLOCK_SIZE)
    while True:
        prompt = rng.integers(0, 100_000, RUN, dtype=np.int32)
        if (tree.num_blocks + RUN // BLOCK_SIZE) * BLOCK_SIZE > tokens:
            return tree
        _insert(tree, prompt)


def _insert(tree, prompt):
    blocks = tree.pool.allocate(len(prompt) // BLOCK_SIZE)
    tree.insert(prompt, blocks)
    tree.pool.release(blocks)


class _Tree:
    """A prompt of 32768 tokens (8192 for the smallest tree)."""

    version = "1"
    params = [[10_000, 100_000, 1_000_000]]
    param_names = ["tokens"]
    timeout = 600

    def setup(self, tokens):
        if not hasattr(self, "tree"):
            self.tree = _tree(tokens, _pool(tokens))
            self.rng = np.random.default_rng(1)
            self.length = 8192 if tokens < 32768 else 32768
        self.prepare()

    def new_prompt(self):
        return self.rng.integers(0, 100_000, self.length, dtype=np.int32)


class Match(_Tree):
    """`RadixTree.match_prefix` of a cached prompt, one run of blocks. The goal is 1.6 ms."""

    def prepare(self):
        if not hasattr(self, "prompt"):
            self.prompt = self.new_prompt()
            _insert(self.tree, self.prompt)

    def time_match(self, tokens):
        self.tree.match_prefix(self.prompt)


class MatchBlocks(Match):
    """The same where another prompt branches off after every block: a node for each."""

    def prepare(self):
        if hasattr(self, "prompt"):
            return
        super().prepare()
        for start in range(0, self.length - BLOCK_SIZE, BLOCK_SIZE):
            branch = np.append(self.prompt[: start + BLOCK_SIZE], np.full(BLOCK_SIZE, -1, np.int32))
            match = self.tree.match_prefix(branch)
            self.tree.insert(branch, [*match.blocks, *self.tree.pool.allocate(1)])


class Insert(_Tree):
    """`RadixTree.insert` of a prompt that is not cached. The goal is 6.5 ms."""

    number = 1
    warmup_time = 0
    repeat = (5, 50, 2.0)

    def prepare(self):
        self.tree.evict(self.length // BLOCK_SIZE)
        self.prompt = self.new_prompt()
        self.blocks = self.tree.pool.allocate(self.length // BLOCK_SIZE)

    def time_insert(self, tokens):
        self.tree.insert(self.prompt, self.blocks)
        self.tree.pool.release(self.blocks)


class Evict(_Tree):
    """`RadixTree.evict` of 100 blocks, one after the other, as a full pool asks for them."""

    number = 1
    warmup_time = 0
    repeat = (5, 50, 2.0)

    def prepare(self):
        self.tree.evict(self.length // BLOCK_SIZE)
        _insert(self.tree, self.new_prompt())

    def time_evict(self, tokens):
        for _ in range(100):
            self.tree.evict(1)


class IndexBytes(_Tree):
    """Bytes that the tree takes on the host for each cached token (of K and V: thousands)."""

    unit = "bytes/token"
    better = "smaller"

    def setup(self, tokens):
        _tree(10_000, _pool(10_000))  # what the first use of anything allocates is not the tree's
        self.pool = _pool(tokens)

    def track_bytes(self, tokens):
        tracemalloc.start()
        tree = _tree(tokens, self.pool)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size / (tree.num_blocks * BLOCK_SIZE)
