"""What the page shows of a machine, from its results."""

import json
import math
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


def test_paths_have_the_names_of_decode_paths():
    names = ["Batch16", "Bound", "BoundBatch16", "Auto", "GatherBlockMajor", "Fused", "Contiguous"]
    paths = ["auto"] * 4 + ["gather_block_major", "fused", "contiguous"]
    assert [series.path_of(name) for name in names] == paths


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (Value(2.0, 1.9, 2.1), [2.0, 1.9, 2.1]),
        (Value(1 / 3), [0.333333]),
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
            ROWS: {CELL: Value(math.nan, why="too slow")},
        },
    ]
    [one] = series.benchmarks_of(tables, Noise())  # no cell of ROWS has a number, nor has BIG
    assert (one["name"], one["measure"], one["path"]) == (ATTENTION, "attention", "auto")
    assert one["params"] == ["batch", "context", "block_size"]
    assert one["cells"] == [[1, 1024, 32]]
    assert one["values"] == [[[2.0, 1.9, 2.1], "failed"]]


def test_a_ratio_has_the_threshold_of_its_series():
    noise = Noise((f"{STEP}(1, 1024, 32)", "code", 1 + 0.001 * (i % 3)) for i in range(12))
    [one] = series.benchmarks_of([{STEP: {CELL: value(1.0), BIG: value(2.0)}}], noise)
    quiet, big = (noise.threshold(f"{STEP}({', '.join(cell)})") for cell in (CELL, BIG))
    assert one["thresholds"] == [[quiet.factor, quiet.show()], [big.factor, big.show()]]
    assert quiet.source == "series"


def test_broken_noise_is_said_and_thresholds_are_guesses(tmp_path, monkeypatch, recorded):
    said = []
    monkeypatch.setattr(series.log, "warning", said.append)
    shutil.copytree(RESULTS / "h200", tmp_path / "h200")
    (tmp_path / "h200/noise.csv").write_text("broken\n")
    [one] = overhead.gather(tmp_path)["series"]
    [step] = [b for b in one["benchmarks"] if b["name"] == STEP]
    assert step["thresholds"][0] == [1.05, "±5.0%, a guess"]
    assert "h200/noise.csv" in said[0]


@pytest.mark.parametrize(("measure", "name"), list(zip(series.RATIOS, NAMES, strict=True)))
def test_the_headlines_of_the_terminal_are_measures_of_the_page(measure, name):
    assert series.measure_of(name) == (measure, "auto")


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("step.Batch16.ratio_step_vs_contiguous", ("step", "auto")),
        ("step.Waiting.ratio_step_vs_contiguous", None),
        ("step.WaitingBatch16.ratio_step_vs_contiguous", None),
        ("step.BoundBatch16.ratio_step_vs_bound", ("bound", "auto")),
        (ROWS, ("attention", "gather_rows")),
        ("decode.Contiguous.time_decode", ("time", "contiguous")),
        ("decode.GatherOnlyHeadMajor.time_gather", ("phase 0", "")),
        ("generate.Forks.track_memory", ("facts", "auto")),
        ("scheduler.Decode.time_step", None),
    ],
)
def test_a_benchmark_has_a_measure_and_a_path(name, measure):
    assert series.measure_of(name) == measure


def test_whole_models_have_blocks_of_one_size():
    [one] = series.benchmarks_of([{TOKENS: {("8", "512"): value(1.5)}}], Noise())
    assert (one["params"], one["cells"]) == (["sequences", "context"], [[8, 512, 32]])


def test_a_prompt_is_alone_and_in_blocks_of_one_size():
    [one] = series.benchmarks_of([{FIRST: {("8192",): value(1.5), ("512",): value(1)}}], Noise())
    assert (one["measure"], one["params"]) == ("first", [None, "prompt"])
    assert one["cells"] == [[1, 512, 32], [1, 8192, 32]]


def test_what_the_host_bounds_is_said_by_cell_and_commit():
    share = "prompt.FirstToken.track_host_share"
    short, long = ("512",), ("8192",)
    tables = [
        {FIRST: {short: value(1), long: value(1)}},
        {FIRST: {short: value(1), long: value(1)}, share: {short: Value(0.91), long: Value(0.9)}},
        {FIRST: {short: value(1)}, share: {short: Value(None)}},
    ]
    [one] = series.benchmarks_of(tables, Noise())
    assert one["host"] == [[False, True, False], [False, False, False]]


def test_a_call_has_the_bytes_that_it_reads():
    table = {"decode.Auto.time_decode": {CELL: value(1e-3), BIG: value(1e-2)}}
    [one] = series.benchmarks_of([table], Noise())
    assert one["bytes"] == [2 * 1024 * 8 * 128 * 2, kv_bytes(4, 32768, 32)]


