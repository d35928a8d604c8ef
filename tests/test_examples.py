"""The examples run as their docstrings say."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def without_a_display():
    matplotlib.use("agg")


def run(monkeypatch, capsys, *arguments, script="replay_trace.py"):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out


def test_replay_a_trace(monkeypatch, capsys, tmp_path):
    plot = tmp_path / "usage.png"
    out = run(monkeypatch, capsys, "--requests", "60", "--plot", str(plot), "--prometheus")
    assert "60 requests in" in out
    assert "pagedkv_hit_tokens_total" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = run(monkeypatch, capsys, "--requests", "60")
    assert again in out  # the same trace every time


def test_a_tight_budget_preempts_and_finds_less(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--requests", "60", "--blocks", "120")
    assert "preemptions: 0," not in out


def test_generate(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--requests", "5", script="generate.py")
    lines = [line.split(": ") for line in out.splitlines()]
    assert [name for name, _ in lines] == [f"request {number}" for number in range(5)]
    assert all(len(json.loads(tokens)) == 8 for _, tokens in lines)
    assert run(monkeypatch, capsys, "--requests", "5", script="generate.py") == out
    assert run(monkeypatch, capsys, "--requests", "5", "--ahead", script="generate.py") == out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("replay_trace.py --blocks 5", r"^expected --blocks of \d+ at least, got 5$"),
        ("generate.py --blocks 5", r"^expected --blocks of \d at least, got 5$"),
        ("replay_trace.py --requests 5 --plot nowhere/x.png", "^the plot was not saved: .*nowhere"),
        ("replay_trace.py --requests 5 --plot x.txt", "^the plot was not saved: .*txt"),
    ],
)
def test_what_cannot_be_is_one_sentence(monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    script, *arguments = arguments.split()
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, capsys, *arguments, script=script)


@pytest.mark.parametrize("option", ["--blocks", "--requests"])
@pytest.mark.parametrize("number", ["0", "-1", "some"])
def test_numbers_are_from_one_on(monkeypatch, capsys, option, number):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, option, number)
    said = f"argument {option}: expected a number from 1 on, got {number}\n"
    assert capsys.readouterr().err.endswith(said)
