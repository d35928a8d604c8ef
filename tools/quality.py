"""What K and V in few bits cost a small real model on a real text: `make quality`.

The model is SmolLM2-135M-Instruct, its weights made float16: few bits of weights are slow on some
backends. The text is Python's own reference as pydoc has it. Perplexity is that of windows of it.
For needle-in-a-haystack retrieval a number is hidden in it at several depths; at the end the model
is asked for the number, and has found it if each of its tokens is the most probable.

Each token attends over quantized K and V, also over its own: the first chunk is one token, because
a paged cache attends over a longer one before it is quantized. mlx-lm's own quantized cache is
filled in the same chunks.
"""

import argparse
import contextlib
import itertools
import math
import platform
import random
import statistics
import sys
from pydoc_data.topics import topics

import mlx.core as mx
from asv.util import UserError
from mlx import nn
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.utils import dequantize_model

from examples.smollm import NoModelError, load
from pagedkv import blocks_needed
from pagedkv.mlx_lm import PagedStore
from tracking.files import write_text
from tracking.project import machine_name, machine_options
from tracking.results import RESULTS
from tracking.tables import as_csv, read_csv

FILE = RESULTS / "quality.csv"
HEADER = ["machine", "text", "format", "measure", "value", "over 16"]
PAGED = {"16": None, "8": 8, "8 and 4": (8, 4), "4": 4}  # bits; of K and of V
MLX_LM = {"mlx-lm 8": 8, "mlx-lm 4": 4}
FORMATS = [*PAGED, *MLX_LM]
CHUNK = 256  # tokens
WINDOW = 2048  # tokens
LENGTHS = (1024, 4096, 8192)  # of a prompt with a needle and its answer; the model knows no longer
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TRIALS = 10  # for each depth, with another number in another part of the text

NEEDLE = "\n\nThe magic number of Zanzibar is {}.\n\n"
QUESTION = "\n\nWhat is the magic number of Zanzibar?"
ANSWER = "The magic number of Zanzibar is"  # begun
PLACE = "[the text]"  # in the chat template


@contextlib.contextmanager
def caches(model, name, tokens):
    """Give what makes an empty prompt cache of a format; one at a time has up to `tokens`."""
    if name in MLX_LM:
        yield lambda: [QuantizedKVCache(64, MLX_LM[name]) for _ in model.layers]
        return
    blocks = blocks_needed(tokens, 32)
    with PagedStore(model, num_blocks=blocks, block_size=32, kv_bits=PAGED[name]) as store:
        yield store.cache


def read(model, tokens, cache):
    """Append tokens to a cache chunk by chunk; yield each chunk's end and logits, [L, V]."""
    bounds = [0, *range(1, len(tokens), CHUNK), len(tokens)]
    for start, stop in itertools.pairwise(bounds):
        logits = model(mx.array([tokens[start:stop]]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits)
        yield stop, logits


def perplexity(model, tokens, new_cache):
    """Return the perplexity of tokens in windows; the first of each is given."""
    losses = []
    for start in range(0, len(tokens) - 1, WINDOW):
        window = tokens[start:][:WINDOW]
        for stop, logits in read(model, window[:-1], new_cache()):
            target = mx.array(window[stop + 1 - len(logits) : stop + 1])
            losses += nn.losses.cross_entropy(logits, target).tolist()
    return math.exp(statistics.fmean(losses))


def prompt_of(tokenizer, text, number, depth, length):
    """Return (prompt, answer), tokens: a text with a number at a depth, 0 to 1, and a question.

    `length` is that of both, and `text` are tokens, of which the first are taken.
    """
    messages = [{"role": "user", "content": PLACE + QUESTION}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = (tokenizer.encode(part) for part in (chat + ANSWER).split(PLACE))
    needle, answer = (tokenizer.encode(part.format(number)) for part in (NEEDLE, " {}"))
    room = length - sum(map(len, (before, needle, after, answer)))
    if not 0 < room <= len(text):
        raise ValueError(f"expected room for 1 to {len(text)} tokens of the text, got {room}")
    place = round(depth * room)
    return [*before, *text[:place], *needle, *text[place:room], *after], answer


def finds(model, prompt, answer, cache):
    """Return whether a model goes on from a prompt with the answer, the most probable tokens."""
    chunks = read(model, [*prompt, *answer[:-1]], cache)
    likely = [token for _, logits in chunks for token in mx.argmax(logits, axis=-1).tolist()]
    return likely[-len(answer) :] == answer


def share_found(model, tokenizer, text, length, new_cache):
    """Return the share of needles that are found, in prompts of `length` tokens with the answer."""
    numbers, found = random.Random(0), []
    for depth, trial in itertools.product(DEPTHS, range(TRIALS)):
        number = numbers.randrange(10_000, 100_000)
        asked = prompt_of(tokenizer, text[trial * length :], number, depth, length)
        found.append(finds(model, *asked, new_cache()))
    return statistics.fmean(found)


def record(machine, text, name, measure, value):
    """Write the value of a measure among what is recorded already."""
    rows = {tuple(row[:4]): row[4] for row in (read_csv(FILE)[1] if FILE.exists() else [])}
    rows[machine, text, name, measure] = f"{value:.6g}"

    def over(machine, text, name, measure):
        base, value = (float(rows.get((machine, text, x, measure), 0)) for x in ("16", name))
        return f"{100 * (value / base - 1):+.2f}%" if base else "n/a"

    order = sorted(rows, key=lambda row: (*row[:2], FORMATS.index(row[2])))
    write_text(FILE, as_csv(HEADER, [[*row, rows[row], over(*row)] for row in order]))
    print(f"{name}: {measure}: {value:.6g}", flush=True)


def measure(name, model, tokenizer, text, tokens, lengths):
    """Yield (measure, value) of a format: perplexity, then the share found by length."""
    with caches(model, name, max([WINDOW, *lengths])) as new_cache:
        yield f"perplexity of {tokens} tokens", perplexity(model, text[:tokens], new_cache)
        for length in lengths:
            share = share_found(model, tokenizer, text, length, new_cache)
            yield f"needles found in {length} tokens", share


def main():
    """Parse the command line, measure one format after another."""
    parser = argparse.ArgumentParser(prog="python -m tools.quality", description=__doc__)
    machine_options(parser)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--tokens", type=int, default=65536, help="of perplexity's text")
    parser.add_argument(
        "--needle", type=int, nargs="*", default=LENGTHS, metavar="TOKENS", help="of its prompts"
    )
    args = parser.parse_args()
    machine = args.machine or machine_name(args.backend)
    source = f"reference of Python {platform.python_version()}"
    failed = []
    try:
        model, tokenizer = load()
        model = dequantize_model(model)
        model.set_dtype(mx.float16)
        text = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
        for count in (args.tokens, *(TRIALS * length for length in args.needle)):
            if not 2 <= count <= len(text):
                raise ValueError(f"expected 2 to {len(text)} tokens of the text, got {count}")
        for length in args.needle:
            prompt_of(tokenizer, text, 10_000, 0.5, length)  # refuses one that is too short
        for name in args.formats:
            try:
                for found in measure(name, model, tokenizer, text, args.tokens, args.needle):
                    record(machine, source, name, *found)
            except RuntimeError as error:  # MLX has not every computation on every backend
                failed.append(f"not measured: {name}: {error}")
    except (NoModelError, UserError, ValueError, OSError) as error:
        sys.exit(str(error))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
