"""What README.md and docs/with-mlx-lm.md say of their examples, and of models, is so."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from small_models import FAMILIES, small_model
from test_mlx_lm_store import UNSUPPORTED

from pagedkv.mlx_lm import PagedStore

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def few_layers(monkeypatch):
    """Load two of the model's thirty layers, which is faster: as many tokens are cached."""
    load = mlx_lm.load

    def load_few(path):
        model, tokenizer = load(path)
        del model.model.layers[2:]
        return model, tokenizer

    monkeypatch.setattr(mlx_lm, "load", load_few)


@pytest.mark.usefixtures("smollm_folder", "few_layers")
def test_the_example_prints_what_the_readme_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example.replace("max_tokens=40", "max_tokens=1"), {})  # faster, with the same counts
    counts = r"\d+ of \d+ prompt tokens were cached"
    assert re.findall(counts, capsys.readouterr().out) == re.findall(f"`({counts})`", README)


def saying(tokenizer):
    """A sampler that says a sentence, whose text becomes the same tokens again."""
    tokens = iter(tokenizer.encode("Air scatters blue light, whose waves are short, " * 3))
    return lambda _: mx.array([next(tokens)])


@pytest.mark.usefixtures("few_layers")
def test_each_task_prints_what_its_comments_say(smollm_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(".models").symlink_to(smollm_folder.parent)
    text = (ROOT / "docs/with-mlx-lm.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    faster = re.sub(r'(max_tokens"?[=:] ?)10\b', r"\g<1>1", code)
    faster, printed = faster.replace("=20,", "=20, sampler=saying(tokenizer),"), []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    exec(faster, {**names, "saying": saying})
    assert printed == re.findall(r"^print\(.*\)  # (.*)", code, re.M)


def test_the_program_for_several_machines_runs_on_one(smollm_folder, capsys):
    text = (ROOT / "docs/several-machines.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = re.sub(r'sharded_load\("[^"]*"', f"sharded_load({str(smollm_folder)!r}", program)
    program = program.replace('"8GB"', '"50MB"').replace(
        "prompt_cache=", "max_tokens=4, prompt_cache="
    )
    exec(program, {})
    assert capsys.readouterr().out == "Hello! How can\n"


def traits(family):
    """Whether a family's prompts are reused, and blocks that left a window given back."""
    model, prompt = small_model(family), list(range(1, 40))
    windowed = any(isinstance(layer, RotatingKVCache) for layer in make_prompt_cache(model))
    with PagedStore(model, num_blocks=64, block_size=4) as store:
        for _ in range(2):
            cache = store.cache(prompt)
            list(generate_step(mx.array(prompt), model, max_tokens=2, prompt_cache=cache))
        freed = any(window for window, _ in store.stats().groups)
    return "yes" if cache.cached else "no", ("yes" if freed else "no") if windowed else "no window"


def test_the_table_of_models_is_what_tests_run():
    rows = {}
    for family in FAMILIES:
        rows.setdefault(traits(family), []).append(family)
    lines = [
        "| models | cached prompts are reused | blocks outside a sliding window are given back |",
        "| --- | --- | --- |",
        *(f"| {', '.join(families)} | {' | '.join(both)} |" for both, families in rows.items()),
        f"| {', '.join(UNSUPPORTED)} | refused | |",
    ]
    table = "\n".join(lines)
    assert table in README, f"expected this table in README.md:\n{table}"
