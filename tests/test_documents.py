"""Tables of results and the documents they are written into."""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from repositories import git

from benchmarks import common
from tracking import documents, grid, repository, results, tables
from tracking.repository import ROOT

CELL = ("1", "1024", "32")


def test_formats():
    table = (["a", "long name"], [["1", "2.50"], ["n/a", "10.00"]])
    assert tables.as_text(*table) == "  a  long name\n  1       2.50\nn/a      10.00\n"
    assert tables.as_csv(*table) == "a,long name\n1,2.50\nn/a,10.00\n"
    markdown = "| a | long name |\n| --: | --: |\n| 1 | 2.50 |\n| n/a | 10.00 |\n"
    assert tables.as_markdown(*table) == markdown


def test_fill_writes_between_markers_and_nowhere_else(monkeypatch):
    monkeypatch.setitem(documents.MARKS, "echo", lambda machine, commit: f"{machine} at {commit}\n")
    text = "before\n<!-- results: echo machine=m commit=c -->\nold\n<!-- end results -->\nafter\n"
    assert documents.fill(text) == text.replace("old", "m at c")


def test_the_table_leads_with_what_users_get():
    table = {
        results.FIRST: {("512",): results.Value(1.1), ("8192",): results.Value(1.4)},
        results.TOKENS: {("1", "512"): results.Value(1.5)},
        results.STEP: {CELL: results.Value(0.5), ("1", "4096", "32"): results.MISSING},
        "step.Batch16.ratio_step_vs_contiguous": {("16", *CELL[1:]): results.Value(0.25)},
        results.ATTENTION: {CELL: results.Value(math.nan, why="too slow")},
    }
    header, rows = tables.by_cell(table)
    assert header == ["batch", "context", "block", *results.NAMES.values()]
    assert rows == [
        ["1", "512", "32", "1.10", "1.50", "not asked", "not asked", "not asked"],
        ["1", "1024", "32", "not asked", "not asked", "0.50", "not asked", "too slow"],
        ["1", "8192", "32", "1.40", "not asked", "not asked", "not asked", "not asked"],
        ["16", "1024", "32", "not asked", "not asked", "0.25", "not asked", "not asked"],
    ]


def test_make_table_is_of_the_newest_commit_with_a_number(monkeypatch, capsys):
    of_commits = {"x": {results.STEP: {CELL: results.Value(1.25)}}, "y": {}}
    monkeypatch.setattr(documents, "load", lambda machine, commit: of_commits[commit])
    monkeypatch.setattr(documents, "measured_commits", lambda machine: list(of_commits))
    monkeypatch.setattr(documents, "machine_name", lambda backend: "this host")
    monkeypatch.setattr("sys.argv", ["documents", "table", "--here", "--format", "csv"])
    documents.main()
    out, err = capsys.readouterr()
    assert err == "machine this host, x\n"
    assert out.splitlines()[1:] == ["1,1024,32,not asked,not asked,1.25,not asked,not asked"]
    monkeypatch.setattr("sys.argv", ["documents", "table", "--machine", "box", "--commit", "y"])
    with pytest.raises(SystemExit, match="machine box has no number at y of first token, speed"):
        documents.main()


@pytest.mark.skipif(
    not (ROOT / ".git").exists()
    or repository.git("rev-parse", "--is-shallow-repository") == "true",
    reason="needs the history",
)
@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_hold_what_results_say(path):
    text = path.read_text()
    assert text == documents.fill(text), f"{path} is stale: run `make adr`"
    assert text.count("<!-- results:") == text.count("<!-- end results -->")


def test_the_short_grid_of_plain_asv_is_that_of_make_bench():
    """What the documentation says to type for it."""
    said = re.search(r"--bench '(.*)'", (ROOT / "docs/measuring.md").read_text())[1]
    params = [[str(x) for x in values] for values in common.GRID]
    for name in (results.STEP, results.BOUND, results.ATTENTION):
        benchmark = {"name": name, "params": params, "param_names": common.PARAM_NAMES}
        labels = {f"{name}({', '.join(cell)})": cell for cell in itertools.product(*params)}
        chosen = [cell for label, cell in labels.items() if re.search(said, label)]
        assert chosen == grid.asked(benchmark, "short")
    assert not re.search(said, "append.Auto.time_append(1, 1024, 32)")


def test_a_table_is_of_the_default_machine_and_leaves_broken_results_out(tmp_path):
    """In a clone in which nothing was measured."""
    git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(tmp_path))
    for name in ("tracking", "benchmarks", "results", "asv.conf.json"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)

    def table(*args):
        command = [sys.executable, "-m", "tracking.documents", "table", *args]
        env = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        assert (done.returncode == 0) is (len(done.stdout.splitlines()) > 5)
        return done.returncode, done.stderr

    machine, commit = results.default_machine()
    status, err = table()
    assert status == 0
    assert f"machine {machine}, " in err
    assert commit[:8] in err
    folder = tmp_path / "results/h200"
    [file] = folder.glob(f"{results.measured_commits('h200')[-1][:8]}-*.json")
    file.write_text(file.read_text()[:1000])
    status, err = table("--machine", "h200")
    assert status == 0
    assert f"{file.name} is broken: " in err
    for file in folder.glob("*-*.json"):
        file.write_bytes(b"\xff")
    status, err = table("--machine", "h200")
    assert status == 1
    assert "nothing measured on machine h200, but on h100, h200" in err
    status, err = table("--machine", "h100", "--commit", "01234567")
    assert status == 1
    assert "expected results of one commit, got 0" in err
