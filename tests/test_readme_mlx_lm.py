"""The README's example with mlx-lm, with a small model in the place of the one it names."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
pytest.importorskip("openai", reason="the test group is not installed")
from mlx_lm import generate, load
from served_models import saved_model

README = Path(__file__).parents[1] / "README.md"


def test_it_prints_what_mlx_lm_says_and_what_was_cached(tmp_path, capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    [example] = [text for text in examples if "PagedStore" in text]
    path = saved_model(tmp_path / "model")
    example, models = re.subn(r'load\("[^"]+"\)', f"load({path!r})", example)
    example, budgets = re.subn('memory="2GB"', 'memory="4MB"', example)
    assert (models, budgets) == (1, 1)
    names = {}
    exec(example, names)
    said = capsys.readouterr().out
    model, tokenizer = load(path)
    assert said.startswith(generate(model, tokenizer, names["prompt"]))
    assert "0 tokens of the prompt were cached; StoreStats(num_blocks=" in said
