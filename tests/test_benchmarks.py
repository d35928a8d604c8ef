"""The suite itself: pure helpers, n/a rules, and the smallest cell of every benchmark class."""

import importlib
import importlib.metadata
import itertools
import pkgutil
import re
import time
from pathlib import Path

import asv.util
import mlx.core as mx
import numpy as np
import pytest
from asv_runner.statistics import compute_stats
from small_models import small_model

import benchmarks
from benchmarks import common, counted, generate, host, kinds, prompt, ratio, trace
from benchmarks.kinds import TimeBenchmark, TrackBenchmark
from benchmarks.ratio import RatioBenchmark

ROOT = Path(__file__).parents[1]
SMALLEST = (1, 1024, 32)
SMALLER = {
    "bits.Step": ("8", 1, 1024, 32),
    "groups.Step": (1, 1056, 32),  # more than a window
    "memory.Bandwidth": (1,),  # MiB
    "prompt.Attention": (64, 64),
    "prompt.AttentionBits": (64, 64),
    "prompt.Chunk": ("9 after 448",),
}
# What was bumped, because its numbers mean something else since.
VERSIONS = {"generate.Decode": "2", "generate.Skewed": "2", "generate.FirstToken": "2"}
MODULES = [name for _, name, _ in pkgutil.iter_modules(benchmarks.__path__)]


def benchmark_functions(cls):
    return [name for name in dir(cls) if re.match("(time|ratio|track)_", name)]


CLASSES = {
    f"{module}.{name}": value
    for module in MODULES
    for name, value in vars(importlib.import_module(f"benchmarks.{module}")).items()
    if isinstance(value, type) and name[0] != "_" and benchmark_functions(value)
}


@pytest.mark.parametrize(
    ("context", "block_size", "padded"),
    [(1, 16, 16), (16, 16, 16), (17, 16, 32), (1000, 32, 1024), (1024, 64, 1024)],
)
def test_padded_context(context, block_size, padded):
    assert common.padded_context(context, block_size) == padded


def test_kv_bytes():
    assert common.kv_bytes(1, 1024, 32) == 2 * 1024 * 8 * 128 * 2
    assert common.kv_bytes(4, 1000, 64) == 4 * 2 * 1024 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("cell", "on_cpu", "on_gpu"),
    [
        ((1, 1024, 32), 16, 32),
        ((1, 4096, 16), 4, 32),
        ((4, 4096, 64), 2, 32),
        ((4, 32768, 16), 2, 8),
    ],
)
def test_layers(cell, on_cpu, on_gpu, monkeypatch):
    for count, gpu in [(on_cpu, False), (on_gpu, True)]:
        monkeypatch.setattr(common, "on_gpu", lambda gpu=gpu: gpu)
        assert common.layers(*cell) == count


def test_tables_are_scattered_over_twice_the_blocks():
    tables, num_blocks = common.block_tables(2, 64, 32)
    assert num_blocks == 8
    assert tables == [[7, 5], [3, 1]]
    tables, num_blocks = common.block_tables(2, 4096, 32, "random")
    ids = list(itertools.chain(*tables))
    assert num_blocks == 512
    assert len(set(ids)) == len(ids) == 256
    assert np.abs(np.diff(ids)).mean() > 50
    assert tables == common.block_tables(2, 4096, 32, "random")[0]


