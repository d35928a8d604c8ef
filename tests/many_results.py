"""Results as machines would have them after years of nights: of made-up numbers, seeded."""

import itertools
import json
import random
import subprocess

from benchmarks.common import GRID, QUICK_BLOCK_SIZES, QUICK_CONTEXTS

PATHS = ("GatherBlockMajor", "GatherHeadMajor", "GatherRows", "GatherRowsGrouped", "Fused")
OF_GRID = [
    *(f"overhead.{path}.ratio_vs_contiguous" for path in ("Auto", *PATHS)),
    *(f"decode.{path}.time_decode" for path in ("Auto", "Contiguous", *PATHS)),
    *(f"decode.GatherOnly{layout}.time_gather" for layout in ("BlockMajor", "HeadMajor")),
    *(f"append.Naive{layout}.time_append" for layout in ("BlockMajor", "HeadMajor")),
    "step.Auto.ratio_step_vs_contiguous",
    "step.Bound.ratio_step_vs_bound",
]
OF_MODEL = {
    "prompt.FirstToken.ratio_speed": [[512, 2048, 8192]],
    "prompt.Cached.ratio_time": [[2048, 8192], [32, 256]],
    "generate.Decode.ratio_tokens_per_second": [[1, 8, 32], [512, 4096, 16384]],
    "generate.Skewed.ratio_tokens_per_second": [[512, 8192]],
    "generate.FirstToken.ratio_first_token": [[512, 2048]],
    "generate.Forks.track_memory": [[512, 4096], [0, 1]],
    "server.Requests.ratio_requests_per_second": [[1, 32]],
}
PHASES = 9
STARTED = 1_800_000_000_000  # milliseconds


def history(folder, commits):
    """Make a repository of empty commits on main, the first of them phases; return their hashes."""
    lines = []
    for number in range(commits):
        trailer = f"\n\nPhase: {number}" if number < PHASES else ""
        message = f"Commit {number}{trailer}"
        who = f"committer t <t@example.invalid> {number + 10**9} +0000"
        lines += ["commit refs/heads/main", who, f"data {len(message)}", message]
    git = ["git", "-C", str(folder)]
    subprocess.run(["git", "init", "-q", "-b", "main", str(folder)], check=True)
    text = "\n".join(lines) + "\n"
    subprocess.run([*git, "fast-import", "--quiet"], input=text, text=True, check=True)
    log = subprocess.run([*git, "log", "--reverse", "--format=%H"], capture_output=True, text=True)
    return log.stdout.split()


def _benchmark(rng, params, quick, started):
    cells = list(itertools.product(*params))
    there = [not quick or (c[1] in QUICK_CONTEXTS and c[2] in QUICK_BLOCK_SIZES) for c in cells]
    values = [rng.uniform(0.3, 3) if t else None for t in there]

    def times(factor):
        return [None if value is None else round(value * factor, 5) for value in values]

    texts = [[str(x) for x in one] for one in params]
    ones = [None if value is None else 1 for value in values]
    # JSON of asv has NaN where a cell has no number.
    shown = [float("nan") if value is None else value for value in values]
    return [shown, texts, "1", started, 1.0, *map(times, (0.97, 1.03, 0.99, 1.01)), ones, ones]


def write(results, machine, commits, first_started=STARTED):
    """Write what a machine measured: the full grid at phases, the quick one of every commit."""
    folder = results / machine
    folder.mkdir(parents=True)
    record = {"machine": machine, "arch": "a", "cpu": f"CPU of {machine}", "num_cpu": "2"}
    record |= {"os": "Linux 1", "ram": "1 GB"}
    (folder / "machine.json").write_text(json.dumps({**record, "version": 1}))
    rng = random.Random(machine)
    columns = ["result", "params", "version", "started_at", "duration", "stats_ci_99_a"]
    columns += ["stats_ci_99_b", "stats_q_25", "stats_q_75", "stats_number", "stats_repeat"]
    for number, commit in enumerate(commits):
        started = first_started + number
        found = {n: _benchmark(rng, GRID, number >= PHASES, started) for n in OF_GRID}
        found |= {n: _benchmark(rng, params, False, started) for n, params in OF_MODEL.items()}
        content = {"commit_hash": commit, "env_name": "python-mlx0.32.4", "date": started}
        content |= {"params": {**record, "python": "3.12", "mlx": "0.32.4"}, "python": "3.12"}
        content |= {"requirements": {"mlx": "0.32.4"}, "env_vars": {}, "result_columns": columns}
        content |= {"results": found, "durations": {}, "version": 2}
        (folder / f"{commit[:8]}-python-mlx0.32.4.json").write_text(json.dumps(content))
