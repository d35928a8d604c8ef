"""Comparing commits: what counts as changed, the table, the factors; no benchmark runs here."""

import math
import re

import pytest
from asv.util import UserError
from markdown_it import MarkdownIt

from tracking import changes, compare, noise, repository, tables, triage
from tracking.results import Value

GUESSED = noise.Noise()  # 1.05 for a ratio, 1.5 for a time, 1.01 for what is counted
# Twelve runs of two cells that differ by 1% at most: 1.04.
QUIET = noise.Noise(
    [
        (f"overhead.Auto.ratio_vs_contiguous({cell})", "code", 1 + run % 2 / 100)
        for run in range(12)
        for cell in (1, 4)
    ]
)
RATIO, TIME = "overhead.Auto.ratio_x(1)", "decode.Auto.time_x(1)"
COUNT = "step.Instructions.track_instructions(1)"


def change(before, after, *, name=RATIO, significant=True, samples=25, better="smaller"):
    def value(x):
        return Value(x, x * 0.99, x * 1.01) if x else Value(x)

    return changes.Change(name, value(before), value(after), significant, samples, better)


@pytest.mark.parametrize(
    ("cell", "verdict"),
    [
        (change(1.0, 1.06), "worsened"),
        (change(1.0, 1.04), "unchanged"),
        (change(1.0, 1.06, significant=False), "unchanged"),
        (change(1.06, 1.0), "improved"),
        (change(1.0, 1.06, better="larger"), "improved"),
        (change(1.06, 1.0, better="larger"), "worsened"),
        (change(1.0, 1.4, name=TIME), "unchanged"),
        (change(1.0, 1.6, name=TIME), "worsened"),
        (change(1000, 1030, name=COUNT, significant=False), "worsened"),
        (change(1000, 980, name=COUNT), "improved"),
        (change(1000, 1005, name=COUNT), "unchanged"),
        (change(None, 1.0), "repaired"),
        (change(1.0, None), "failed"),
        (change(None, math.nan), "failed"),
        (change(1.0, math.nan), "failed"),  # it ran, and is n/a now
        (change(math.nan, 1.0), "n/a"),  # new
    ],
)
def test_verdicts(cell, verdict):
    assert cell.verdict(GUESSED) == verdict


def two_modes(share, samples=20):
    """The Value of a benchmark that takes 1 or, in a share of its samples, 2."""
    slow = round(share * samples)
    times = sorted(
        [1 + i / 1000 for i in range(samples - slow)] + [2 + i / 1000 for i in range(slow)]
    )
    middle = (times[samples // 2 - 1] + times[samples // 2]) / 2
    stats = {"q_25": times[samples // 4], "q_75": times[-samples // 4]}
    return Value(middle, middle * 0.99, middle * 1.01, stats=stats, samples=times)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (0.4, 0.6, "unchanged"),  # the median doubles
        (0.6, 0.4, "unchanged"),
        (0.1, 0.9, "worsened"),
        (0.9, 0.1, "improved"),
        (0.0, 1.0, "worsened"),
    ],
)
def test_a_median_that_jumps_between_two_modes_is_no_change(before, after, verdict):
    cell = changes.Change(RATIO, two_modes(before), two_modes(after), True, 20)
    assert cell.verdict(GUESSED) == verdict


def test_the_interval_of_a_ratio_takes_the_ends_farthest_apart():
    ratio = changes.Change(RATIO, Value(2.0, 1.0, 4.0), Value(3.0, 2.0, 5.0), True, 25).ratio
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 0.5, 5.0)


@pytest.mark.parametrize(
    "name", ["a.b('x|y')", "a.b('`')", "a.b('``x|`')", "a.b('x||')", "a.b('x\ny')", "`", "|"]
)
def test_a_name_is_one_cell(name):
    """Names of parameters come from a pull request."""
    cells = [change(1.0, 2.0, name=name)]
    text = compare.markdown(cells, GUESSED, before="aaa", after="bbb", about="")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    shown = [token.children for token in tokens if token.type == "inline"][-6:]
    [code] = shown[-1]
    assert code.type == "code_inline"
    assert code.content == name.replace("\n", " ")
    assert "".join(part.content for part in shown[0]) == "worsened"


@pytest.mark.parametrize("text", ["a|b", r"a\|b", r"a\\|b", "|", "||", "\\"])
def test_bars_do_not_part_a_cell(text):
    """An odd number of backslashes before each, and a blank before the table's own."""
    *_, row = tables.as_markdown(["h"], [[text]]).splitlines()
    bars = re.findall(r"(\\*)\|", row[2:-2])
    assert len(bars) == text.count("|")
    assert all(len(backslashes) % 2 for backslashes in bars)


def test_the_table_shows_what_changed_and_counts_the_rest():
    cells = [
        change(1.0, 1.2),
        change(1.0, 1.0),
        change(0.001, None, name=TIME),
        change(1.3, 1.0),
        change(math.nan, 1.0),
        change(None, 2.0),
    ]
    text = compare.markdown(cells, GUESSED, before="aaa", after="bbb", about="Machine box.")
    assert "1 failed, 1 worsened, 1 improved, 1 repaired, 1 unchanged, 1 n/a" in text
    rows = [line for line in text.splitlines() if "`" in line]
    assert text.startswith("**1 failed; mixed: ")
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {verdict}" for verdict in ("failed", "worsened", "improved", "repaired")
    ]
    assert "1.00 ms | failed" in rows[0]
    assert "1.20 [1.18, 1.22] | ±5.0%, a guess" in rows[1]


