"""Replay a request trace through the scheduler and show what the cache does.

    python examples/replay_trace.py --blocks 400 --plot usage.png

Requests arrive at random times, share a few system prompts and ask for outputs of random length;
the trace is generated from a seed. No model runs: every sampled token is a random number, and time
is counted in steps.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from pagedkv import BlockPool, Scheduler, blocks_needed, render_prometheus

BLOCK_SIZE = 16


def make_trace(requests, seed):
    """Return (arrival step, prompt, output tokens) of each request, in order of arrival."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(0, 32000, length) for length in (128, 256, 512, 512)]
    popularity = [0.5, 0.25, 0.15, 0.1]
    trace, now = [], 0.0
    for _ in range(requests):
        now += rng.exponential(4.0)
        own = rng.integers(0, 32000, rng.integers(4, 256))
        prompt = np.concatenate([systems[rng.choice(4, p=popularity)], own])
        trace.append((int(now), prompt, int(rng.geometric(1 / 64))))
    return trace


def replay(trace, num_blocks, seed):
    """Run the trace to its end; return the `Stats` after every step, and steps by request."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(BlockPool(num_blocks), BLOCK_SIZE, max_tokens=512, max_running=32)
    history, finished, arrived, step_number = [], {}, 0, 0
    while len(finished) < len(trace):
        while arrived < len(trace) and trace[arrived][0] <= step_number:
            _, prompt, output = trace[arrived]
            scheduler.add(arrived, prompt, output)
            arrived += 1
        step = scheduler.schedule()
        if step.request_ids:
            sampled = {request: int(rng.integers(32000)) for request in step.samples}
            for request in scheduler.update(sampled):
                finished[request] = step_number - trace[request][0]
        history.append(scheduler.stats())
        step_number += 1
    return history, sorted(finished.values())


def count(text):
    """Return a number of the command line, 1 at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text}")
    return int(text)


def check_blocks(blocks, block_size, lengths):
    """Exit unless each request, (prompt tokens, new tokens), fits into the blocks."""
    needed = max(blocks_needed(prompt + new - 1, block_size) for prompt, new in lengths)
    if blocks < needed:
        sys.exit(f"expected --blocks of {needed} at least, got {blocks}")


def save_plot(history, path):
    """Save live, cached and free blocks over the steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    states = ("live", "cached", "free")
    blocks = [[getattr(stats, f"blocks_{state}") for stats in history] for state in states]
    colors = ["tab:blue", "tab:orange", "whitesmoke"]
    axes.stackplot(range(len(history)), blocks, labels=states, colors=colors)
    axes.set(xlabel="step", ylabel="blocks", xmargin=0, ymargin=0)
    axes.legend(loc="upper left", ncols=3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        sys.exit(f"the plot was not saved: {error}")
    finally:
        plt.close(figure)


def main():
    """Parse the command line, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=count, default=500)
    parser.add_argument("--blocks", type=count, default=400, help="of 16 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where to save block usage over time")
    parser.add_argument("--prometheus", action="store_true", help="print the metrics as scraped")
    args = parser.parse_args()

    trace = make_trace(args.requests, args.seed)
    check_blocks(args.blocks, BLOCK_SIZE, [(len(prompt), new) for _, prompt, new in trace])
    history, latencies = replay(trace, args.blocks, args.seed)
    stats = history[-1]
    print(f"{args.requests} requests in {len(history)} steps, {args.blocks} blocks")
    print(f"prompt tokens not computed: {stats.hit_rate:.1%} of {stats.prompt_tokens}")
    print(f"preemptions: {stats.preemptions}, evicted blocks: {stats.evicted_blocks}")
    print(f"steps a request: median {latencies[len(latencies) // 2]}, longest {latencies[-1]}")
    print("\nstep    live  cached    free  waiting  running")
    for number in range(0, len(history), max(1, len(history) // 12)):
        now = history[number]
        print(
            f"{number:5} {now.blocks_live:7} {now.blocks_cached:7} {now.blocks_free:7} "
            f"{now.waiting:8} {now.running:8}"
        )
    if args.plot:
        save_plot(history, args.plot)
        print(f"\nplot: {args.plot}")
    if args.prometheus:
        print(f"\n{render_prometheus(stats)}", end="")


if __name__ == "__main__":
    main()
