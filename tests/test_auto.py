"""`auto` on a GPU that nobody has measured, faked: its fused kernel is a gather with a name.

A clock that only calls move makes the times what a test says.
"""

import gc
import itertools
import json
import math
import sys
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cases import ON_CPU, OPTIONS, TOLERANCE, Case, assert_close, poison, score_options
from test_codes import coded
from test_kv_cache import cache, extend
from test_step import SCALE, inputs

from pagedkv import explain, kernels
from pagedkv.attention import auto, calls, findings, measured, paths, plan

NAME = "A GPU of nobody"
PLAIN = None, None  # bits of K and V


class Fake:
    """A GPU: how long calls take on it in seconds, and what its fused kernel does."""

    def __init__(self):
        self.now = 0.0
        self.seconds = {"fused": 0.001, "gather_rows": 0.002, "gather_rows_grouped": 0.003}
        self.calls = []
        self.prepare = paths._prepare_grouped
        self.wrong = lambda out: out
        self.rounding = lambda out: out

    def attend(self, name, really):
        def call(*arguments):
            self.calls.append(name)
            self.now += self.seconds[name]
            out, last = really(*arguments)
            return (self.wrong(out) if name == "fused" else self.rounding(out)), last

        return call

    def paths(self):
        table = dict(paths.DECODE_PATHS)
        table["fused"] = replace(
            table["gather_rows_grouped"],
            prepare=lambda *arguments: self.prepare(*arguments),
            writes=False,
        )
        for name in self.seconds:
            table[name] = replace(table[name], attend=self.attend(name, table[name].attend))
        return table


@pytest.fixture(autouse=True)
def folder(cache_folder, monkeypatch):
    monkeypatch.delenv("PAGEDKV_AUTOTUNE", raising=False)
    return cache_folder


@pytest.fixture
def gpu(monkeypatch):
    fake = Fake()
    table = fake.paths()
    for module in (auto, calls, paths, plan):
        monkeypatch.setattr(module, "DECODE_PATHS", table)
    monkeypatch.setattr(auto, "gpu_name", lambda device: NAME)
    monkeypatch.setattr(measured, "perf_counter", lambda: fake.now)
    return fake


def told(case, path="auto", **options):
    arrays = case.queries, case.keys, case.values, case.batch()
    return explain(*arrays, scale=case.scale, path=path, scores=score_options(options))


@pytest.mark.parametrize("faster", ["fused", "gather_rows"])
def test_the_first_call_of_a_kind_measures(gpu, folder, faster):
    gpu.seconds[faster] = 0.0005
    case = Case([20, 33])
    assert_close(case.attend("auto"), case.expected(), mx.float32)
    assert gpu.calls[-1] == faster
    assert gpu.calls.count("fused") >= 3
    gpu.calls.clear()
    longer = Case([20, 34])
    assert_close(longer.attend("auto"), longer.expected(), mx.float32)
    assert gpu.calls == [faster]
    assert told(case).path == faster
    findings.findings.cache_clear()  # the next process
    longer.attend("auto")
    assert gpu.calls == [faster] * 2
    assert told(case).because.startswith("measured here on 2")
    [kinds] = json.loads((folder / "measured.json").read_text()).values()
    assert list(kinds) == ["float32 D=64 Hkv=2 G=4 S=16 Q=1 B<=2 tokens<=128"]


def test_preparing_is_not_timed_again_and_again(gpu):
    made = []
    prepare = gpu.prepare
    gpu.prepare = lambda *arguments: made.append(1) or prepare(*arguments)
    Case([20, 33]).attend("auto")
    assert len(made) == 2  # the trial and the plan


def test_explain_measures_if_nothing_has(gpu):
    case = Case([20, 33])
    explanation = told(case)
    assert explanation.path == "fused"
    assert explanation.because == "measured here by this process: fused 1 ms, gather_rows 2 ms"
    gpu.calls.clear()
    case.attend("auto")
    assert gpu.calls == ["fused"]


@pytest.mark.parametrize("wrong", [lambda out: out * 1.5, lambda out: out * math.nan])
def test_a_wrong_kernel(gpu, wrong):
    gpu.wrong = wrong
    case = Case([20, 33])
    with pytest.warns(RuntimeWarning, match="fused's results .*Such calls take gather_rows inst"):
        out = case.attend("auto")
    assert_close(out, case.expected(), mx.float32)
    assert told(case).path == "gather_rows"
    assert "measured here by this process: fused's results" in told(case).because