@pytest.fixture
def measured(monkeypatch):
    """What `asv continuous` would have found, and what was asked of it."""
    asked = []

    def measure(before, after, **options):
        asked.append((before, after, options))
        return measure.found

    measure.found = [change(1.0, 1.0)]
    measure.asked = asked
    monkeypatch.setattr(compare, "measure", measure)
    return measure


@pytest.mark.parametrize(
    ("cells", "status"),
    [
        ([change(1.0, 1.0)], 0),
        ([change(1.2, 1.0)], 0),
        ([change(None, 1.0)], 0),
        ([change(1.0, 1.2)], 1),
        ([change(1.0, 1.2), change(1.0, None)], 2),
    ],
)
def test_slower_is_not_broken(cells, status, measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "git", lambda *args: "a" * 40 if args[0] != "log" else "a title")
    monkeypatch.setattr(compare, "resolve", lambda name: "b" * 40)
    monkeypatch.setattr(compare.triage, "between", lambda before, after: ["b" * 40])
    measured.found = cells
    output = tmp_path / "table.md"
    where = {"machine": "box", "backend": "cpu", "grid": "short"}
    assert compare.pull_request("main", 3, **where, output=output) == status
    assert output.read_text() in capsys.readouterr().out
    [(before, after, options)] = measured.asked
    assert (before, after) == ("a" * 40, "b" * 40)
    assert options["benchmarks"] == compare.COMPARED
    assert options["rounds"] == 3


def test_what_was_accepted_is_said_and_not_called_slower(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "git", lambda *args: "a" * 40 if args[0] != "log" else "a title")
    monkeypatch.setattr(compare, "resolve", lambda name: "b" * 40)
    monkeypatch.setattr(compare.triage, "between", lambda before, after: ["c" * 40, "b" * 40])
    entry = triage.Accepted("c" * 8, "overhead.*", "correct now", "https://x/1")
    monkeypatch.setattr(compare.triage, "read", lambda: [entry])
    where = {"machine": "box", "backend": "cpu", "grid": "short", "output": tmp_path / "table.md"}
    for slower, status in ((RATIO, 0), ("decode.Auto.ratio_y(1)", 1)):
        measured.found = [change(1.0, 1.2, name=slower), change(1.0, 1.0)]
        assert compare.pull_request("main", 1, **where) == status
    measured.found = [change(1.0, 1.2)]
    compare.pull_request("main", 1, **where)
    text = where["output"].read_text()
    assert text.startswith("**unchanged")
    said = f"`{RATIO}` worsened, 1.20 [1.18, 1.22], and was accepted: correct now, https://x/1"
    assert said in text
    measured.found = [change(1.0, None)]  # broken is not slower
    assert compare.pull_request("main", 1, **where) == 2


