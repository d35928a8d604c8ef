"""Running the history: what is asked for and what needs no run; no benchmark runs here."""

import importlib
import json
import math
import pkgutil
import re

import pytest

import benchmarks
from tracking import grid, history, results
from tracking.results import Value


def benchmark(name, *params, names=("batch", "context", "block_size")):
    params = [[str(value) for value in values] for values in params]
    return {"name": name, "params": params, "param_names": list(names)[: len(params)]}


GRID = benchmark("decode.Auto.time_decode", (1, 4), (1024, 4096, 16384, 32768), (16, 32, 64))


TREE = benchmark("prefix_cache.Match.time_match", (10**4, 10**6), names=["tokens"])


STEP = benchmark("step.Auto.ratio_step_vs_contiguous", (1, 4), (1024, 4096, 16384, 32768), (32,))
PLAIN = benchmark("memory.Index.track_bytes")
OFF_THE_QUICK_GRID = benchmark("long.Long.time_decode", (4,), (32768,), (16, 64))


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


def test_quick_selection_knows_the_grid_beside_other_parameters():
    names = ("bits", "batch", "context", "block_size")
    more = benchmark("bits.Step.ratio", ("8", "4"), (1,), (4096, 32768), (32,), names=names)
    assert chosen(more, "quick") == [
        "bits.Step.ratio(8, 1, 4096, 32)",
        "bits.Step.ratio(4, 1, 4096, 32)",
    ]
    assert len(chosen(more, "full")) == 4


@pytest.mark.parametrize("size", ["quick", "full"])
def test_benchmarks_with_other_parameters_are_whole_in_both_grids(size):
    assert len(chosen(TREE, size)) == 2
    _, pattern = grid.selection(PLAIN, size)
    assert re.search(pattern, PLAIN["name"])
    assert not re.search(pattern, PLAIN["name"] + "_more")


def test_the_quick_grid_keeps_to_the_headline_at_old_commits_and_leaves_settled_questions():
    names = ["append.Auto.time_append", "decode.Auto.time_decode", "settled.Slabs.ratio_x"]
    assert grid.in_run(names, "full") == names
    assert grid.in_run(names, "quick") == names[:2]
    assert grid.in_run(names, "history") == names[:1]


def test_old_commits_take_their_steps_at_the_shortest_context_alone():
    cells = ["(1, 1024, 32)", "(4, 1024, 32)"]
    assert chosen(STEP, "history") == [STEP["name"] + cell for cell in cells]
    assert len(chosen(STEP, "quick")) == 4
    assert chosen(GRID, "history") == chosen(GRID, "quick")
    done = [1.0 if cell[1] == "1024" else NAN for cell in grid.cells(STEP)]
    measured = [history.is_measured(as_values(done), STEP, size) for size in ("history", "quick")]
    assert measured == [True, False]


def test_old_commits_compute_the_shortest_prompt_alone():
    first = benchmark("prompt.FirstToken.ratio_speed", (512, 2048), names=["prompt"])
    hit = benchmark("prompt.Cached.ratio_time", (448, 2048), (32, 256), names=["cached", "new"])
    assert chosen(first, "history") == [f"{first['name']}(512)"]
    assert chosen(hit, "history") == [f"{hit['name']}(448, 32)"]
    assert [len(chosen(one, "quick")) for one in (first, hit)] == [2, 4]
    names = [first["name"], hit["name"], "prompt.FirstToken.ratio_null", "prompt.Memory.track_peak"]
    assert grid.in_run(names, "history") == names[:2]
    assert grid.in_run(names, "quick") == [*names[:2], names[3]]
    assert grid.in_run(names, "full") == names


def test_host_shares_are_in_the_full_grid_alone():
    names = ["step.Auto.ratio_step_vs_contiguous", "step.Auto.track_host_share"]
    assert set(names) < set(suite())
    assert grid.in_run(names, "full") == names
    assert grid.in_run(names, "quick") == grid.in_run(names, "history") == names[:1]


def test_a_quick_run_starts_asv_once_for_a_module():
    names = ["append.Auto.time_append", "append.PoolSize.time_append", "decode.Auto.time_decode"]
    assert grid.in_one_run(names, "quick") == [names[:2], names[2:]]
    assert grid.in_one_run(names, "full") == [[name] for name in names]
    assert grid.in_one_run([], "quick") == []


