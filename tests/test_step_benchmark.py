"""What `benchmarks/step.py` measures is a whole step: planned, written, attended and right."""

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from benchmarks import caches, common, counted, step
from benchmarks.caches import Attended, Bound, Contiguous, Copied, Extended, Written
from pagedkv.cache.donated import Donated
from pagedkv.cache.in_place import InPlace

CELL = (2, 256, 32)
STEPS = 5
# On a GPU a pool that is read without the cache is not ordered among later writes.
OVER_A_CACHE = [Attended] if common.on_gpu() else [Attended, Extended, Written]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(step, "num_steps", lambda: STEPS)


@pytest.mark.parametrize(
    ("owner", "lacking", "kind"),
    [
        (pagedkv, "PagedKVCache", Copied),
        (pagedkv.PagedKVCache, "extend", Written),
        (pagedkv.Step, "attend", Extended),
        (pagedkv, "explain", Attended),
    ],
)
def test_each_commit_takes_the_step_that_it_has(owner, lacking, kind, monkeypatch):
    monkeypatch.delattr(owner, lacking)
    assert type(caches.paged(CELL, 1, STEPS)) is kind


@pytest.mark.parametrize("kind", [*OVER_A_CACHE, Copied])
def test_every_way_to_take_a_step_is_right(kind, monkeypatch):
    monkeypatch.setattr(step, "paged", kind)
    step.require_step(*CELL)


def lose_tokens_of_step(number, monkeypatch):
    """Let whatever writes K and V leave out the tokens of one step."""
    seen = []

    def lost(new):
        if new is None or new[0].shape[2] > 1:
            return False
        seen.append(new)
        return (len(seen) - 1) % STEPS == number

    def attend(self, layer, plan, queries, scores, new=None, *, whole=InPlace.attend):
        return whole(self, layer, plan, queries, scores, None if lost(new) else new)

    def write(self, layer, new, slots, *, whole=Donated.write):
        if not lost(new):
            whole(self, layer, new, slots)

    monkeypatch.setattr(InPlace, "attend", attend)
    monkeypatch.setattr(Donated, "write", write)


@pytest.mark.parametrize("number", range(STEPS))
@pytest.mark.parametrize("kind", OVER_A_CACHE)
def test_a_step_that_writes_nothing_is_noticed(kind, number, monkeypatch):
    lose_tokens_of_step(number, monkeypatch)
    monkeypatch.setattr(step, "paged", kind)
    monkeypatch.setattr(step, "require_fast", lambda call: None)
    with pytest.raises(AssertionError, match=f"step {number} is off from contiguous attention"):
        step.require_step(*CELL)


@pytest.mark.parametrize("kind", [*OVER_A_CACHE, Copied])
def test_k_and_v_of_every_step_and_layer_land_in_its_sequence(kind):
    inputs = step.Generation(*CELL[:2], 2, STEPS)
    cache = kind(CELL, 2, STEPS, inputs.contents)
    cache.back = lambda: None
    inputs.run(cache)
    batch, context, _ = CELL
    if hasattr(cache, "length"):
        assert cache.length == context + STEPS
        tables = cache.tables
    else:
        assert [table.num_tokens for table in cache.tables] == [context + STEPS] * batch
        tables = [table.block_ids for table in cache.tables]
    for layer in range(2):
        for number, pools in enumerate(cache.pools()):
            pool = np.array(pools[layer])
            held = np.array(inputs.contents[layer][number])
            for row, table in enumerate(tables):
                rows = pool[np.array(table)].reshape(-1, common.KV_HEADS, common.HEAD_DIM)
                assert np.array_equal(rows[:context], held[row].swapaxes(0, 1))
                for n in range(STEPS):
                    new = np.array(inputs.new[n][layer][number])[row, :, 0]
                    assert np.abs(new).max() > 0
                    assert np.array_equal(rows[context + n], new)


def test_a_step_is_planned_and_attends_in_every_layer(monkeypatch):
    attended, attend = [], pagedkv.Step.attend

    def counted(self, layer, *arguments, **options):
        attended.append((self.batch, layer))
        return attend(self, layer, *arguments, **options)

    monkeypatch.setattr(pagedkv.Step, "attend", counted)
    inputs = step.Generation(*CELL[:2], 3, STEPS)
    cache = caches.paged(CELL, 3, STEPS, inputs.contents)
    inputs.run(cache)
    assert [layer for _, layer in attended] == [0, 1, 2] * STEPS
    lens = [batch.lens.tolist() for batch, _ in attended[::3]]
    assert lens == [[CELL[1] + n + 1] * CELL[0] for n in range(STEPS)]
    assert len({id(batch) for batch, _ in attended}) == STEPS


