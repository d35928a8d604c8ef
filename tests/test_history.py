"""Running the history: what is asked for and what needs no run; no benchmark runs here."""

import importlib
import math
import re

import pytest

from tracking import grid, history


def benchmark(name, *params, names=("batch", "context", "block_size")):
    params = [[str(value) for value in values] for values in params]
    return {"name": name, "params": params, "param_names": list(names)[: len(params)]}


GRID = benchmark("decode.Auto.time_decode", (1, 4), (1024, 4096, 16384, 32768), (16, 32, 64))


TREE = benchmark("prefix_cache.Match.time_match", (10**4, 10**6), names=["tokens"])


PLAIN = benchmark("memory.Index.track_bytes")


def chosen(some, size):
    option, pattern = grid.selection(some, size)
    assert option == "--bench"
    labels = [f"{some['name']}({', '.join(cell)})" for cell in grid.cells(some)]
    return [label for label in labels if re.search(pattern, label)]


def test_quick_selection_is_four_cells_of_the_grid():
    assert chosen(GRID, "quick") == [
        f"decode.Auto.time_decode({cell})"
        for cell in ("1, 1024, 32", "1, 4096, 32", "4, 1024, 32", "4, 4096, 32")
    ]
    assert len(chosen(GRID, "full")) == 24


@pytest.mark.parametrize("size", ["quick", "full"])
def test_benchmarks_with_other_parameters_are_whole_in_both_grids(size):
    assert len(chosen(TREE, size)) == 2
    _, pattern = grid.selection(PLAIN, size)
    assert re.search(pattern, PLAIN["name"])
    assert not re.search(pattern, PLAIN["name"] + "_more")


def test_the_quick_grid_keeps_to_the_headline_at_old_commits_and_leaves_settled_questions():
    names = ["append.Auto.time_append", "decode.Auto.time_decode", "settled.Slabs.ratio_x"]
    assert grid.in_quick_run(names, is_head=True) == names[:2]
    assert grid.in_quick_run(names, is_head=False) == names[:1]


def test_a_quick_run_starts_asv_once_for_a_module():
    names = ["append.Auto.time_append", "append.PoolSize.time_append", "decode.Auto.time_decode"]
    assert grid.in_one_run(names, "quick") == [names[:2], names[2:]]
    assert grid.in_one_run(names, "full") == [[name] for name in names]
    assert grid.in_one_run([], "quick") == []


def test_benchmarks_that_runs_name_exist():
    for name in grid.HISTORY:
        module, cls, _ = name.split(".")
        assert hasattr(importlib.import_module(f"benchmarks.{module}"), cls)


NAN = math.nan


QUICK_DONE = [1.0 if i in (1, 4, 13, 16) else NAN for i in range(24)]


@pytest.mark.parametrize(
    ("values", "quick", "full"),
    [
        (QUICK_DONE, True, False),
        ([1.0] * 24, True, True),
        ([1.0] * 20 + [NAN] * 4, True, True),  # four cells too large
        ([NAN] * 24, True, True),  # the commit lacks the feature
        ([NAN] + QUICK_DONE[1:4] + [NAN] * 20, False, False),  # one cell, chosen by hand
        ([*QUICK_DONE[:-1], None], False, False),  # a failure is tried again
    ],
)
def test_what_needs_no_run(values, quick, full):
    assert [grid.cells(GRID)[i] for i in (1, 16)] == [("1", "1024", "32"), ("4", "4096", "32")]
    assert history.is_measured(values, GRID, "quick") is quick
    assert history.is_measured(values, GRID, "full") is full


def test_what_needs_no_run_off_the_grid():
    for size in ("quick", "full"):
        assert history.is_measured([1.0, 2.0], TREE, size)
        assert history.is_measured([1.0], PLAIN, size)
        assert not history.is_measured([None], PLAIN, size)


def test_another_version_of_mlx_is_measured_anew(versions):
    folder, machine, commit, (pinned, newest) = versions
    (folder / machine / f"{commit[:8]}-{newest}.json").unlink()
    name = "overhead.Auto.ratio_vs_contiguous"
    some = {name: GRID | {"name": name, "version": "1"}}
    assert history.unmeasured(some, machine, commit, "quick", pinned, folder) == []
    assert history.unmeasured(some, machine, commit, "quick", newest, folder) == [name]
