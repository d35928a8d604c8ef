"""Reading results."""

import dataclasses
import json
import math

import pytest
from result_files import write_result

from tracking import project, results
from tracking.repository import git


def test_values_tell_failed_from_not_applicable():
    assert results.Value(None).show() == "failed"
    assert results.MISSING.show() == "not asked"
    assert results.Value(0.0123, 0.012, 0.013).show(1000, interval=True) == "12.30 [12.00, 13.00]"
    assert results.Value(1.5, -math.inf, math.inf).show(interval=True) == "1.50"


def test_tables_are_about_one_version_of_mlx(versions, monkeypatch):
    folder, machine, commit, (pinned, newest) = versions
    cell = "1", "1024", "32"

    def ratio(**which):
        return results.load(machine, commit, folder, **which)[results.ATTENTION][cell].value

    assert results.usual_environment(machine, folder) == pinned
    assert ratio() == ratio(environment=pinned) == pytest.approx(ratio(environment=newest) / 10)
    monkeypatch.setattr(results, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert results.usual_environment(machine, folder) == newest
    (folder / machine / f"{commit[:8]}-{newest}.json").unlink()
    assert ratio() == ratio(environment=pinned)
    with pytest.raises(ValueError, match="expected results of one commit, got 0"):
        ratio(environment=newest)


@pytest.fixture
def add(versions):
    """Add a machine whose newest commit has some of the benchmarks of h200."""
    folder, _h200, commit, _ = versions

    def add(machine, benchmarks, started_at=1, commit=commit):
        cell = [["1"], ["1024"], ["32"]]
        rows = {name: [[1.0], cell, "1", started_at, 1.0] for name in benchmarks}
        write_result(folder / machine, commit, rows)

    return add


def test_the_default_machine_has_most_headline_cells_at_its_newest_commit(
    versions, add, monkeypatch
):
    monkeypatch.setattr(results, "own_machines", lambda: {"elsewhere"})
    folder, h200, commit, _ = versions
    assert results.default_machine(folder) == (h200, commit)
    add("fewer", [results.ATTENTION])
    assert results.default_machine(folder) == (h200, commit)
    (folder / h200 / results.RETIRED).write_text("sold\n")
    assert results.default_machine(folder) == ("fewer", commit)
    add("earlier", [results.ATTENTION], started_at=0)
    add("much else", ["decode.Auto.time_decode", "host.Plan.time_plan"], started_at=2)
    assert results.default_machine(folder) == ("fewer", commit)


HEAD, LATER = git("rev-parse", "HEAD"), 2**42


@pytest.mark.parametrize(
    ("measured", "own"),
    [
        ({"commit": HEAD, "started_at": 1}, True),
        ({"started_at": LATER}, True),
        ({"started_at": 1}, False),
    ],
    ids=["HEAD", "last of all", "long ago"],
)
def test_the_default_machine_is_this_hosts_own(measured, own, versions, add, monkeypatch):
    folder, h200, _, _ = versions
    monkeypatch.setattr(results, "own_machines", lambda: {"mine", "unmeasured"})
    add("mine", [results.ATTENTION], **measured)
    assert results.is_own("mine", folder) == own
    assert results.default_machine(folder)[0] == ("mine" if own else h200)
    (folder / "mine" / results.RETIRED).write_text("sold\n")
    assert results.default_machine(folder)[0] == h200


def test_own_machines_are_those_with_this_hosts_cpu(monkeypatch):
    known = {"box": {"cpu": "A"}, "box-cuda13": {"cpu": "A"}, "adopted": {"cpu": "B"}}
    monkeypatch.setattr(project, "known_machines", lambda: known)
    monkeypatch.setattr(project, "host_cpu", lambda: "A")
    assert project.own_machines() == {"box", "box-cuda13"}


def test_there_is_no_default_machine_where_nothing_is_measured(tmp_path):
    assert results.default_machine(tmp_path) is None
    (tmp_path / "box").mkdir()
    assert results.default_machine(tmp_path) is None


def test_a_table_over_commits_has_one_version_of_each_benchmark():
    cell, one, two = ("1",), results.Value(1.0), results.Value(2.0)

    def measured(started_at, versions, table):
        return results.Measured("f", "c", "e", None, {}, started_at, versions, table)

    found = [
        measured(1, {"a": "1", "b": "1"}, {"a": {cell: one}, "b": {cell: one}}),
        measured(3, {"a": "2"}, {"a": {cell: two}}),
        measured(2, {"a": "1"}, {"a": {cell: one}}),  # a later commit, measured earlier
    ]
    assert results.of_one_version(found) == [{"b": {cell: one}}, {"a": {cell: two}}, {}]


def test_documents_are_about_what_is_recorded(monkeypatch):
    """Results that git does not have, of a newer MLX, are not for documents."""
    commits, environment = results.recorded_commits("h200"), results.recorded_environment("h200")
    cells = results.recorded("h200", commits[-1])
    found = results.measured("h200")
    local = [
        dataclasses.replace(one, file="local.json", environment="local", mlx="99.0")
        for one in found
        if one.commit in commits
    ]
    monkeypatch.setattr(results, "measured", lambda *args: found + local)
    monkeypatch.setattr(results, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert results.usual_environment("h200") == "local"
    assert results.recorded_environment("h200") == environment
    assert results.recorded_commits("h200") == commits
    assert results.recorded("h200", commits[-1]) == cells


def test_a_file_is_read_again_when_it_has_changed(versions):
    folder, machine, commit, (pinned, _) = versions
    before = results.load(machine, commit, folder, pinned)
    assert results.load(machine, commit, folder, pinned) is before
    file = folder / machine / f"{commit[:8]}-{pinned}.json"
    file.write_text(file.read_text() + " ")
    assert results.load(machine, commit, folder, pinned) is not before


def test_a_cell_without_a_number_says_why(versions):
    folder, machine, commit, (pinned, _) = versions
    file = folder / machine / f"{commit[:8]}-{pinned}.json"
    content = json.loads(file.read_text())
    row = dict(zip(content["result_columns"], content["results"][results.ATTENTION], strict=False))
    row["result"][:4] = [math.nan] * 4
    for name, column in row.items():
        if name.startswith("stats_"):
            column[:4] = [-1, -2, -3, None] if name == "stats_number" else [1, 1, 1, None]
    file.write_text(json.dumps(content))
    table = results.load(machine, commit, folder, pinned)
    shown = [value.show() for value in table[results.ATTENTION].values()]
    assert shown[:4] == ["lacks", "too slow", "too large", "n/a"]
    assert table[results.ATTENTION]["4", "4096", "32"].known
    assert table.get("no.Such.time_x", {}).get(("1",), results.MISSING).show() == "not asked"
