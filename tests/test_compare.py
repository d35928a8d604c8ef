"""Comparing commits: what counts as changed, the verdict, the table; no benchmark runs here."""

import json
import math
import os

import numpy as np
import pytest
from asv_runner.statistics import compute_stats
from markdown_it import MarkdownIt

from tracking import changes, compare
from tracking.changes import Change, verdict
from tracking.noise import Noise
from tracking.results import Value

GUESSED = Noise()  # 1.05 for a ratio, 1.5 for a time, 1.01 for what is counted
RATIO, TIME = "overhead.Auto.ratio_x(1)", "decode.Auto.time_x(1)"
COUNT = "step.Instructions.track_instructions(1)"


def change(before, after, *, name=RATIO, significant=True, better="smaller"):
    def value(x):
        return Value(x, x * 0.99, x * 1.01) if x else Value(x)

    return Change(name, value(before), value(after), significant, better)


SAME, WORSE, BETTER = change(1.0, 1.0), change(1.0, 1.25), change(1.0, 0.8)


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        (change(1.0, 1.06), "worsened"),
        (change(1.0, 1.04), "unchanged"),
        (change(1.0, 1.06, significant=False), "unchanged"),
        (change(1.0, 1.06, better="larger"), "improved"),
        (change(1.06, 1.0, better="larger"), "worsened"),
        (change(1.0, 1.4, name=TIME), "unchanged"),
        (change(1.0, 1.6, name=TIME), "worsened"),
        (change(1000, 1030, name=COUNT, significant=False), "worsened"),
        (change(1000, 1005, name=COUNT), "unchanged"),
        (change(0.0, 5.0), "worsened"),
        (change(0.0, 0.0), "unchanged"),
        (change(None, 1.0), "repaired"),
        (change(1.0, None), "failed"),
        (change(None, math.nan), "failed"),
        (change(1.0, math.nan), "failed"),  # it ran, and is n/a now
        (change(math.nan, 1.0), "n/a"),  # new
    ],
)
def test_what_has_changed(cell, word):
    assert cell.verdict(GUESSED) == word


def measured_as(samples):
    """The Value that asv makes of samples."""
    middle, stats = compute_stats([*samples], 1)
    stats["repeat"] = len(samples)
    return Value(middle, stats["ci_99_a"], stats["ci_99_b"], stats=stats, samples=[*samples])


def compared(monkeypatch, before, after):
    """The Change of a cell with samples at two commits."""
    cells = {"old": {RATIO: measured_as(before)}, "new": {RATIO: measured_as(after)}}
    monkeypatch.setattr(changes, "_cells", lambda results, machine, commit, env: cells[commit])
    [found] = changes.changes("results", "box", "old", "new", "env", {})
    return found


