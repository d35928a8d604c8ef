"""Ask a small real model three questions over a paged store, and see what was reused.

    python examples/smollm.py       # once: downloads the model
    python examples/chat.py --memory 200MB

Each question starts a conversation after the same system prompt. The first one computes it; the
others find its whole blocks in the store. Generation is mlx-lm's own `stream_generate`.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import smollm
from mlx_lm import stream_generate
from rich.console import Console
from rich.table import Table

from pagedkv import PagedKVError
from pagedkv.mlx_lm import PagedStore

SYSTEM = (
    "You are the guide of a small science museum. Visitors ask you questions while they walk past "
    "the exhibits. Answer in one or two plain sentences, with facts and without lists. Be "
    "friendly, do not repeat the question, and never make up names, numbers or dates. If you do "
    "not know an answer, say so, and send the visitor to the library on the second floor."
)
QUESTIONS = [
    "Why is the sky blue?",
    "What is a magnet made of?",
    "How do birds stay in the air?",
]


@dataclass
class Answer:
    """An answer, and what it took.

    Attributes
    ----------
    text : str
        The answer.
    prompt, reused : int
        Tokens of the prompt, and those of them that the store had.
    first : float
        Seconds to the first token.
    speed : float
        Tokens per second after it.
    """

    text: str
    prompt: int
    reused: int
    first: float
    speed: float


def prompt_of(tokenizer, system, question):
    """Return the tokens of a conversation that begins with a question."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def answer(store, model, tokenizer, prompt, most, write):
    """Generate at most `most` tokens, hand each piece of text to `write`, return an `Answer`."""
    cache = store.cache(prompt)
    text, first, begin = "", 0.0, time.perf_counter()
    for piece in stream_generate(model, tokenizer, prompt, max_tokens=most, prompt_cache=cache):
        first = first or time.perf_counter() - begin
        text += piece.text
        write(piece.text)
    return Answer(text, len(prompt), cache.cached, first, piece.generation_tps)


def table_of(answers):
    """Return a table of what the answers took."""
    table = Table("question", "prompt tokens", "reused", "first token", "tokens/s")
    for number, took in enumerate(answers, 1):
        reused = f"{took.reused} ({took.reused / took.prompt:.0%})"
        first, speed = f"{took.first:.2f} s", f"{took.speed:.1f}"
        table.add_row(str(number), str(took.prompt), reused, first, speed)
    return table


def main():
    """Parse the command line, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", default="200MB", help="of the store")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer")
    parser.add_argument("--system", default=SYSTEM, help="system prompt of all questions")
    args = parser.parse_args()

    console = Console(highlight=False)

    def write(text):
        console.print(text, end="", markup=False, soft_wrap=True)

    try:
        model, tokenizer = smollm.load()
    except smollm.NoModelError as error:
        sys.exit(str(error))
    try:
        store = PagedStore(model, memory=args.memory, block_size=args.block_size)
    except ValueError as error:
        sys.exit(str(error))
    with store:
        answers = []
        try:
            for question in QUESTIONS:
                console.print(f"[bold]{question}[/bold]")
                prompt = prompt_of(tokenizer, args.system, question)
                answers.append(answer(store, model, tokenizer, prompt, args.tokens, write))
                console.print("\n")
        except PagedKVError as error:
            sys.exit(f"--memory {args.memory} is too small for a question and its answer: {error}")
        stats = store.stats()
    console.print(table_of(answers))
    console.print(
        f"{stats.num_blocks} blocks of {args.block_size} tokens, {stats.block_bytes:,} bytes each: "
        f"{stats.cached_blocks} hold prefixes for later, {stats.peak_blocks} were in use at most"
    )


if __name__ == "__main__":
    main()
