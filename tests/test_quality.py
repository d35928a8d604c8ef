"""Perplexity and needles with models whose answers are known, and what is recorded of them."""

import math
import re
import sys

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx import nn
from mlx.utils import tree_map
from small_models import small_model

from tools import quality
from tracking.tables import read_csv


class Letters:
    """A tokenizer that has a token for each character."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return f"<user>{messages[0]['content']}<answer>"


class Reader:
    """A model that knows the magic number if that is not too far above the answer.

    Of what it does not know the most probable is a 0: the first thing that is said is not found.
    """

    def __init__(self, sight):
        self.sight = sight

    def __call__(self, tokens, cache):
        start = len(cache)
        cache += tokens[0].tolist()
        ends = range(start + 1, len(cache) + 1)
        then = [self.after(Letters().decode(cache[:end])) for end in ends]
        return (mx.arange(128) == mx.array([then]).T)[None]

    def after(self, text):
        prompt, _, answered = text.partition("<answer>")
        found = re.search(r"number of Zanzibar is (\d+)", prompt[-self.sight :])
        said = answered.removeprefix(quality.ANSWER)
        return ord(f" {found[1]}."[len(said)]) if found and said in f" {found[1]}" else 0


TEXT = [97 + number % 26 for number in range(2000)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Windows of 40 tokens in chunks of 9."""
    monkeypatch.setattr(quality, "WINDOW", 40)
    monkeypatch.setattr(quality, "CHUNK", 9)


@pytest.fixture(scope="module")
def model():
    """Random weights, smaller than usual: the logits are not those of chaos."""
    model = small_model("llama", seed=1, head_dim=64, vocab_size=128)
    model.update(tree_map(lambda x: 0.3 * x if x.ndim > 1 else x, model.parameters()))
    return model


def test_perplexity_is_that_of_windows_without_a_cache_and_changes_with_fewer_bits(model):
    tokens, found = np.random.default_rng(0).integers(0, 128, 201).tolist(), {}
    windows = [tokens[start : start + 40] for start in range(0, 200, 40)]
    losses = [
        nn.losses.cross_entropy(model(mx.array([window[:-1]]))[0], mx.array(window[1:]))
        for window in windows  # the last token has nothing to predict
    ]
    for name in quality.FORMATS:
        with quality.caches(model, name, quality.WINDOW) as new_cache:
            found[name] = quality.perplexity(model, tokens, new_cache)
    exact = math.exp(mx.concatenate(losses).mean().item())
    assert found["16"] == pytest.approx(exact, rel=1e-3)
    far = {name: abs(value / found["16"] - 1) for name, value in found.items()}
    assert 3 * far["8"] < far["8 and 4"] < 0.1
    assert 3 * far["8"] < far["4"] < 0.1
    assert 3 * far["mlx-lm 8"] < far["mlx-lm 4"] < 0.1


@pytest.mark.parametrize(("sight", "share"), [(1000, 1), (560, 0.6), (50, 0)])
def test_share_of_needles_that_are_found(sight, share, monkeypatch):
    monkeypatch.setattr(quality, "TRIALS", 2)
    assert quality.share_found(Reader(sight), Letters(), TEXT, 1000, list) == share


def test_the_command_measures_format_by_format(tmp_path, monkeypatch):
    """A case that the backend cannot compute is reported; the others are measured."""

    class Fails(quality.QuantizedKVCache):
        def update_and_fetch(self, keys, values):
            raise RuntimeError("no implementation")

    def measure(*arguments):
        monkeypatch.setattr(sys, "argv", ["quality", "--machine", "box", *arguments])
        quality.main()

    small = small_model("llama", head_dim=64, vocab_size=128)
    monkeypatch.setattr(quality, "load", lambda: (small, Letters()))
    monkeypatch.setattr(quality, "topics", {"a": Letters().decode(TEXT)})
    monkeypatch.setattr(quality, "FILE", tmp_path / "quality.csv")
    monkeypatch.setattr(quality, "DEPTHS", (0.5,))
    monkeypatch.setattr(quality, "TRIALS", 2)
    monkeypatch.setattr(quality, "QuantizedKVCache", Fails)
    with pytest.raises(SystemExit, match="not measured: mlx-lm 8: no implementation"):
        measure("--formats", "mlx-lm 8", "16", "--tokens", "50", "--needle", "160")
    for more in (["--tokens", "2001", "--needle"], ["--tokens", "50", "--needle", "30"]):
        with pytest.raises(SystemExit, match=r"expected .* of the text, got"):
            measure("--formats", "4", *more)
    quality.record("box", "text", "16", "perplexity", 10)
    quality.record("box", "text", "mlx-lm 4", "perplexity", 12)
    header, rows = read_csv(quality.FILE)
    assert header == quality.HEADER
    assert [(row[2], row[3]) for row in rows[:2]] == [
        ("16", "perplexity of 50 tokens"),
        ("16", "needles found in 160 tokens"),
    ]
    assert rows[2:] == [
        ["box", "text", "16", "perplexity", "10", "+0.00%"],
        ["box", "text", "mlx-lm 4", "perplexity", "12", "+20.00%"],
    ]
