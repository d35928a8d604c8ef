"""What is written and read in place takes effect in the order of the calls, however late."""

import mlx.core as mx
import numpy as np
import pytest
from launching import BACKEND, emulate
from reference import attend_one

from pagedkv import OutOfBlocksError, PagedKVCache, PagedKVError, ScoreOptions
from pagedkv.attention.plan import AttentionPlan
from pagedkv.cache.in_place import InPlace

ON_GPU = BACKEND != "cpu"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


@pytest.fixture(scope="module", autouse=True)
def in_place(request):
    """Pools as on a GPU, which on a CPU is emulated."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            emulate(patch, request.getfixturevalue("emulator"))
        yield


@pytest.fixture
def without_the_chain(monkeypatch):
    """Every access takes the same evaluated array, as if there were no access before it."""

    class Nothing(list):
        def __setitem__(self, layer, last):
            built.append(last)

    built = []

    def begin(self, *arguments, whole=InPlace.__init__):
        whole(self, *arguments)
        self._last = Nothing(self._last)

    monkeypatch.setattr(InPlace, "__init__", begin)
    return built


def random(rng, *shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)


class Steps:
    """Sequences that begin, grow, fork and end at random, beside a NumPy model of what they hold.

    What is computed is not looked at before several steps have been built.
    """

    def __init__(self, seed, windows=(None, None), block_size=8, num_blocks=60):
        layers, self.windows = len(windows), windows
        self.rng = np.random.default_rng(seed)
        self.cache = PagedKVCache(
            num_layers=layers,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=mx.float32,
            windows=windows,
        )
        self.layers = range(layers)
        self.sequences = []  # of (table, K and V by layer, [L, Hkv, D] each)
        self.expected = []  # (output, what it should be), built and not looked at

    def begin(self):
        empty = np.zeros((0, KV_HEADS, HEAD_DIM), np.float32)
        self.sequences.append((self.cache.new_table(), [(empty, empty) for _ in self.layers]))
        return len(self.sequences) - 1

    def end(self, which):
        table, _ = self.sequences.pop(which)
        table.truncate(0)

    def step(self, chosen, count):
        """Extend sequences by `count` tokens each; the sequences that end make room."""
        try:
            step = self.cache.extend([self.sequences[i][0] for i in chosen], [count] * len(chosen))
        except OutOfBlocksError:
            self.end(self.rng.integers(len(self.sequences)))
            return
        shape = len(chosen), KV_HEADS, count, HEAD_DIM
        for layer in self.layers:
            keys, values = random(self.rng, *shape), random(self.rng, *shape)
            queries = 4 * random(self.rng, len(chosen), HEADS, count, HEAD_DIM)
            arrays, window = map(mx.array, (queries, keys, values)), self.windows[layer]
            # The emulated kernels run when they are called; this gather runs late.
            late = count == 1 and window is None and not ON_GPU
            path, scores = "gather_block_major" if late else "auto", ScoreOptions(window=window)
            out = step.attend(layer, *arrays, scale=0.125, path=path, scores=scores)
            for b, i in enumerate(chosen):
                held = self.sequences[i][1]
                held[layer] = tuple(
                    np.concatenate([old, new[b].swapaxes(0, 1)])
                    for old, new in zip(held[layer], (keys, values), strict=True)
                )
                self.expected.append((out, b, queries[b], *held[layer], window))
        step.commit()

    def fork(self, which):
        table, held = self.sequences[which]
        self.sequences.append((table.fork(), held[:]))

    def any_step(self):
        rng, alive = self.rng, len(self.sequences)
        what = rng.random()
        if alive < 2 or (what < 0.15 and alive < 6):
            self.step([self.begin()], int(rng.integers(9, 60)))  # a prompt: written in bulk
        elif what < 0.25:
            self.fork(rng.integers(alive))
        elif what < 0.4:
            self.end(rng.integers(alive))  # others take over its blocks at once
        else:
            chosen = rng.permutation(alive)[: rng.integers(1, alive + 1)].tolist()
            chosen = [i for i in chosen if self.sequences[i][0].num_tokens]
            if chosen:
                self.step(chosen, int(rng.choice([1, 1, 1, 2, 8])))

    def look(self):
        """Compare what was built with the model; return how many outputs were wrong."""
        outputs = {id(out): out for out, *_ in self.expected}
        mx.eval(list(outputs.values()))
        outputs = {key: np.array(out) for key, out in outputs.items()}
        wrong = 0
        for out, b, queries, keys, values, window in self.expected:
            got, count = outputs[id(out)][b], queries.shape[1]
            ends = [len(keys) - count + i + 1 for i in range(count)]
            seen = [slice(max(0, end - (window or end)), end) for end in ends]
            right = np.array(
                [
                    [
                        attend_one(q[i], keys[n, h // 2], values[n, h // 2], 0.125)
                        for i, n in enumerate(seen)
                    ]
                    for h, q in enumerate(queries)
                ]
            )
            wrong += not np.linalg.norm(got - right) <= 1e-3 * np.linalg.norm(right)
        self.expected.clear()
        return wrong

    def look_at_pools(self):
        """Compare all that the sequences hold, and a coming token sees, with the model."""
        cache = self.cache
        for layer, pools in enumerate(zip(cache.keys, cache.values, strict=True)):
            window, group = self.windows[layer], cache.group_of(layer)
            for table, held in self.sequences:
                blocks, offsets = np.divmod(np.arange(table.num_tokens), cache.block_size)
                slots = np.maximum(table.blocks[group, blocks], 0) * cache.block_size + offsets
                first = 0 if window is None else max(0, len(slots) + 1 - window)
                for pool, model in zip(pools, held[layer], strict=True):
                    rows = np.array(pool).reshape(-1, KV_HEADS, HEAD_DIM)[slots]
                    assert np.array_equal(rows[first:], model[first:])


@pytest.mark.parametrize("windows", [(None, None), (20, None, 20)], ids=["one group", "groups"])
def test_steps_that_run_late_hold_what_the_model_holds(windows):
    steps, wrong = Steps(seed=51, windows=windows), 0
    for number in range(3000 if ON_GPU else 60):
        steps.any_step()
        if number % 8 == 7:  # up to 8 steps at once, in whatever order MLX likes
            wrong += steps.look()
        if number % 40 == 39:
            steps.look_at_pools()
    steps.look_at_pools()
    assert wrong == 0


@pytest.mark.parametrize("windows", [(None, None), (20, None, 20)], ids=["one group", "groups"])
def test_without_the_chain_they_do_not(windows, without_the_chain):
    steps, wrong = Steps(seed=51, windows=windows), 0
    for number in range(400 if ON_GPU else 60):
        steps.any_step()
        if number % 8 == 7:
            wrong += steps.look()
    assert wrong > 0


def read_then_overwrite(path, built=()):
    """A long sequence is read, ends, and another one's prompt takes over its blocks at once.

    Return whether both saw what they should; `built` is evaluated with them.
    """
    num_tokens = 2**15 if ON_GPU else 64
    rng = np.random.default_rng(52)
    cache = PagedKVCache(
        num_layers=1,
        num_blocks=num_tokens // 16 + 1,
        block_size=16,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=mx.float32,
    )
    table, shape = cache.new_table(), (1, KV_HEADS, num_tokens, HEAD_DIM)
    keys, values, others = (mx.array(random(rng, *shape)) for _ in range(3))
    with cache.extend([table], [num_tokens]) as step:
        cache.write(0, keys, values, step.slots)
    queries = mx.array(random(rng, 1, HEADS, 1, HEAD_DIM))
    right = cache.attend(0, queries, step.batch, scale=0.125, path=path)
    mx.eval(right, others)
    read = cache.attend(0, queries, step.batch, scale=0.125, path=path)
    table.truncate(0)
    with cache.extend([cache.new_table()], [num_tokens]) as step:
        cache.write(0, others, others, step.slots)
    written = cache.attend(0, queries, step.batch, scale=0.125)
    mx.eval(read, written, *built)
    mx.synchronize()
    again = cache.attend(0, queries, step.batch, scale=0.125)
    return mx.array_equal(read, right).item() and mx.array_equal(written, again).item()


# The emulated kernels run when they are called, and so never late.
READERS = ["fused", "gather_rows"] if ON_GPU else ["gather_block_major"]


@pytest.mark.parametrize("path", READERS)
def test_who_takes_over_blocks_waits_for_who_read_them(path):
    assert all(read_then_overwrite(path) for _ in range(20))


@pytest.mark.parametrize("path", READERS)
def test_without_the_chain_nobody_waits(path, without_the_chain):
    assert not all(read_then_overwrite(path, without_the_chain) for _ in range(20))


def test_nothing_grows_under_way():
    """Many steps ahead of the device; an output of the newest access is all that is kept."""
    num_blocks = 4096 if ON_GPU else 512
    cache = PagedKVCache(
        num_layers=4, num_blocks=num_blocks, block_size=16, kv_heads=8, head_dim=128
    )
    pools = cache.memory_usage().allocated_bytes
    tables = [cache.new_table() for _ in range(2)]
    mx.random.seed(0)
    new = mx.random.normal((2, 8, 1, 128)).astype(mx.float16)
    queries = mx.random.normal((2, 8, 1, 128)).astype(mx.float16)
    mx.eval(new, queries)
    previous = None
    for number in range(256 if ON_GPU else 20):
        if number == 4:
            mx.synchronize()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
        out = queries
        with cache.extend(tables, [1, 1]) as step:
            for layer in range(4):
                out = step.attend(layer, out, new, new, scale=128**-0.5)
        mx.async_eval(out)
        if previous is not None:
            mx.eval(previous)
        previous = out
    mx.eval(previous)
    assert mx.get_peak_memory() - before <= pools // 100


def test_a_pool_that_somebody_assigns_to_is_not_the_caches():
    cache = PagedKVCache(num_layers=1, num_blocks=4, block_size=8, kv_heads=2, head_dim=64)
    with pytest.raises(TypeError, match="does not support item assignment"):
        cache.keys[0] = mx.ones((4, 8, 2, 64), mx.float16)
    with pytest.raises(AttributeError):
        cache.keys = [mx.ones((4, 8, 2, 64), mx.float16)]
    taken = cache.keys[0]
    taken[:] = 1
    assert not mx.any(cache.keys[0]).item()
    assert not mx.any(cache._store.pools(0)[0]).item()


def test_a_cache_stays_on_its_device():
    if not ON_GPU:
        pytest.skip("there is one device here")
    cache = PagedKVCache(num_layers=1, num_blocks=4, block_size=8, kv_heads=2, head_dim=64)
    one = mx.ones((1, 2, 1, 64), mx.float16)
    with cache.extend([cache.new_table()], [1]) as step:
        with mx.stream(mx.cpu), pytest.raises(ValueError, match="expected the default device"):
            step.attend(0, one, one, one, scale=1.0)
        step.attend(0, one, one, one, scale=1.0)


def accesses(cache):
    """How many accesses the newest one came after, in a cache of `counting` plans."""
    cache.wait()
    return int(cache._store.last(0).reshape(-1)[0].item())


@pytest.fixture
def counting(monkeypatch):
    """Attention that only counts: an output is one more than that of the access before."""

    def attend(self, queries, keys, values, scores, after=None, new=None, tables=None):
        number = after.reshape(-1)[:1] + 1 + 0 * new[0].reshape(-1)[:1]
        return mx.broadcast_to(number, queries.shape), None

    monkeypatch.setattr(AttentionPlan, "attend", attend)
    return PagedKVCache(
        num_layers=1, num_blocks=20, block_size=8, kv_heads=2, head_dim=64, dtype=mx.float32
    )


def step_of(cache, table, keys=None):
    """Begin a step of one token and attend; return it and the output."""
    one = mx.ones((1, 2, 1, 64))
    step = cache.extend([table], [1])
    return step, step.attend(0, one, one if keys is None else keys, one, scale=1.0)


def test_what_is_assigned_to_an_output_is_not_assigned_to_the_chain(counting):
    table = counting.new_table()
    for _ in range(3):
        step, out = step_of(counting, table)
        step.commit()
        out[:] = 0  # the caller's own array
    assert accesses(counting) == 3


def test_a_rollback_forgets_no_step_that_ended_before_the_one_that_failed(counting):
    """A step under way, one that ends, one that cannot be computed: the second is in the pools."""
    first, second, third = (counting.new_table() for _ in range(3))
    under_way = counting.extend([first], [1])
    step, _ = step_of(counting, second)
    step.commit()
    cannot = mx.linalg.inv(mx.zeros((1, 2, 64, 64)), stream=mx.cpu)[:, :, :1]
    failing, _ = step_of(counting, third, keys=cannot)
    under_way.rollback()
    failing.rollback()
    assert accesses(counting) == 1


def test_a_rollback_says_that_it_takes_later_steps_along(counting):
    """They came after the one that failed, and so could not be computed either."""
    first, second = counting.new_table(), counting.new_table()
    cannot = mx.linalg.inv(mx.zeros((1, 2, 64, 64)), stream=mx.cpu)[:, :, :1]
    failing, _ = step_of(counting, first, keys=cannot)
    step_of(counting, second)[0].commit()
    with pytest.raises(PagedKVError, match="later ones came after it"):
        failing.rollback()
    assert (first.num_tokens, second.num_tokens) == (0, 1)
    assert accesses(counting) == 0
    second.truncate(0)
    step_of(counting, second)[0].commit()
    assert accesses(counting) == 1


def test_a_large_output_is_not_kept_once_it_is_computed():
    """A prompt's, in every layer."""
    layers, tokens = 4, 1024 if ON_GPU else 256
    cache = PagedKVCache(
        num_layers=layers, num_blocks=80, block_size=16, kv_heads=1, head_dim=64, dtype=mx.float32
    )
    rng = np.random.default_rng(53)
    out, keys = (mx.array(random(rng, 1, heads, tokens, 64)) for heads in (32, 1))
    mx.eval(out, keys)
    one, before = out.nbytes, mx.get_active_memory()
    assert one > 2**20
    with cache.extend([cache.new_table()], [tokens]) as step:
        for layer in range(layers):
            out = step.attend(layer, out, keys, keys, scale=0.125)
    mx.eval(out)
    del out, step
    mx.synchronize()
    assert mx.get_active_memory() - before < one


def test_plans_of_calls_that_do_not_come_again_are_not_kept():
    """A scale of its own in each step, say."""
    cache = PagedKVCache(
        num_layers=1, num_blocks=20, block_size=8, kv_heads=2, head_dim=64, dtype=mx.float32
    )
    table, one = cache.new_table(), mx.ones((1, 2, 1, 64))
    for number in range(80):
        with cache.extend([table], [1]) as step:
            step.attend(0, one, one, one, scale=1 + number / 1000, path="fused")
    assert 0 < len(step.batch.carried) <= 40