@pytest.mark.parametrize(
    ("slower", "worsened"), [(1.0, [0, 0]), (1.1, [95, 100]), (1 / 1.1, [0, 0])]
)
def test_a_slowdown_of_a_tenth_is_found_and_identical_code_is_not(slower, worsened, monkeypatch):
    """With noise of 2% between runs and of 4% between the 20 samples of one, 100 times."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(100):
        runs = ((RATIO, "code", math.exp(x)) for x in rng.normal(0, 0.01, 12))
        before, after = np.exp(rng.normal(0, 0.01, 2))[:, None] * np.exp(rng.normal(0, 0.04, 20))
        found = compared(monkeypatch, before, after * slower)
        called += found.verdict(Noise(runs)) == "worsened"
    assert worsened[0] <= called <= worsened[1]


@pytest.mark.parametrize(("before", "after", "word"), [(8, 12, "unchanged"), (2, 18, "worsened")])
def test_a_median_that_jumps_between_two_modes_is_no_change(before, after, word, monkeypatch):
    """Of 20 samples so many take 2 instead of 1."""
    one, two = ([1 + i / 1000 for i in range(20 - n)] + [2.0] * n for n in (before, after))
    assert compared(monkeypatch, one, two).verdict(GUESSED) == word


def test_the_interval_of_a_ratio_takes_the_ends_farthest_apart():
    ratio = Change(RATIO, Value(2.0, 1.0, 4.0), Value(3.0, 2.0, 5.0), True).ratio
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 0.5, 5.0)


def test_cells_are_of_one_environment_and_know_what_is_better(versions):
    """A commit measured with two versions of MLX is two sets of cells."""
    folder, machine, commit, environments = versions
    name = "overhead.Auto.ratio_vs_contiguous(1, 1024, 32)"
    for environment, factor in zip(environments, (1, 10), strict=True):
        listed = {"overhead.Auto.ratio_vs_contiguous": {"better": "larger"}}
        found = changes.changes(folder, machine, commit, commit, environment, listed)
        of_name = {change.name: change for change in found}[name]
        assert (of_name.better, of_name.ratio.value) == ("larger", 1)
        assert 10 * of_name.before.value > factor


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([SAME, SAME], "unchanged: 2 cells; the noise of 2 of 2 cells is a guess"),
        ([WORSE, SAME], "worsened: 1 cell by 25.0% of 2; the noise of 1 of 1 cells is a guess"),
        ([WORSE, change(1.0, 1.11), SAME], "worsened: 2 cells by 17.8% (11.0% to 25.0%) of 3"),
        ([WORSE, BETTER], "mixed: worsened 1 cell by 25.0%, improved 1 cell by 25.0% of 2"),
        ([change(1.0, 1.25, better="larger")], "improved: 1 cell by 25.0% of 1"),
        ([change(0.0, 1.0), WORSE], "worsened: 2 cells by ∞ (25.0% to ∞) of 2"),
        ([change(1.0, None), SAME], "1 failed; unchanged: 1 cells"),
        ([change(1000, 1030, name=COUNT)], "worsened: 1 cell by 3.0% of 1; certain, what is"),
        ([], "unchanged: 0 cells; nothing was compared"),
    ],
)
def test_one_line_says_what_changed(cells, said):
    assert verdict(cells, GUESSED).startswith(said)


def test_how_sure_it_is():
    quiet = Noise((RATIO, "code", value) for value in [1.0, 1.01] * 5 + [1.15])
    sure = [verdict([change(1.0, after)], quiet).partition("; ")[2] for after in (1.25, 1.1, 1.0)]
    assert sure == [
        "0 of 55 changes of identical code were as large",
        "10 of 55 changes of identical code were as large",
        "changes of up to 4.1% are within the noise",
    ]


@pytest.mark.parametrize("name", ["a.b('x|y')", "a.b('``x|`')", "a.b('x\ny')", "|", "a\\|b"])
def test_a_name_is_one_cell_of_the_table(name):
    """Names of parameters come from a pull request."""
    text = compare.markdown([change(1.0, 2.0, name=name)], GUESSED, before="a", after="b", about="")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    shown = [token.children for token in tokens if token.type == "inline"][-6:]
    assert [part.type for part in shown[-1]] == ["code_inline"]
    assert "".join(part.content for part in shown[0]) == "worsened"


def test_the_table_shows_what_changed_and_counts_the_rest():
    cells = [change(1.0, 1.2), SAME, change(0.001, None, name=TIME), change(1.3, 1.0)]
    cells += [change(math.nan, 1.0), change(None, 2.0)]
    text = compare.markdown(cells, GUESSED, before="aaa", after="bbb", about="Machine box.")
    assert text.startswith("**1 failed; mixed: ")
    assert "1 failed, 1 worsened, 1 improved, 1 repaired, 1 unchanged, 1 n/a" in text
    rows = [line for line in text.splitlines() if "`" in line]
    said = ["failed", "worsened", "improved", "repaired"]
    assert [row.split(" | ")[0] for row in rows] == [f"| {word}" for word in said]
    assert "1.00 ms | failed" in rows[0]
    assert "1.20 [1.18, 1.22] | ±5.0%, a guess" in rows[1]


LISTED = {
    name: {"name": name, "param_names": ["batch", "context", "block_size"], "params": params}
    for name, params in (
        ("overhead.Auto.ratio_x", [["1", "4"], ["1024", "32768"], ["32"]]),
        ("memory.A.track_a", []),
    )
}


def test_what_is_chosen():
    auto = "overhead.Auto.ratio_x"
    assert [*changes.chosen(LISTED, compare.COMPARED, "short", "cpu")] == [auto]
    pattern = r"Auto.*\(4, 3"
    picked = changes.chosen(LISTED, (), "short", "cpu", pattern)
    assert picked == {auto: ["--bench", pattern]}


@pytest.fixture
def comparison(monkeypatch, tmp_path):
    """Compares two commits of a project at `tmp_path`; asv returns or raises what is given."""
    ran = []

    def asv(*args, config):
        ran.append(args[0])
        if isinstance(asv.status, BaseException):
            raise asv.status
        return asv.status

    def derive(name, **settings):
        (tmp_path / name).touch()
        return name

    asv.ran = ran
    monkeypatch.setattr(changes, "asv", asv)
    monkeypatch.setattr(changes, "derive_config", derive)
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    monkeypatch.setattr(changes, "environment_name", lambda config: "env")
    monkeypatch.setattr(changes, "discover", lambda machine, config: LISTED)
    monkeypatch.setattr(changes, "_cells", lambda *args: {RATIO: 1})
    monkeypatch.setattr(changes, "changes", lambda *args: [change(1.0, 1.2)])
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "begin", lambda *a, **kw: {"machine": "box", "backend": "cpu"})
    monkeypatch.setattr(compare, "resolve", lambda name: name * 40)
    monkeypatch.setattr(
        compare, "git", lambda what, *args: "b" * 40 if what == "merge-base" else "a title"
    )
    yield asv
    assert [*tmp_path.iterdir(), *(tmp_path / ".asv").iterdir()] == [tmp_path / ".asv"]


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["compare", "--commit", "a", "--rounds", "4", *args])
    return compare.main()


@pytest.mark.parametrize(
    ("status", "after", "exits", "said"),
    [
        (0, 1.0, 0, "nothing worsened"),
        (1, 1.2, 1, "something worsened"),
        (2, None, 2, "something failed to run"),
        (2, 1.0, 2, "a benchmark failed in one of 4 rounds"),  # and ran in another
    ],
)
def test_slower_is_not_broken(status, after, exits, said, comparison, monkeypatch, capsys):
    comparison.status = status
    monkeypatch.setattr(changes, "changes", lambda *args: [change(1.0, after)])
    assert run(monkeypatch) == exits
    assert said in "".join(capsys.readouterr())


def test_an_interrupted_comparison_shows_the_verdict_so_far(comparison, monkeypatch, capsys):
    comparison.status = KeyboardInterrupt()
    assert run(monkeypatch) == 2
    out = capsys.readouterr().out
    assert "**worsened: 1 cell by 20.0% of 1" in out
    assert "Interrupted: this is of the rounds that were through." in out
    monkeypatch.setattr(changes, "_cells", lambda *args: {})
    assert run(monkeypatch) == 2
    assert "asv measured nothing at bbbbbbbb (interrupted)" in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_is_said_before_anything_is_built(
    comparison, monkeypatch, capsys
):
    assert run(monkeypatch, "--bench", "nosuch") == 2
    expected = "expected a benchmark's name or a part of it, got 'nosuch'\n"
    assert capsys.readouterr().err == expected
    assert comparison.ran == []


def test_how_long_it_takes(versions, tmp_path):
    results, machine, *_ = versions
    names = ["overhead.Auto.ratio_vs_contiguous", "never.Measured.track_it"]
    for number, file in enumerate(sorted((results / machine).glob("*-*.json"))):
        data = json.loads(file.read_text())
        at = data["result_columns"].index("duration")
        data["results"][names[0]][at] = 60.0 * (number + 1)
        file.write_text(json.dumps(data))
        os.utime(file, (number, number))
    said = compare.duration(machine, names, 4, results)
    assert said.startswith("2 benchmarks, about 16 minutes")  # the newest has two
    assert "not recorded on box" in compare.duration("box", names, 4, results)


def test_what_cannot_be_compared(comparison, monkeypatch, capsys):
    monkeypatch.setattr(compare, "resolve", lambda name: "b" * 40)
    comparison.status = 0
    (changes.ROOT / ".asv").mkdir()
    assert run(monkeypatch) == 2
    assert "a is part of main, there is nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [(ZeroDivisionError(), "Traceback"), (OSError(28, "No space left"), "No space left")],
)
def test_a_crash_is_not_called_slower(error, said, monkeypatch, capsys):
    def begin(args, records):
        raise error

    monkeypatch.setattr(compare, "begin", begin)
    assert run(monkeypatch) == 2
    assert said in capsys.readouterr().err
