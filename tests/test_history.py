"""Running the history: what is asked for and what needs no run; no benchmark runs here."""

import importlib
import math
import pkgutil
import re

import pytest
from result_files import write_result

import benchmarks
from tracking import grid, history, results
from tracking.results import Value


def benchmark(name, *params, names=("batch", "context", "block_size")):
    params = [[str(value) for value in values] for values in params]
    return {"name": name, "params": params, "param_names": list(names)[: len(params)]}


CONTEXTS = (1024, 4096, 16384, 32768)
GRID = benchmark("decode.Auto.time_decode", (1, 4), CONTEXTS, (16, 32, 64))
STEP = benchmark("step.Auto.ratio_step_vs_contiguous", (1, 4), CONTEXTS, (32,))
TREE = benchmark("prefix_cache.Match.time_match", (10**4, 10**6), names=["tokens"])
PLAIN = benchmark("memory.Index.track_bytes")
BITS = benchmark(
    *("bits.Step.ratio", ("8", "4"), (1,), (4096, 32768), (32,)),
    names=("bits", "batch", "context", "block_size"),
)
OFF_THE_SHORT_GRID = benchmark("long.Long.time_decode", (4,), (32768,), (16, 64))


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


def chosen(some, size, device="cpu"):
    """The cells that asv's options for a grid choose."""
    options = grid.selection(some, size, device)
    labels = {grid.series_name(some["name"], cell): cell for cell in grid.cells(some)}
    return [cell for label, cell in labels.items() if options and re.search(options[1], label)]


FOUR = [("1", "1024", "32"), ("1", "4096", "32"), ("4", "1024", "32"), ("4", "4096", "32")]


@pytest.mark.parametrize(
    ("some", "short", "full"),
    [
        (GRID, FOUR, 24),
        (BITS, [("8", "1", "4096", "32"), ("4", "1", "4096", "32")], 4),
        (TREE, [("10000",), ("1000000",)], 2),  # other parameters are whole in both
        (PLAIN, [()], 1),
        (OFF_THE_SHORT_GRID, [], 2),
        (benchmark("settled.Slabs.ratio_x", (1, 2)), [], 2),
        (benchmark("step.Auto.track_host_share", (1, 2)), [], 2),
        (benchmark("trace.Served.track_x", (1, 2)), [], 2),
    ],
)
def test_what_grids_ask_for(some, short, full):
    assert chosen(some, "short") == short
    assert len(chosen(some, "full")) == full
    assert chosen(some, "quick") == []
    _, pattern = grid.selection(some, "full")
    assert not re.search(pattern, some["name"] + "_more")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_quick_grid_is_the_headline_alone(device):
    listed = suite()
    asked = {name: grid.asked(one, "quick", device) for name, one in listed.items()}
    asked = {name: cells for name, cells in asked.items() if cells}
    assert asked.keys() == results.NAMES.keys() - {results.BOUND}
    for name, cells in asked.items():
        assert sorted(chosen(listed[name], "quick", device)) == sorted(cells)
    assert all(any(name.startswith(prefix) for name in listed) for prefix in grid.NOT_SHORT)


NAN = math.nan


@pytest.mark.parametrize(
    ("values", "measured"),
    [
        ([Value(1.0), Value(2.0)], True),
        ([Value(1.0), Value(NAN, why="too slow")], True),
        ([Value(NAN, why="lacks")], True),
        ([Value(1.0), Value(NAN)], False),  # one cell was not asked for
        ([Value(1.0), Value(None)], False),  # a failure is tried again
    ],
)
def test_what_needs_no_run(values, measured):
    assert history.is_measured(values) is measured


def test_another_version_of_mlx_is_measured_anew(versions):
    folder, machine, commit, (pinned, newest) = versions
    (folder / machine / f"{commit[:8]}-{newest}.json").unlink()
    name = "overhead.Auto.ratio_vs_contiguous"
    some = {name: GRID | {"name": name, "version": "1"}}
    assert history.unmeasured(some, machine, commit, "quick", "cpu", pinned, folder) == []
    assert history.unmeasured(some, machine, commit, "quick", "cpu", newest, folder) == [name]


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """A history of two commits, and an asv that writes what it is asked for and runs nothing.

    `asv.calls` counts its runs, the one numbered `asv.killed_at` ends before it has saved.
    """
    listed = suite()
    listed[OFF_THE_SHORT_GRID["name"]] = OFF_THE_SHORT_GRID | {"version": "1"}

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
        write_result(tmp_path / "box", args[-1].removesuffix("^!"), rows)
        return 0

    asv.calls, asv.killed_at = 0, None
    head, old = "a" * 40, "b" * 40
    monkeypatch.setattr(history, "asv", asv)
    monkeypatch.setattr(history, "git", lambda *args: head)
    monkeypatch.setattr(history, "phase_commits", lambda: {old: "0"})
    monkeypatch.setattr(history, "discover", lambda *args: listed)
    monkeypatch.setattr(history, "environment_name", lambda config: "env")
    monkeypatch.setattr(history, "measured", lambda *args: results.measured("box", tmp_path))
    monkeypatch.setattr(history, "commit_labels", lambda commits: {c: c[:8] for c in commits})
    monkeypatch.setattr(history, "headlines", lambda *args: "said")
    monkeypatch.setattr(history, "config_for", lambda *args: None)
    return asv


@pytest.mark.parametrize(("size", "old", "new"), [("quick", 1, 1), ("short", 1, 4), ("full", 8, 8)])
def test_what_is_measured_needs_no_second_run(size, old, new, recording, tmp_path):
    assert history.run(size, "box", "cpu", 1) == 0
    tables = [one.table for one in results.measured("box", tmp_path)]
    steps = [[value.known for value in table[STEP["name"]].values()] for table in tables]
    assert [sum(known) for known in steps] == [new, old]
    calls = recording.calls
    assert (calls == 2) if size == "quick" else (calls > 4)
    assert history.run(size, "box", "cpu", 1) == 0
    assert recording.calls == calls


def test_a_run_of_head_leaves_phases_out(recording, tmp_path):
    assert history.run("quick", "box", "cpu", 1, only_head=True) == 0
    assert [one.commit for one in results.measured("box", tmp_path)] == ["a" * 40]


def test_a_run_that_was_killed_goes_on_where_it_was(recording, tmp_path):
    """Wherever that was: with each run of asv the last one that saved nothing."""
    assert history.run("short", "box", "cpu", 1) == 0
    needed = recording.calls
    for killed_at in range(1, needed + 1):
        for file in tmp_path.glob("box/*.json"):
            file.unlink()
        recording.calls, recording.killed_at = 0, killed_at
        with pytest.raises(KeyboardInterrupt):
            history.run("short", "box", "cpu", 1)
        recording.calls, recording.killed_at = 0, None
        assert history.run("short", "box", "cpu", 1) == 0
        assert recording.calls == needed - killed_at + 1
        assert history.run("short", "box", "cpu", 1) == 0
        assert recording.calls == needed - killed_at + 1