def test_a_kernel_that_cannot_be_prepared(gpu):
    def prepare(*arguments):
        raise ValueError("no such constant")

    gpu.prepare = prepare
    case = Case([20, 33])
    with pytest.warns(RuntimeWarning, match="fused raised ValueError: no such constant"):
        out = case.attend("auto")
    assert_close(out, case.expected(), mx.float32)


def test_the_rival_is_the_first_gather_that_knows_the_options(gpu):
    case = Case([20, 33])
    assert "gather_rows 2 ms" in told(case, window=7).because
    assert "gather_rows_grouped 3 ms" in told(case, softcap=3.0).because


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["none", *OPTIONS])
def test_float32_decides_where_the_gather_rounds(gpu, dtype, options):
    """Over the batch's own blocks, whatever lies in others."""
    gpu.rounding = lambda out: out if out.dtype == mx.float32 else out * 1.5
    case = Case([5, 33, 100], dtype=dtype, query_len=2)
    poison(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told(case, **OPTIONS.get(options, {})).path == "fused"


def same_as_table(gpu, folder, case, because, path="auto"):
    explanation = told(case, path)
    assert explanation.because == because
    case.attend(path)
    assert gpu.calls in ([], [explanation.path])  # not all are counted
    assert not folder.exists()


def test_the_environment_turns_it_off(gpu, folder, monkeypatch):
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", "0")
    same_as_table(gpu, folder, Case([20]), "the package's table, PAGEDKV_AUTOTUNE=0")


@pytest.mark.parametrize("setting", ["", "1"])
def test_the_environment_leaves_it_on(gpu, monkeypatch, setting):
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", setting)
    assert told(Case([20])).because.startswith("measured here")


def test_an_unknown_setting(monkeypatch):
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="expected PAGEDKV_AUTOTUNE to be 0 or 1, got 'yes'"):
        Case([20]).attend("auto")
    Case([20]).attend("gather_rows")  # does not ask


def test_a_forced_path_is_not_measured(gpu, folder, monkeypatch):
    same_as_table(gpu, folder, Case([20]), "asked for by name", "gather_rows_grouped")
    gpu.calls.clear()
    monkeypatch.setenv("PAGEDKV_DECODE_PATH", "gather_rows")
    same_as_table(gpu, folder, Case([20]), "PAGEDKV_DECODE_PATH=gather_rows")


def test_what_the_kernel_cannot_take_is_not_measured(gpu, folder, monkeypatch):
    reason = "many query tokens"
    table = auto.DECODE_PATHS
    table["fused"] = replace(table["fused"], refusal=lambda queries, keys: reason)
    same_as_table(gpu, folder, Case([20]), "the package's choice")


@pytest.mark.parametrize("name", paths.KNOWN_GPUS)
def test_a_known_gpu_is_not_measured(gpu, folder, monkeypatch, name):
    monkeypatch.setattr(auto, "gpu_name", lambda device: name)
    monkeypatch.setattr(findings, "cache_file", lambda: pytest.fail("it looked for the file"))
    where = f"measured on {name} ({paths.KNOWN_GPUS[name]})"
    same_as_table(gpu, folder, Case([20]), f"the package's table, {where}")


def test_known_gpus_are_in_the_results():
    machines = Path(__file__).parents[1].glob("results/*/machine.json")
    names = [json.loads(file.read_text())["cpu"].partition(" (host")[0] for file in machines]
    assert set(paths.KNOWN_GPUS) <= set(names)


def test_a_cpu_is_not_measured(folder, monkeypatch):
    monkeypatch.setattr(auto, "find", lambda *arguments: pytest.fail("it measured a CPU"))
    assert auto.gpu_name(mx.cpu) is None
    with mx.stream(mx.cpu):
        Case([20]).attend("auto")
    assert not folder.exists()


@pytest.mark.skipif(ON_CPU, reason="there is no GPU here")
def test_a_gpu_has_a_name():
    assert auto.gpu_name(mx.gpu) == mx.device_info()["device_name"]


