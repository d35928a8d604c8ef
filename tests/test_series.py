"""The data of the page, from results."""

import importlib
import json
import math
import re
import shutil

import pytest

from benchmarks.common import kv_bytes
from tracking.noise import Noise
from tracking.results import (
    ATTENTION,
    BOUND,
    FIRST,
    MISSING,
    NAMES,
    RESULTS,
    STEP,
    TOKENS,
    Value,
)
from website import overhead, series

ROWS = "overhead.GatherRows.ratio_vs_contiguous"
CELL, BIG = ("1", "1024", "32"), ("4", "32768", "32")


def value(x):
    return Value(x, x - 0.1, x + 0.1)


def measures(*tables, noise=None):
    return series.benchmarks_of(tables, noise or Noise())[0]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (Value(2.0, 1.9, 2.1), [2.0, 1.9, 2.1]),
        (Value(1 / 3), [0.33333]),
        (Value(2.0, -math.inf, math.inf), [2.0]),
        (Value(None), "failed"),
        (Value(math.nan, why="too slow"), "too slow"),
        (Value(math.nan), "n/a"),
        (MISSING, None),
    ],
)
def test_a_value_as_the_page_has_it(said, shown):
    assert series.entry(said) == shown
    json.dumps(series.entry(said), allow_nan=False)


def test_missing_failed_and_known_are_told_apart():
    tables = [
        {ATTENTION: {CELL: value(2.0), BIG: MISSING}},
        {
            ATTENTION: {CELL: Value(None), BIG: MISSING},
            ROWS: {CELL: Value(math.nan, why="too slow"), BIG: Value(math.nan)},
        },
    ]
    one, rows = measures(*tables)
    assert (one["name"], one["measure"], one["path"]) == (ATTENTION, "attention", "auto")
    assert one["params"] == ["batch", "context", "block_size"]
    assert one["cells"] == [[1, 1024, 32]]
    assert one["values"] == [[[2.0, 1.9, 2.1], "failed"]]
    assert (rows["cells"], rows["values"]) == ([[1, 1024, 32]], [[None, "too slow"]])


def test_a_ratio_has_the_threshold_of_its_series():
    noise = Noise((f"{STEP}(1, 1024, 32)", "code", 1 + 0.001 * (i % 3)) for i in range(12))
    [one] = measures({STEP: {CELL: value(1.0), BIG: value(2.0)}}, noise=noise)
    quiet, big = (noise.threshold(f"{STEP}({', '.join(cell)})") for cell in (CELL, BIG))
    assert one["thresholds"] == [[quiet.factor, quiet.show()], [big.factor, big.show()]]
    assert quiet.source == "series"


def test_broken_noise_is_said_and_thresholds_are_guesses(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(series.log, "warning", said.append)
    shutil.copytree(RESULTS / "h200", tmp_path / "h200")
    (tmp_path / "h200/noise.csv").write_text("broken\n")
    [one] = overhead.gather(tmp_path)["series"]
    [step] = [b for b in one["measures"] if b["name"] == STEP]
    assert step["thresholds"][0] == [1.05, "±5.0%, a guess"]
    assert "h200/noise.csv" in said[0]


def test_the_headlines_of_the_terminal_are_measures_of_the_page():
    names = ["first", "tokens", "step", "bound", "attention"]
    assert [series.measure_of(name) for name in NAMES] == [(name, "auto") for name in names]


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("step.Batch16.ratio_step_vs_contiguous", ("step", "auto")),
        ("step.Waiting.ratio_step_vs_contiguous", None),
        ("step.BoundBatch16.ratio_step_vs_bound", ("bound", "auto")),
        ("overhead.Batch16.ratio_vs_contiguous", ("attention", "auto")),
        (ROWS, ("attention", "gather_rows")),
        ("decode.Contiguous.time_decode", ("time", "contiguous")),
        ("decode.GatherOnlyHeadMajor.time_gather", None),
        ("prompt.Memory.track_peak", ("memory", "auto")),
        ("trace.Batched.track_peak_memory", ("memory", "auto")),
        ("scheduler.Decode.time_step", None),
    ],
)
def test_a_benchmark_has_a_measure_and_a_path(name, measure):
    assert series.measure_of(name) == measure


