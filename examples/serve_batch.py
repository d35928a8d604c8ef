"""Serve requests that come and go with one of mlx-lm's models, in a tight budget of blocks.

    python examples/smollm.py       # once: downloads the model
    python examples/serve_batch.py --plot usage.png
    python examples/serve_batch.py --random

Requests arrive over time, begin with the same prompt, and end after a number of tokens or when the
model ends its answer. The scheduler chooses what is computed next: chunks of prompts together with
the next tokens of others. When blocks run out it preempts requests, and computes them again later.
With --random the model has random weights: nothing is downloaded, and the answers mean nothing.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama
from replay_trace import check_blocks, count, save_plot
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pagedkv import Scheduler
from pagedkv.mlx_lm import ScheduledModel

SYSTEM = (
    "You answer questions of children. Use one or two short sentences and plain words, be friendly "
    "and stay with the facts. If you do not know an answer, say so."
)
QUESTIONS = [
    "Why is the sky blue?",
    "What do bees eat?",
    "Why is the sea salty?",
    "How do birds fly?",
    "What is ice made of?",
    "Why do cats purr?",
    "Where does the rain come from?",
    "Why does the moon shine?",
    "What is a volcano?",
    "How do fish breathe?",
    "Why do leaves fall?",
    "What is thunder?",
]
VOCABULARY = 97  # of the random model
BLOCK_SIZE = 8


@dataclass
class Request:
    """A prompt on its way.

    Attributes
    ----------
    arrival : int
        The step before which it arrives.
    prompt : list of int
        Its tokens.
    most : int
        Tokens of the answer, if the model does not end it before.
    """

    arrival: int
    prompt: list[int]
    most: int


def random_model(seed=0):
    """Return a llama of three small layers with random weights."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )
    mx.random.seed(seed)
    model = llama.Model(args)
    model.update(
        tree_map(
            lambda x: mx.random.normal(x.shape) * (0.4 if x.ndim > 1 else 0.1) + (x.ndim == 1),
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


def random_prompts(count, rng):
    """Return prompts that begin alike."""
    shared = rng.integers(0, VOCABULARY, 40).tolist()
    own = [rng.integers(0, VOCABULARY, rng.integers(4, 24)).tolist() for _ in range(count)]
    return [shared + tokens for tokens in own]


def question_prompts(count, tokenizer):
    """Return conversations that begin with the same system prompt."""
    return [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]},
            ],
            add_generation_prompt=True,
        )
        for number in range(count)
    ]


def make_requests(prompts, most, rng):
    """Let prompts arrive one after the other, and want answers of different length."""
    gaps = rng.exponential(4.0, len(prompts))
    gaps[0] = 0
    return [
        Request(int(arrival), prompt, int(rng.integers(max(1, most // 2), most + 1)))
        for arrival, prompt in zip(np.cumsum(gaps), prompts, strict=True)
    ]


def serve(model, scheduler, requests, ends=(), report=lambda *_: None):
    """Serve requests to their end.

    Parameters
    ----------
    model : ScheduledModel
        What computes.
    scheduler : Scheduler
        What chooses, with the pool of the model's cache.
    requests : list of Request
        In order of arrival.
    ends : set of int
        Tokens that end an answer.
    report : callable
        Takes after each step how many tokens it computed, the scheduler's `Stats`, the answers so
        far, and the requests that ended with it.

    Returns
    -------
    dict of int to list of int
        The answers by the request's place in the list.
    """
    answers, open_requests, arrived, step = {}, set(), 0, 0
    while arrived < len(requests) or open_requests:
        if not open_requests:
            step = max(step, requests[arrived].arrival)  # nothing to do until then
        while arrived < len(requests) and requests[arrived].arrival <= step:
            scheduler.add(arrived, requests[arrived].prompt, requests[arrived].most)
            answers[arrived] = []
            open_requests.add(arrived)
            arrived += 1
        schedule = scheduler.schedule()
        logits = model.logits(schedule)
        sampled = {}
        if schedule.samples:
            tokens = mx.argmax(logits, axis=-1).tolist()
            sampled = dict(zip(schedule.samples, tokens, strict=True))
        for number, token in sampled.items():
            answers[number].append(token)
        over = scheduler.update(sampled)
        for number in [number for number, token in sampled.items() if token in ends]:
            if number not in over:
                scheduler.finish(number)
                over.append(number)
        open_requests -= set(over)
        step += 1
        report(len(schedule.tokens), scheduler.stats(), answers, over)
    return answers


class Reporter:
    """Shows a line of progress, prints answers as they end, and keeps the numbers of each step."""

    def __init__(self, progress, requests, decode):
        self.history, self.computed, self.begin = [], 0, time.perf_counter()
        self._progress, self._decode = progress, decode
        self._task = progress.add_task("", total=len(requests), now="")

    def __call__(self, computed, stats, answers, over):
        """Take the numbers of a step."""
        self.history.append(stats)
        self.computed += computed
        self._progress.update(self._task, advance=len(over), now=self.line())
        for number in over:
            text = self._decode(answers[number])
            self._progress.console.print(f"{number}: {text}", markup=False, highlight=False)

    def line(self):
        """Return what is going on now, in a line; tokens are those computed, of prompts too."""
        stats, took = self.history[-1], time.perf_counter() - self.begin
        return (
            f"{self.computed / took:.0f} tokens/s, {stats.hit_rate:.0%} hits, blocks: "
            f"{stats.blocks_live} live, {stats.blocks_cached} cached, {stats.blocks_free} free"
        )


def main():
    """Parse the command line, serve, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=count, default=12)
    parser.add_argument("--tokens", type=count, default=40, help="most tokens of an answer")
    parser.add_argument("--blocks", type=count, default=20, help=f"of {BLOCK_SIZE} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where to save block usage over time")
    parser.add_argument("--random", action="store_true", help="a small model with random weights")
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    if args.random:
        model, ends, decode = random_model(args.seed), (), str
        prompts = random_prompts(args.requests, rng)
    else:
        import smollm

        try:
            model, tokenizer = smollm.load()
        except smollm.NoModelError as error:
            sys.exit(str(error))
        ends, prompts = tokenizer.eos_token_ids, question_prompts(args.requests, tokenizer)

        def decode(tokens):
            return tokenizer.decode(tokens, skip_special_tokens=True)

    requests = make_requests(prompts, args.tokens, rng)
    columns = BarColumn(10), MofNCompleteColumn(), TextColumn("{task.fields[now]}")
    check_blocks(args.blocks, BLOCK_SIZE, [(len(one.prompt), one.most) for one in requests])
    with (
        ScheduledModel(model, num_blocks=args.blocks, block_size=BLOCK_SIZE) as scheduled,
        Progress(*columns, console=Console()) as progress,
    ):
        scheduler = Scheduler(scheduled.cache.pool, BLOCK_SIZE, max_tokens=64, watermark=0)
        reporter = Reporter(progress, requests, decode)
        serve(scheduled, scheduler, requests, ends, reporter)
    stats = reporter.history[-1]
    print(f"{len(requests)} requests in {len(reporter.history)} steps: {reporter.line()}")
    print(f"preemptions: {stats.preemptions}, evicted blocks: {stats.evicted_blocks}")
    if args.plot:
        save_plot(reporter.history, args.plot)
        print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