def test_blocks_of_a_sequence_lie_scattered():
    for kind in (Attended, Written):
        cache = kind((2, 1024, 32), 1, STEPS)
        for table in cache.tables:
            ids = np.array(getattr(table, "block_ids", table))
            assert np.abs(np.diff(ids)).mean() > 10


@pytest.mark.parametrize("kind", [*OVER_A_CACHE, Copied, Contiguous])
def test_every_sample_starts_from_the_same_and_nothing_grows(kind):
    inputs = step.Generation(*CELL[:2], 2, STEPS)
    cache = kind(inputs.contents) if kind is Contiguous else kind(CELL, 2, STEPS, inputs.contents)
    first = [np.array(out) for out in inputs.run(cache)]
    mx.synchronize()
    held = mx.get_active_memory()
    for _ in range(3):
        again = inputs.run(cache)
        # MLX takes another kernel once the contiguous cache has grown.
        apart = 1e-2 if kind is Contiguous else 0
        for out, same in zip(first, again, strict=True):
            assert np.allclose(out, np.array(same), apart, apart)
    del again
    mx.synchronize()
    assert mx.get_active_memory() <= held + 2**16


def test_the_bound_attends_over_what_the_contiguous_cache_holds():
    inputs = step.Generation(*CELL[:2], 2, STEPS)
    expected = inputs.run(Contiguous(inputs.contents))
    bound = Bound(inputs.contents, inputs.new)
    before = [id(layer.keys) for layer in bound.layers]
    for out, right in zip(inputs.run(bound), expected, strict=True):
        assert np.allclose(np.array(out), np.array(right), 1e-2, 1e-2 if common.on_gpu() else 0)
    assert [id(layer.keys) for layer in bound.layers] == before


class Recorder:
    """A cache and an MLX that say in which order a generation builds, starts and awaits steps."""

    def __init__(self):
        self.said = []

    def step(self, queries, new):
        number = sum(what.startswith("build") for what in self.said)
        self.said.append(f"build {number} of {queries}")
        return [number]

    def back(self):
        self.said.append("back")

    def async_eval(self, out):
        self.said.append(f"start {out[0]}")

    def eval(self, outputs):
        for out in outputs:
            self.said.append(f"wait {out[0] if isinstance(out, list) else out}")


@pytest.mark.parametrize(
    ("ahead", "order"),
    [
        (True, "build start build start wait build start wait wait wait wait back"),
        (False, "build start wait build start wait build start wait wait wait wait back"),
    ],
)
def test_one_step_is_in_flight_while_the_next_is_built(ahead, order, monkeypatch):
    inputs = step.Generation(1, 32, 1, 3)
    recorder = Recorder()
    monkeypatch.setattr(step, "mx", recorder)
    inputs.queries = [["a"], ["b"], ["c"]]
    inputs.run(recorder, ahead=ahead)
    assert [what.split()[0] for what in recorder.said] == order.split()
    # The queries follow from the output before.
    assert [what for what in recorder.said if what.startswith("build")] == [
        "build 0 of ['a']",
        "build 1 of ['b', 0]",
        "build 2 of ['c', 1]",
    ]


def test_instructions_of_a_step_are_the_same_each_time():
    counts = []
    for _ in range(2):
        benchmark = step.Instructions()
        benchmark.setup(8)
        counts += [benchmark.track_instructions(8), benchmark.track_instructions(8)]
    assert len(set(counts)) == 1
    assert benchmark.cache.tables[0].num_tokens == benchmark.context


def test_three_percent_more_instructions_are_seen(monkeypatch):
    benchmark = step.Instructions()
    benchmark.setup(1)
    before = benchmark.track_instructions(1)
    extend = pagedkv.PagedKVCache.extend
    more = counted.instructions(lambda: pagedkv.blocks_needed(1, 2))
    times = -int(-0.03 * before // more)

    def slower(self, tables, counts):
        for _ in range(times):
            pagedkv.blocks_needed(1, 2)
        return extend(self, tables, counts)

    monkeypatch.setattr(pagedkv.PagedKVCache, "extend", slower)
    after = benchmark.track_instructions(1)
    assert 1.03 < after / before < 1.04 + 2 * more / before