def test_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(compare, "git", lambda *args: "b" * 40)
    monkeypatch.setattr(compare, "resolve", lambda name: "b" * 40)
    with pytest.raises(UserError, match="nothing to compare"):
        compare.pull_request("main", 1, machine="box", backend="cpu", grid="short", output=None)


def test_a_base_that_is_not_there():
    with pytest.raises(UserError, match="expected a commit, got 'no-such-branch'"):
        repository.resolve("no-such-branch")


def test_a_crash_is_not_called_slower(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", "--machine", "box"])
    monkeypatch.setattr(compare, "begin", lambda args, records: 1 / 0)
    assert compare.main() == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_failed_and_missing_cells_are_told_apart(tmp_path, monkeypatch):
    none = Value(math.nan)
    stats = {"ci_99_a": 0.9, "ci_99_b": 1.1, "repeat": 10}
    samples = [1.0 + i / 1000 for i in range(10)]
    higher = [x + 0.2 for x in samples]
    good = Value(1.0, 0.9, 1.1, stats=stats, samples=samples)
    cells = {
        "old": {"a": good, "b": good, "c": none, "d": good},
        "new": {
            "a": Value(1.2, 1.1, 1.3, stats=stats, samples=higher),
            "b": Value(None),
            "c": none,
        },
    }
    monkeypatch.setattr(changes, "_cells", lambda results, machine, commit, env: cells[commit])
    found = {c.name: c for c in changes.changes(tmp_path, "box", "old", "new", "env", {})}
    assert sorted(found) == ["a", "b", "d"]  # n/a at both is no cell
    assert found["a"].significant
    assert found["b"].verdict(GUESSED) == "failed"
    assert found["d"].verdict(GUESSED) == "failed"


def test_a_change_knows_which_direction_is_better(versions):
    folder, machine, commit, environments = versions
    name = "memory.Bandwidth.track_bandwidth"
    for better in ("smaller", "larger"):
        listed = {name: {"better": better}}
        found = changes.changes(folder, machine, commit, commit, environments[0], listed)
        [one] = [c for c in found if c.name.startswith(name)]
        assert one.better == better
        assert {c.better for c in found if c is not one} == {"smaller"}


def test_environments_are_not_mixed(versions):
    """A commit measured with two versions of MLX is two sets of cells."""
    folder, machine, commit, environments = versions
    cells = [changes._cells(folder, machine, commit, name) for name in environments]
    name = "overhead.Auto.ratio_vs_contiguous(1, 1024, 32)"
    ours, theirs = (found[name].value for found in cells)
    assert theirs == pytest.approx(10 * ours)
    assert (
        not changes.changes(folder, machine, commit, commit, environments[0], {})[0].ratio.value > 1
    )


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_failure_in_one_round_is_not_forgotten(status, monkeypatch, tmp_path):
    """A cell that failed and then ran has a number in asv's results; its exit status tells."""
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    monkeypatch.setattr(changes, "derive_config", lambda *args, **kw: "config")
    (tmp_path / "config").touch()
    monkeypatch.setattr(changes, "environment_name", lambda config: "env")
    monkeypatch.setattr(changes, "discover", lambda *args: {})
    monkeypatch.setattr(changes, "asv", lambda *args, **kw: status)
    monkeypatch.setattr(changes, "_cells", lambda *args: {"a": 1})
    monkeypatch.setattr(changes, "changes", lambda *args: [change(1.0, 1.0)])
    where = {"machine": "box", "backend": "cpu", "benchmarks": (), "grid": "short", "rounds": 4}
    if status == 2:
        with pytest.raises(UserError, match="a benchmark failed in one of 4 rounds"):
            changes.measure("a", "b", **where)
    else:
        assert len(changes.measure("a", "b", **where)) == 1


def test_a_full_disk_is_a_sentence(monkeypatch, capsys):
    def full(args, records):
        raise OSError(28, "No space left on device", "results/box")

    monkeypatch.setattr("sys.argv", ["compare", "--machine", "box"])
    monkeypatch.setattr(compare, "begin", full)
    assert compare.main() == 2
    assert capsys.readouterr().err == "[Errno 28] No space left on device: 'results/box'\n"