def test_a_measure_without_a_number_has_reasons():
    table = {
        STEP: {CELL: value(1.0)},
        BOUND: {CELL: Value(math.nan, why="lacks"), BIG: Value(None)},
        TOKENS: {},
    }
    tables = [table, {BOUND: {CELL: Value(math.nan, why="too slow")}}]
    found = series.reasons(tables, series.benchmarks_of(tables, Noise()))
    assert found == {
        "first": [],
        "tokens": [],
        "bound": ["failed", "lacks", "too slow"],
        "attention": [],
    }


def test_what_else_a_user_of_mlx_lm_gets_is_told_in_words():
    table = {
        "generate.Forks.track_memory": {("4096", "1"): Value(1.06), ("512", "0"): value(1.0)},
        "server.Requests.ratio_requests_per_second": {("32",): value(1.7), ("1",): MISSING},
    }
    requests, forks = series.benchmarks_of([table], Noise())
    assert requests["what"] == [
        "requests a second over mlx_lm.server, clients that share a system prompt: 32"
    ]
    assert forks["what"] == [
        "memory of 8 forks over that of one, 512 tokens, each grown by 0",
        "memory of 8 forks over that of one, 4096 tokens, each grown by 1",
    ]
    assert forks["cells"] == [["512", "0"], ["4096", "1"]]
    assert (forks["params"], forks["of"]) == (["tokens", "grown"], "tokens")


def test_what_is_told_in_words_is_measured():
    from benchmarks import generate, prompt, server, trace

    modules = {"generate": generate, "prompt": prompt, "server": server, "trace": trace}
    assert series.FACTS.keys() <= series.RATIOS.keys()
    for name, (params, words) in (one for of in series.FACTS.values() for one in of.items()):
        module, kind, function = name.split(".")
        found = getattr(modules[module], kind)
        assert hasattr(found, function)
        assert params == found.param_names
        assert words.count("{}") == len(params)


@pytest.fixture(scope="module")
def recorded():
    return overhead.gather(RESULTS)


def test_recorded_machines_are_on_the_page(recorded):
    machines = {one["machine"]: one for one in recorded["series"]}
    assert {"h200", "linux-2core-xeon"} <= machines.keys()
    commits = machines["h200"]["commits"]
    assert [commit["label"][0] for commit in commits[:7]] == list("0123456")
    assert all(commit["phase"] == (" · " in commit["short"]) for commit in commits)
    assert machines["h200"]["copy"] > 1000
    asv = machines["h200"]["asv"]
    assert [asv[key] for key in ("machine", "mlx", "python")] == ["h200", "0.32.4", "3.12"]
    assert asv["cpu"].startswith("NVIDIA H200")
    assert machines["linux-2core"]["unmeasured"] == {
        measure: [] for measure in ("first", "tokens", "step", "bound")
    }


def test_the_last_measured_machine_comes_first_and_retired_ones_last(tmp_path, recorded):
    for machine in ("h200", "linux-2core-xeon"):
        shutil.copytree(RESULTS / machine, tmp_path / machine)
    newest = [one["machine"] for one in recorded["series"] if (tmp_path / one["machine"]).exists()]

    def order():
        return [one["machine"] for one in overhead.gather(tmp_path)["series"]]

    assert order() == newest
    (tmp_path / newest[0] / "retired.txt").write_text("its disk broke\n")
    assert order() == newest[::-1]
    assert overhead.gather(tmp_path)["series"][1]["retired"] == "its disk broke"


def test_two_versions_of_mlx_are_two_series(versions):
    results, _, _, environments = versions
    found = {one["environment"]: one for one in overhead.gather(results)["series"]}
    assert sorted(found) == sorted(environments)
    assert [found[name]["asv"]["mlx"] for name in environments] == ["0.32.4", "99.0"]
    before, after = (
        next(b["values"][0][0][0] for b in found[name]["benchmarks"] if b["name"] == ATTENTION)
        for name in environments
    )
    assert after == pytest.approx(10 * before)


def test_the_page_says_which_numpy_and_keeps_the_series(versions):
    """Results recorded without it are in the same series as those with it."""
    folder, machine, commit, (pinned, _) = versions
    [file] = (folder / machine).glob(f"*-{pinned}.json")
    content = json.loads(file.read_text())
    others = overhead.git("log", "-2", "--format=%H").split()
    for other, version in zip(others, (20406.0, 20299.0), strict=True):
        content["commit_hash"] = other
        content["results"]["host.NumPy.track_version"] = [[version], [], "1", 1, 0.1]
        (folder / machine / f"{other[:8]}-{pinned}.json").write_text(json.dumps(content))
    one = series.series_of(machine, pinned, folder)
    assert {commit, *others} == {c["hash"] for c in one["commits"]}
    assert one["about"].endswith("NumPy 2.4.6 and 2.2.99 and not recorded")
    assert "NumPy not recorded" in series.series_of(machine, pinned, folder, [commit])["about"]
