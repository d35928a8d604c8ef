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
