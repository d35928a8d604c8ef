"""Requests that come and go, with the random model: the answers that mlx-lm gives one by one."""

import re
import runpy
import sys
from pathlib import Path

import matplotlib
import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import generate_step

from pagedkv import Scheduler
from pagedkv.mlx_lm import ScheduledModel

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def example(monkeypatch):
    matplotlib.use("agg")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    import serve_batch

    return serve_batch


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["serve_batch.py", *arguments])
        runpy.run_path(str(EXAMPLES / "serve_batch.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def one_by_one(model, requests, ends):
    """What mlx-lm answers over its own caches."""
    answers = {}
    for number, one in enumerate(requests):
        answers[number] = tokens = []
        for token, _ in generate_step(mx.array(one.prompt), model, max_tokens=one.most):
            tokens.append(int(token))
            if token in ends:
                break
    return answers


@pytest.mark.parametrize("ends", [(), (38,)])
def test_answers_are_those_of_mlx_lm(example, ends):
    rng = np.random.default_rng(5)
    requests = example.make_requests(example.random_prompts(12, rng), 30, rng)
    model, history, ended = example.random_model(), [], []
    expected = one_by_one(model, requests, ends)
    with ScheduledModel(model, num_blocks=16, block_size=example.BLOCK_SIZE) as scheduled:
        scheduler = Scheduler(scheduled.cache.pool, example.BLOCK_SIZE, max_tokens=64, watermark=0)

        def report(computed, stats, answers, over):
            history.append(stats)
            ended.extend(over)

        assert example.serve(scheduled, scheduler, requests, ends, report) == expected
        scheduler.check_invariants()
    assert sorted(ended) == list(range(12))
    assert any(len(expected[n]) < requests[n].most for n in expected) == bool(ends)
    assert history[-1].preemptions > 0
    assert history[-1].hit_rate > 0.3
    assert history[-1].blocks_live == 0
    # They came and went at different times.
    assert len({stats.running for stats in history}) > 2
    assert len({one.arrival for one in requests}) > 6


def test_requests_that_come_late_are_waited_for(example):
    requests = [example.Request(0, [1, 2, 3], 2), example.Request(1000, [4, 5], 2)]
    model, steps = example.random_model(), []
    with ScheduledModel(model, num_blocks=4, block_size=example.BLOCK_SIZE) as scheduled:
        scheduler = Scheduler(scheduled.cache.pool, example.BLOCK_SIZE)
        answers = example.serve(
            scheduled, scheduler, requests, (), lambda *step: steps.append(step)
        )
    assert answers == one_by_one(model, requests, ())
    assert len(steps) == 4


def test_the_last_token_of_an_answer_may_also_end_it(example):
    requests, model = [example.Request(0, [1, 2, 3], 1)], example.random_model()
    [ends] = expected = one_by_one(model, requests, ()).values()
    with ScheduledModel(model, num_blocks=4, block_size=example.BLOCK_SIZE) as scheduled:
        scheduler = Scheduler(scheduled.cache.pool, example.BLOCK_SIZE)
        answers = example.serve(scheduled, scheduler, requests, ends)
    assert list(answers.values()) == list(expected)


def test_what_it_prints_and_plots(run, tmp_path):
    plot = tmp_path / "usage.png"
    out = run("--random", "--requests", "6", "--tokens", "20", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "6/6" in out  # the line of progress is not cut off
    assert re.search(r"\n6 requests in \d+ steps: \d+ tokens/s, \d+% hits, blocks: 0 live", out)
    assert not re.search("preemptions: 0,", out)
    assert sorted(re.findall(r"^(\d): \[", out, re.M)) == ["0", "1", "2", "3", "4", "5"]


def test_a_budget_that_is_too_small_is_one_sentence(run):
    with pytest.raises(SystemExit, match=r"^expected --blocks of \d+ at least, got 3$"):
        run("--random", "--blocks", "3")


@pytest.mark.parametrize("option", ["--blocks", "--requests", "--tokens"])
def test_numbers_are_from_one_on(run, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--random", option, "0")
    said = f"argument {option}: expected a number from 1 on, got 0\n"
    assert capsys.readouterr().err.endswith(said)


def test_answers_of_one_token(run):
    assert re.findall(r"^\d: \[\d+\]$", run("--random", "--requests", "2", "--tokens", "1"), re.M)


def test_a_model_that_is_not_there_is_one_sentence(run, example, monkeypatch, tmp_path):
    import smollm

    monkeypatch.setattr(smollm, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"no model in .*: python examples/smollm.py downloads it"):
        run()