def test_benchmarks_that_runs_name_exist():
    listed = suite()
    for prefix in (*grid.HISTORY, *grid.SHORTEST, *grid.LONG):
        assert any(name.startswith(prefix) for name in listed)
    for prefix, shortest in grid.SHORTEST.items():
        asked = [one for name, one in listed.items() if name.startswith(prefix)]
        assert all(shortest in grid.cells(one) for one in asked)


NAN = math.nan


def as_values(given):
    """Values of numbers, or of why there is none."""
    return [Value(NAN, why=x) if isinstance(x, str) else Value(x) for x in given]


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
        (
            [1.0 if i in (1, 13, 16) else "too slow" if i == 4 else NAN for i in range(24)],
            True,
            False,
        ),
        (["too large" if i > 20 else 1.0 for i in range(24)], True, True),
        (["lacks"] * 24, True, True),
        (["lacks" if i in (1, 4, 13, 16) else NAN for i in range(24)], True, False),
    ],
)
def test_what_needs_no_run(values, quick, full):
    assert [grid.cells(GRID)[i] for i in (1, 16)] == [("1", "1024", "32"), ("4", "4096", "32")]
    assert history.is_measured(as_values(values), GRID, "quick", explained=False) is quick
    assert history.is_measured(as_values(values), GRID, "full", explained=False) is full


@pytest.mark.parametrize(
    ("values", "quick", "full"),
    [
        (QUICK_DONE, True, False),
        ([1.0] * 24, True, True),
        ([1.0] * 20 + ["too large"] * 4, True, True),
        ([*QUICK_DONE[:23], 1.0], True, False),  # one cell beyond, chosen by hand
        ([NAN] * 24, False, False),  # nothing was asked
        (["lacks"] * 24, True, True),
        (["lacks"] + [NAN] * 23, False, False),
    ],
)
def test_what_needs_no_run_where_a_missing_number_is_explained(values, quick, full):
    assert history.is_measured(as_values(values), GRID, "quick") is quick
    assert history.is_measured(as_values(values), GRID, "full") is full


def test_what_needs_no_run_off_the_grid():
    for size in ("quick", "full"):
        assert history.is_measured(as_values([1.0, 2.0]), TREE, size)
        assert history.is_measured(as_values([1.0]), PLAIN, size)
        assert not history.is_measured(as_values([None]), PLAIN, size)


def test_another_version_of_mlx_is_measured_anew(versions):
    folder, machine, commit, (pinned, newest) = versions
    (folder / machine / f"{commit[:8]}-{newest}.json").unlink()
    name = "overhead.Auto.ratio_vs_contiguous"
    some = {name: GRID | {"name": name, "version": "1"}}
    assert history.unmeasured(some, machine, commit, "quick", pinned, folder) == []
    assert history.unmeasured(some, machine, commit, "quick", newest, folder) == [name]


def suite():
    """The suite as asv lists it, without running anything: {name: description}."""
    listed = {}
    for _, module, _ in pkgutil.iter_modules(benchmarks.__path__):
        for cls in vars(importlib.import_module(f"benchmarks.{module}")).values():
            if isinstance(cls, type) and not cls.__name__.startswith("_"):
                for function in filter(re.compile("(time|ratio|track)_").match, dir(cls)):
                    name = f"{module}.{cls.__name__}.{function}"
                    described = benchmark(name, *cls.params, names=cls.param_names)
                    listed[name] = described | {"version": cls.version}
    return listed


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """A history of two commits, and an asv that writes what it is asked for and runs nothing.

    `asv.calls` counts its runs, the one numbered `asv.killed_at` ends before it has saved.
    """
    listed = suite()
    listed[OFF_THE_QUICK_GRID["name"]] = OFF_THE_QUICK_GRID | {"version": "1"}

    def asv(*args, config):
        asv.calls += 1
        patterns = [args[i + 1] for i, arg in enumerate(args) if arg == "--bench"]
        rows = {}
        for name, described in listed.items():
            labels = [f"{name}({', '.join(cell)})" for cell in grid.cells(described)]
            chosen = [any(re.search(p, label) for p in patterns) for label in labels]
            if any(chosen):
                values = [1.0 if one else NAN for one in chosen]
                rows[name] = [values, described["params"], described["version"], asv.calls, 0.1]
        if not rows:
            return 1  # No benchmarks selected
        if asv.calls == asv.killed_at:
            raise KeyboardInterrupt
        commit = args[-1].removesuffix("^!")
        file = tmp_path / f"box/{commit[:8]}-env.json"
        content = json.loads(file.read_text()) if file.exists() else {"results": {}}
        content |= {
            "commit_hash": commit,
            "env_name": "env",
            "date": 0,
            "params": {"machine": "box", "mlx": "1"},
            "python": "3",
            "requirements": {},
            "env_vars": {},
            "result_columns": ["result", "params", "version", "started_at", "duration"],
            "results": content["results"] | rows,
            "durations": {},
            "version": 2,
        }
        file.write_text(json.dumps(content))
        return 0

    (tmp_path / "box").mkdir()
    asv.calls, asv.killed_at = 0, None
    head, old = "a" * 40, "b" * 40
    monkeypatch.setattr(history, "asv", asv)
    monkeypatch.setattr(history, "git", lambda *args: head)
    monkeypatch.setattr(history, "phase_commits", lambda: {old: "0"})
    monkeypatch.setattr(history, "discover", lambda *args: listed)
    monkeypatch.setattr(history, "environment_name", lambda config: "env")
    monkeypatch.setattr(history, "measured", lambda *args: results.measured("box", tmp_path))
    for name in ("check_history", "check_suite", "record_machine", "config_for"):
        monkeypatch.setattr(history, name, lambda *args: None)
    return asv