@pytest.mark.parametrize(
    ("name", "cell", "shown"),
    [
        (TOKENS, ("8", "512"), [8, 512, 32]),
        (FIRST, ("8192",), [1, 8192, 32]),
        ("prompt.Memory.track_peak", ("512",), [1, 512, 32]),
        ("trace.Batched.track_peak_memory", (), [1, 0, 32]),
        (STEP, ("4", "1024", "16"), [4, 1024, 16]),
    ],
)
def test_a_cell_is_batch_context_and_block_size(name, cell, shown):
    [one] = measures({name: {cell: value(1.5)}})
    assert (one["cells"], one["asked"]) == ([shown], [[*cell]])
    assert len(one["params"]) == len(cell)


def test_what_the_host_bounds_is_said_by_cell_and_commit():
    share = "prompt.FirstToken.track_host_share"
    short, long = ("512",), ("8192",)
    [one] = measures(
        {FIRST: {short: value(1), long: value(1)}},
        {FIRST: {short: value(1), long: value(1)}, share: {short: Value(0.91), long: Value(0.9)}},
        {FIRST: {short: value(1)}, share: {short: Value(None)}},
    )
    assert one["host"] == [[False, True, False], [False, False, False]]


def test_a_call_has_the_bytes_that_it_reads():
    [one] = measures({"decode.Auto.time_decode": {CELL: value(1e-3), BIG: value(1e-2)}})
    assert one["bytes"] == [2 * 1024 * 8 * 128 * 2, kv_bytes(4, 32768, 32)]


def test_a_measure_without_a_number_has_reasons():
    [one] = measures({BOUND: {CELL: Value(math.nan, why="lacks"), BIG: Value(math.nan)}, STEP: {}})
    assert (one["measure"], one["values"]) == ("bound", [["lacks"]])


def test_facts_are_told_in_words():
    name = "generate.Forks.track_memory"
    table = {name: {("4096", "1"): Value(1.06), ("512", "0"): value(1.0)}}
    _, [forks] = series.benchmarks_of([table], Noise())
    assert forks["what"][0] == "8 forks over one of 512 tokens, each grown by 0"
    assert forks["asked"] == [["512", "0"], ["4096", "1"]]
    assert (forks["params"], forks["of"]) == (["tokens", "grown"], "memory")


@pytest.mark.parametrize("name", series.FACTS)
def test_facts_are_of_benchmarks_and_their_parameters(name):
    of, words = series.FACTS[name]
    module, kind, function = name.split(".")
    found = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
    assert hasattr(found, function)
    assert re.findall(r"{(\w+)}", words) == list(found.param_names)
    assert of in series.MEASURES


def test_a_machine_has_its_commits_and_what_asv_calls_it():
    h200 = next(one for one in overhead.gather(RESULTS)["series"] if one["machine"] == "h200")
    assert [commit["label"][0] for commit in h200["commits"][:7]] == list("0123456")
    assert all(commit["phase"] == (" · " in commit["label"]) for commit in h200["commits"])
    assert [h200["asv"][key] for key in ("machine", "mlx", "python")] == ["h200", "0.32.4", "3.12"]


def test_two_versions_of_mlx_are_two_series_and_say_what_measured(versions):
    results, machine, _, environments = versions
    found = {one["environment"]: one for one in overhead.gather(results)["series"]}
    assert sorted(found) == sorted(environments)
    assert [found[name]["commits"][0]["with"]["MLX"] for name in environments] == ["0.32.4", "99.0"]
    [file] = (results / machine).glob(f"*-{environments[0]}.json")
    content = json.loads(file.read_text())
    content["results"]["host.NumPy.track_version"] = [[20406.0], [], "1", 1, 0.1]
    file.write_text(json.dumps(content))
    commits = series.series_of(machine, environments[0], results)["commits"]
    assert commits[0]["with"]["NumPy"] == "2.4.6"
