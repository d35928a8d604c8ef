"""Files of results are checked before anything reads them, and written whole."""

import json
import math
from pathlib import Path

import pytest
from asv.util import UserError

from tracking import files, results, valid

ROOT = Path(__file__).parents[1]
COMMIT = "0b9e8013"
NAME = f"{COMMIT}-cuda13-py3.12-mlx0.32.4.json"
HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture
def file(versions):
    folder, machine, _, _ = versions
    return folder / machine / NAME


def change(file, *path, to):
    """Write a file anew with something in it replaced."""
    data = json.loads(file.read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(inner, list):  # asv leaves out what is None at the end of a row
        inner += [None] * (path[-1] + 1 - len(inner))
    inner[path[-1]] = to
    file.write_text(json.dumps(data))


def test_everything_recorded_is_valid():
    found = [*(ROOT / "results").rglob("*.json")]
    assert len(found) > 20
    for file in found:
        valid.load(file)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (lambda text: text[:5000], "Expecting|Unterminated"),
        (lambda text: "", "Expecting value"),
        (lambda text: "[]", "is not of type 'object'"),
        (lambda text: "[" * 100_000, "recursion"),
        (lambda text: text.replace('"version": 2', '"version": 3'), "2 was expected"),
        (lambda text: text.replace("h200", "h\udcff00"), "can't decode byte 0xff"),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_it(cut, reason, file):
    file.write_bytes(cut(file.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(valid.BrokenFileError, match=rf"^\S*{NAME} is broken: .*({reason})") as said:
        valid.load(file)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 400


ROW = ("results", results.ATTENTION)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ((*ROW, 0, 3), math.inf, "is not of type 'values'"),
        ((*ROW, 0), [1.0], "expected 24 values"),
        ((*ROW, 1, 0, 0), HTML, "does not match"),
        ((*ROW, 3), -1, "less than the minimum"),
        ((*ROW, 4), math.inf, "greater than the maximum"),
        ((*ROW, 5, 3), "1.5", "is not of type 'statistics'"),
        ((*ROW, 9), None, "all statistics of a cell"),
        ((*ROW, 11), [[1.0, None]], "is not of type 'samples'"),
        ((*ROW, 12), HTML, r"does not match '\^\[A-Za-z0-9"),
        (ROW, [[1.0]], "is too short"),
        (("results", HTML), [[1.0], []], "does not match"),
        (("result_columns", 0), "samples", "'result' was expected"),
        (("durations",), {"<build>": "long"}, "is not of type 'number'"),
        (("python",), "3.12\n", "does not match"),
        (("params", "machine"), "other", "expected results of machine 'h200', got 'other'"),
        (("params", "cpu"), HTML, "does not match"),
        (("env_name",), "other", "expected the name '0b9e8013-other.json'"),
        (("more",), 1, "Additional properties"),
    ],
)
def test_what_results_may_not_hold(path, value, reason, file):
    valid.load(file)
    change(file, *path, to=value)
    with pytest.raises(valid.BrokenFileError, match=reason):
        valid.load(file)


@pytest.mark.parametrize("record", [{"cpu": HTML}, {"machine": "other"}, {"version": 2}])
def test_what_a_machine_may_not_hold(record, file):
    with pytest.raises(valid.BrokenFileError, match=r"machine\.json is broken"):
        valid.check(file.with_name("machine.json"), {"machine": "h200", "version": 1} | record)


def test_names_of_machines():
    for name in ("Müllers-Mac.local", "box 2 (lab)", "日本"):
        valid.check_machine_name(name)
    for name in ("", "x\n", "-x", ".x", "a/b", 'a"b', "a<b", "a\u202eb"):
        with pytest.raises(UserError, match="expected a machine's name of letters"):
            valid.check_machine_name(name)


def test_a_broken_file_is_left_out_and_named_once(versions, capsys):
    folder, machine, _, (pinned, newest) = versions
    file = folder / machine / f"{COMMIT}-{newest}.json"
    file.write_text(file.read_text()[:1000])
    for _ in range(2):
        found = results.measured(machine, folder)
        assert [one.environment for one in found] == [pinned]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{file} is broken" in said


def test_what_is_broken_is_set_aside_and_nothing_is_lost(file, capsys):
    folder = file.parents[1]
    nested = folder / "h200/deeper/h200/machine.json"  # asv looks at any depth
    nested.parent.mkdir(parents=True)
    good = {path: path.read_text() for path in folder.rglob("*.json") if path != file}
    for text in ("first", "second"):
        file.write_text(text)
        nested.write_text(text)
        valid.set_aside(folder)
    assert {path: path.read_text() for path in folder.rglob("*.json")} == good
    for path in (file, nested):
        assert path.with_name(f"{path.name}.broken").read_text() == "first"
        assert path.with_name(f"{path.name}.broken-2").read_text() == "second"
    assert f"set aside as {NAME}.broken\n" in capsys.readouterr().err


def test_nothing_broken_is_written(file):
    before, data = file.read_text(), valid.load(file)
    del data["python"]
    with pytest.raises(valid.BrokenFileError, match="would be broken: 'python' is a required pro"):
        valid.write_json(file, data)
    assert file.read_text() == before


def test_what_cannot_be_written_leaves_a_file_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(file, "x" * 100_000 + "\udcff")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "before"