@pytest.mark.parametrize(("size", "old", "new"), [("quick", 2, 4), ("full", 8, 8)])
def test_what_is_measured_needs_no_second_run(size, old, new, recording, tmp_path):
    assert history.run(size, "box", "cpu", 1) == 0
    tables = [one.table for one in results.measured("box", tmp_path)]
    steps = [[value.known for value in table[STEP["name"]].values()] for table in tables]
    assert [sum(known) for known in steps] == [new, old]
    calls = recording.calls
    assert calls > 4
    assert history.run(size, "box", "cpu", 1) == 0
    assert recording.calls == calls


def test_a_run_of_head_leaves_phases_out(recording, tmp_path):
    assert history.run("quick", "box", "cpu", 1, only_head=True) == 0
    assert [one.commit for one in results.measured("box", tmp_path)] == ["a" * 40]


def test_a_run_that_was_killed_goes_on_where_it_was(recording, tmp_path):
    """Wherever that was: with each run of asv the last one that saved nothing."""
    assert history.run("quick", "box", "cpu", 1) == 0
    needed = recording.calls
    for killed_at in range(1, needed + 1):
        for file in tmp_path.glob("box/*.json"):
            file.unlink()
        recording.calls, recording.killed_at = 0, killed_at
        with pytest.raises(KeyboardInterrupt):
            history.run("quick", "box", "cpu", 1)
        recording.calls, recording.killed_at = 0, None
        assert history.run("quick", "box", "cpu", 1) == 0
        assert recording.calls == needed - killed_at + 1
        assert history.run("quick", "box", "cpu", 1) == 0
        assert recording.calls == needed - killed_at + 1


def test_a_benchmark_without_a_cell_in_the_quick_grid_is_not_asked_for():
    assert grid.selection(OFF_THE_QUICK_GRID, "quick") == []
    assert len(chosen(OFF_THE_QUICK_GRID, "full")) == 2
    listed = {OFF_THE_QUICK_GRID["name"]: OFF_THE_QUICK_GRID | {"version": "1"}}
    assert history.unmeasured(listed, "box", "a" * 40, "quick", "env") == []
    assert history.unmeasured(listed, "box", "a" * 40, "full", "env") == list(listed)


def test_publishing_sets_broken_results_aside_and_renames_the_rest(versions, monkeypatch, capsys):
    folder, machine, commit, (pinned, newest) = versions
    for name in ("git", "discover", "check_history", "record_machine", "config_for"):
        monkeypatch.setattr(history, name, lambda *args: None)
    monkeypatch.setattr(history, "phase_commits", dict)
    monkeypatch.setattr(history, "RESULTS", folder)
    broken, renamed = (folder / machine / f"{commit[:8]}-{env}.json" for env in (pinned, newest))
    broken.write_text("{")
    old, new = next(iter(results.RENAMED.items()))
    renamed.write_text(renamed.read_text().replace(new, old))
    assert history.prepare(machine, "cpu") == 0
    assert f"{broken} is broken: " in capsys.readouterr().err
    assert not broken.exists()
    assert f'"{new}"' in renamed.read_text()