@pytest.mark.skipif(ON_CPU, reason="there is no GPU here")
@pytest.mark.parametrize("options", ["none", *OPTIONS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [PLAIN, (8, 8), (4, 4)], ids=str)
def test_this_gpu_finds_its_kernel_right(dtype, options, bits, folder, monkeypatch):
    monkeypatch.setattr(auto, "KNOWN_GPUS", {})
    case = Case([200, 333], dtype=dtype)
    case.keys, case.values = coded(case, bits)
    explanation = told(case, **OPTIONS.get(options, {}))
    assert explanation.because.startswith("measured here by this process: fused ")
    assert (folder / "measured.json").exists()


def test_inside_of_compile_the_table_decides(gpu, folder):
    case, chosen = Case([20, 33]), []

    def step(queries):
        arrays = queries, case.keys, case.values, case.batch()
        explanation = explain(*arrays, scale=case.scale)
        chosen.append(explanation)
        return queries + 1

    mx.eval(mx.compile(step)(case.queries))
    assert "not measured here: ValueError: [eval] Attempting" in chosen[0].because
    assert not folder.exists()


@pytest.mark.parametrize("right", [True, False])
def test_nothing_is_held_after_measuring(gpu, right):
    """A pool that is held is copied by the next write."""
    gpu.wrong = lambda out: out if right else out * 2
    gpu.rounding = lambda out: out
    case, batch = Case([20, 33]), Case([20, 33]).batch()
    alive = weakref.ref(batch)
    before = [sys.getrefcount(array) for array in (case.queries, case.keys, case.values)]
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explain(case.queries, case.keys, case.values, batch, scale=case.scale)
        after = [sys.getrefcount(array) for array in (case.queries, case.keys, case.values)]
        assert after == before
        del batch
        assert alive() is None
    finally:
        gc.enable()
    assert "fused" in gpu.calls


def test_a_step_that_measures_is_a_step_like_others(gpu, monkeypatch):
    def run():
        rng = np.random.default_rng(3)
        paged = cache(num_blocks=12)
        tables = [paged.new_table(), paged.new_table()]
        extend(paged, rng, tables, [9, 5])
        outputs = []
        for _ in range(3):
            with paged.extend(tables, [1, 1]) as step:
                outputs += [
                    step.attend(layer, *inputs(rng, 2, 1), scale=SCALE) for layer in range(2)
                ]
        return mx.stack([*outputs]), mx.stack([*paged.keys, *paged.values])

    here = run()
    assert gpu.calls.count("fused") > 6
    gpu.calls.clear()
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", "0")
    for array, expected in zip(here, run(), strict=True):
        assert mx.allclose(array, expected, rtol=1e-5, atol=1e-6).item()
    table = paths.AUTO[paths.backend_of(mx.default_device())]
    assert ("fused" in gpu.calls) == (table[0][1] == "fused")


@pytest.mark.skipif(not ON_CPU, reason="about the emulator")
@pytest.mark.parametrize(
    ("right", "wrong", "bits"),
    [
        ("", "", PLAIN),
        ("group_barrier();", "", PLAIN),
        ("writable(keys)[to]", "writable(keys)[to + D]", PLAIN),
        ("writable(values)[to] = new_values[from];", "", PLAIN),
        ("", "", (8, 4)),
        ("encode<KEY_BITS>(row, keys, to, offset,", "encode<KEY_BITS>(row, keys, to, 0,", (8, 4)),
        ("encode<VALUE_BITS>(row, values, to, offset, head, seat, writes);", "", (4, 4)),
        ("rotate(row, seat);", ";", (4, 8)),
        ("lowest = fma(", "lowest = 0.9f * fma(", (8, 8)),
    ],
)
def test_the_fused_kernel_itself(emulator, monkeypatch, right, wrong, bits):
    """Its Metal text, whole and broken, on a clock that shows the gather slow."""
    source = kernels.source

    def broken(body, *others):
        header, text = source(body, *others)
        assert body != "split" or right in text
        return header, text.replace(right, wrong) if right else text

    clock = itertools.cycle([0, 1, 1, 3])  # seconds: fused takes 1, the gather 2
    monkeypatch.setattr(measured, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(kernels, "source", broken)
    monkeypatch.setattr(kernels, "kernel", emulator.kernel)
    monkeypatch.setattr(paths, "backend_of", lambda device: "metal")
    monkeypatch.setattr(auto, "gpu_name", lambda device: NAME)
    supported = replace(paths.DECODE_PATHS["fused"], supports=lambda *arguments: True)
    table = {**paths.DECODE_PATHS, "fused": supported}
    for module in (auto, calls, paths, plan):
        monkeypatch.setattr(module, "DECODE_PATHS", table)
    case = Case([5, 33, 100])
    pools = coded(case, bits)
    expected = case.expected(sinks=np.ones(8))
    case.keys, case.values = pools
    with pytest.warns(RuntimeWarning, match="fused") if right else nullcontext():
        explanation = told(case, sinks=np.ones(8))
    assert explanation.path == ("gather_rows" if right else "fused")
    assert (explanation.launches is None) == bool(right)
    assert_close(case.attend("auto", sinks=np.ones(8)), expected, mx.float32)