@pytest.mark.parametrize("layout", ["block_major", "head_major"])
def test_workload_is_seeded_and_its_contiguous_copy_reads_the_tables_slots(layout):
    cell = common.workload(2, 64, 16, num_layers=2, layout=layout)
    again = common.workload(2, 64, 16, num_layers=2, layout=layout)
    assert np.array_equal(np.array(cell.queries), np.array(again.queries))
    tables, _ = common.block_tables(2, 64, 16)
    for layer, same in zip(cell.layers, again.layers, strict=True):
        assert np.array_equal(np.array(layer.value_pool), np.array(same.value_pool))
        pool = np.array(layer.key_pool)
        for b, position in [(0, 0), (0, 63), (1, 17)]:
            block, offset = tables[b][position // 16], position % 16
            row = pool[block, offset, 3] if layout == "block_major" else pool[3, block, offset]
            assert np.array_equal(np.array(layer.keys[b, 3, position]), row)
            assert np.abs(row).min() > 0
    assert not np.array_equal(np.array(cell.layers[0].keys), np.array(cell.layers[1].keys))


def test_no_variable_turns_a_cell_into_one_that_is_not_applicable(monkeypatch):
    """asv would write that over the number it has."""
    monkeypatch.setenv("PAGEDKV_GRID", "quick")
    common.require_cell(1, 16384, 16, copies=1)


def test_a_cell_that_does_not_fit_is_not_applicable(monkeypatch):
    monkeypatch.setattr(common, "machine_memory", lambda: 2**20)
    message = r"needs 0\.0 GiB, more than 70% of 0\.0 GiB"
    with pytest.raises(NotImplementedError, match=message) as error:
        common.require_cell(*SMALLEST, copies=1)
    assert error.value.why == "too large"


def test_a_slow_call_is_not_applicable(monkeypatch):
    monkeypatch.setattr(common, "LONGEST_CALL", 0.01)
    common.require_fast(lambda: None)
    with pytest.raises(NotImplementedError, match="one call takes") as error:
        common.require_fast(lambda: time.sleep(0.02))
    assert error.value.why == "too slow"


def test_one_stall_beside_the_compiler_is_not_slow(monkeypatch):
    monkeypatch.setattr(common, "LONGEST_CALL", 0.01)
    seconds = iter([0.02, 0.02, 0.0])  # compiles, stalls, runs
    common.require_fast(lambda: time.sleep(next(seconds)))


def test_a_name_the_commit_lacks_is_not_applicable():
    with pytest.raises(NotImplementedError, match="no radix_tree_of_2030 at this commit"):
        common.feature("radix_tree_of_2030")
    with pytest.raises(NotImplementedError, match="no decode path warp at this commit"):
        common.decode_path("warp")


def test_require_path_notices_another_path(monkeypatch):
    cell = common.workload(1, 64, 16, num_layers=1)
    common.require_path(cell, "gather_block_major")
    attend = cell.paged
    monkeypatch.setattr(common.Workload, "paged", lambda self, path: attend("gather_block_major"))
    with pytest.raises(AssertionError, match=r"expected warp, ran \['gather_block_major'\]"):
        common.require_path(cell, "warp")
    with pytest.raises(AssertionError, match=r"auto, expected \w+, ran \['gather_block_major'\]"):
        common.require_path(cell, "auto")


def test_require_path_notices_that_auto_is_forced(monkeypatch):
    cell = common.workload(1, 64, 16, num_layers=1)
    common.require_path(cell, "auto")
    monkeypatch.setenv("PAGEDKV_DECODE_PATH", "gather_block_major")
    again = common.workload(1, 64, 16, num_layers=1)
    with pytest.raises(AssertionError, match="package's choice, got PAGEDKV_DECODE_PATH=gather_b"):
        common.require_path(again, "auto")


def test_a_commit_that_says_nothing_of_its_choice_runs_what_it_runs(monkeypatch):
    monkeypatch.delattr(common.pagedkv, "explain")
    common.require_path(common.workload(1, 64, 16, num_layers=1), "auto")


def test_require_path_notices_a_wrong_result():
    cell = common.workload(1, 64, 16, num_layers=1)
    cell.layers[0].values = mx.roll(cell.layers[0].values, 1, axis=1)
    with pytest.raises(AssertionError, match="off from contiguous attention"):
        common.require_path(cell, "auto")


def attribute(cls, function, name):
    """Return an attribute as asv looks for it: of the function, then of the class."""
    return getattr(getattr(cls, function), name, None) or getattr(cls, name)


@pytest.mark.parametrize("name", CLASSES)
def test_class_describes_itself(name):
    cls = CLASSES[name]
    assert cls.version == VERSIONS.get(name, "1")
    assert len(cls.param_names) == len(cls.params)
    assert cls.__doc__
    for function in benchmark_functions(cls):
        if not function.startswith("time_"):
            assert attribute(cls, function, "unit")
        if function.startswith("track_"):
            assert attribute(cls, function, "better") in ("smaller", "larger")


def test_numpys_version_is_a_number_that_orders_versions(monkeypatch):
    for version, number in [("2.4.6", 20406), ("2.10.0", 21000), ("2.5.0rc1", 20500)]:
        monkeypatch.setattr(np, "__version__", version)
        assert host.NumPy().track_version() == number


# Not applicable on a CPU, and nothing else is.
ON_A_GPU = {
    "settled.BlockSize",
    "decode.Fused",
    "decode.Mixed",
    "overhead.Batch16",
    "overhead.Fused",
    "prompt.Cold",
    "prompt.ColdKernels",
    "step.Batch16",
    "step.BoundBatch16",
    "step.WaitingBatch16",
}


@pytest.mark.parametrize("name", sorted(ON_A_GPU))
@pytest.mark.skipif(common.on_gpu(), reason="there is a GPU here")
def test_what_needs_a_gpu_is_not_applicable_without(name):
    instance = CLASSES[name]()
    with pytest.raises(NotImplementedError, match=r"measured on a GPU|fused does not run on"):
        instance.setup(*cached(instance), *(values[0] for values in instance.params))


def cached(instance):
    """Return what asv gives a benchmark before its parameters."""
    found = instance.setup_cache() if hasattr(instance, "setup_cache") else None
    return () if found is None else (found,)


# Start two servers, as tests of their own do.
SERVED = {"server.Requests", "trace.Served"}


def runs_here():
    """The benchmarks that have a number on this machine, and no test of their own."""
    lacking = SERVED if common.on_gpu() else SERVED | ON_A_GPU
    try:
        counted.require_retired()
    except NotImplementedError:
        lacking |= {name for name in CLASSES if name.endswith("Retired")}
    return sorted(set(CLASSES) - lacking)


@pytest.mark.parametrize("name", runs_here())
def test_smallest_cell_runs(name, monkeypatch):
    cls = CLASSES[name]
    if name.startswith(("generate.", "prompt.", "trace.")):
        pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
        monkeypatch.setattr(generate, "llama", lambda: small_model("llama"))  # quick on a CPU
        monkeypatch.setattr(prompt, "gemma", lambda: small_model("gemma3_text"))
        small = trace.Shape(4, 8, (6, 0.5, 2, 9), (3, 0.5, 2, 4), 8)
        monkeypatch.setattr(trace, "shape", lambda: small)
    for module in MODULES:
        if hasattr(importlib.import_module(f"benchmarks.{module}"), "layers"):
            monkeypatch.setattr(f"benchmarks.{module}.layers", lambda *cell: 2)
    if hasattr(cls, "num_blocks"):  # pools of gigabytes, far larger than a cell's tables
        monkeypatch.setattr(cls, "num_blocks", 64)
    instance = cls()
    smallest_first = tuple(values[0] for values in cls.params)
    cell = SMALLEST if cls.params[1:2] == [common.CONTEXTS] else smallest_first
    cell = (*cached(instance), *SMALLER.get(name, cell))
    getattr(instance, "setup", lambda *cell: None)(*cell)
    for function in benchmark_functions(cls):
        result = getattr(instance, function)(*cell)
        if function.startswith("ratio_"):
            for call in result:
                call()
                getattr(instance, "between", lambda: None)()
        elif function.startswith("track_"):
            assert result > 0
        else:
            assert result is None
    getattr(instance, "teardown", lambda *cell: None)(*cell)


def test_host_share_is_of_the_calls_after_the_first(monkeypatch):
    clock = Clock(candidate=[99, 4, 6], baseline=[])
    clock.thread_time = lambda: clock.computed
    clock.computed = 0.0
    monkeypatch.setattr(common, "time", clock)
    call = clock.caller("candidate")

    def measured():
        clock.computed += 2
        call()

    def between():
        clock.now += 1000
        clock.computed += 1000

    assert common.host_share(measured, between, times=2) == (2 + 2) / (4 + 6)
    assert clock.calls == ["candidate"] * 3


@pytest.mark.parametrize("name", [n for n in CLASSES if hasattr(CLASSES[n], "track_host_share")])
def test_host_share_is_of_the_packages_side(name, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "host_share", lambda call, between: asked.append(call) or 0.5)
    instance = CLASSES[name]()
    instance.ours = lambda: "ours"
    assert instance.track_host_share(1, 2) == 0.5
    assert asked == ["ours"]
    assert attribute(CLASSES[name], "track_host_share", "unit") == "of wall time"
    assert attribute(CLASSES[name], "track_host_share", "better") == "smaller"


def test_asv_takes_what_a_method_says_before_what_its_class_says():
    instance = CLASSES["generate.Decode"]()
    listed = TrackBenchmark("x", instance.track_host_share, [instance.track_host_share, instance])
    assert (listed.unit, listed.better) == ("of wall time", "smaller")
    assert (instance.unit, instance.better) == ("x mlx-lm", "larger")


def ratio_benchmark(function, **attributes):
    source = type("Source", (), {"ratio_it": staticmethod(function), **attributes})
    return RatioBenchmark("ratio_it", function, [source])


class Clock:
    """Stands in for `time`: every call costs what the script says, and nothing else does."""

    def __init__(self, candidate, baseline):
        self.now, self.calls = 0.0, []
        self.costs = {"candidate": iter(candidate), "baseline": iter(baseline)}

    def perf_counter(self):
        return self.now

    def caller(self, name):
        def call():
            self.calls.append(name)
            self.now += next(self.costs[name])

        return call

    def pair(self):
        return self.caller("candidate"), self.caller("baseline")


def test_ratio_is_candidate_over_the_baselines_around_it(monkeypatch):
    # First of each: the warm-up.
    clock = Clock(candidate=[99, 3, 6, 5], baseline=[99, 1, 2, 2, 3])
    monkeypatch.setattr(ratio, "time", clock)
    result = ratio_benchmark(clock.pair, repeat=(3, 3, 0), warmup_time=0).run()
    assert result == {"samples": [2.0, 3.0, 2.0], "number": 1}
    assert clock.calls == ["baseline", "candidate"] * 4 + ["baseline"]


def test_ratio_cancels_linear_drift(monkeypatch):
    clock = Clock(candidate=[0, 4, 8, 12], baseline=[0, 1, 3, 5, 7])
    monkeypatch.setattr(ratio, "time", clock)
    samples = ratio_benchmark(clock.pair, repeat=(3, 3, 0), warmup_time=0).run()["samples"]
    assert samples == [2.0, 2.0, 2.0]


def test_what_runs_between_calls_is_in_no_time(monkeypatch):
    clock = Clock(candidate=[99, 3, 3], baseline=[99, 1, 1, 1])
    monkeypatch.setattr(ratio, "time", clock)

    def between():
        clock.calls.append("between")
        clock.now += 1000

    found = ratio_benchmark(clock.pair, repeat=2, warmup_time=0, between=staticmethod(between))
    assert found.run()["samples"] == [3.0, 3.0]
    assert clock.calls == ["baseline", "between", "candidate", "between"] * 3 + [
        "baseline",
        "between",
    ]


@pytest.mark.parametrize(
    ("repeat", "count"),
    [((3, 10, 0), 3), ((2, 4, 60), 4), (7, 7), ([2, 2, 1.0], 2), ((2, 9, 6), 3)],
)
def test_ratio_honours_repeat(repeat, count, monkeypatch):
    clock = Clock(candidate=itertools.repeat(1), baseline=itertools.repeat(1))
    monkeypatch.setattr(ratio, "time", clock)
    assert len(ratio_benchmark(clock.pair, repeat=repeat, warmup_time=0).run()["samples"]) == count


def test_ratio_is_registered_and_matches_only_its_prefix():
    from asv_runner.benchmarks import benchmark_types

    assert benchmark_types[:3] == [RatioBenchmark, TimeBenchmark, TrackBenchmark]
    assert RatioBenchmark.name_regex.match("ratio_vs_contiguous")
    assert not RatioBenchmark.name_regex.match("time_ratio")


@pytest.mark.parametrize(
    ("attributes", "better"), [({"better": "larger"}, "larger"), ({}, "smaller")]
)
def test_asv_lists_which_direction_is_better(attributes, better):
    def track_it():
        pass

    listed = TrackBenchmark("track_it", track_it, [type("Source", (), attributes)])
    assert vars(listed)["better"] == better
    assert listed.type == "track"


def lacking(error):
    """A source of a benchmark whose setup raises."""

    def setup(self):
        if error:
            raise error

    return type("Source", (), {"setup": setup, "number": 3})()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NotImplementedError("no such path"), "lacks"),
        (kinds.NotApplicableError("a second", "too slow"), "too slow"),
        (kinds.NotApplicableError("a GiB", "too large"), "too large"),
    ],
)
@pytest.mark.parametrize("kind", [RatioBenchmark, TimeBenchmark, TrackBenchmark])
def test_why_a_cell_is_not_applicable_is_stored(kind, error, why):
    """As asv's process and asv itself do it: set up, run, statistics of the samples."""
    cell = kind("time_it", lambda: None, [lacking(error)])
    assert cell.do_setup() is False
    said = cell.do_run()
    value, stats = compute_stats(said["samples"], said["number"])
    assert np.isnan(value)
    assert kinds.WHY[stats["number"]] == why


def test_a_cell_that_is_applicable_in_a_later_round_is_timed():
    """asv hands the number of calls of the first round on."""
    cell = TimeBenchmark("time_it", lambda: None, [lacking(None)])
    cell.number = next(iter(kinds.WHY))
    assert cell.do_setup() is False
    said = cell.do_run()
    assert said["number"] == 3
    assert not np.isnan(said["samples"]).any()


def test_asv_runner_is_the_same_in_tests_and_in_measurements():
    conf = asv.util.load_json(ROOT / "asv.conf.json", js_comments=True)
    (pinned,) = conf["matrix"]["req"]["pip+asv_runner"]
    assert importlib.metadata.version("asv_runner") == pinned
