"""The page after years of nights: 500 commits on 4 machines, of made-up numbers."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the page is looked at by make prove")
sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))
from browser import OverheadPage, browse

from tracking import repository
from website.overhead import gather, page

GRID = [[1, 4], [1024, 4096], [32]]  # the quick one
PATHS = ("GatherBlockMajor", "GatherHeadMajor", "GatherRows", "GatherRowsGrouped", "Fused")
PARAMS = {
    **{f"overhead.{path}.ratio_vs_contiguous": GRID for path in ("Auto", *PATHS)},
    **{f"decode.{path}.time_decode": GRID for path in ("Auto", "Contiguous", *PATHS)},
    "step.Auto.ratio_step_vs_contiguous": GRID,
    "step.Bound.ratio_step_vs_bound": GRID,
    "prompt.FirstToken.ratio_speed": [[512, 2048, 8192]],
    "generate.Decode.ratio_tokens_per_second": [[1, 8, 32], [512, 4096, 16384]],
}
PHASES, COMMITS, MACHINES = 9, 500, ("a", "b", "c", "d")


def history(folder):
    """Make a repository of empty commits on main, the first of them phases; return their hashes."""
    lines = []
    for number in range(COMMITS):
        trailer = f"\n\nPhase: {number}" if number < PHASES else ""
        message = f"Commit {number}{trailer}"
        who = f"committer t <t@example.invalid> {number + 10**9} +0000"
        lines += ["commit refs/heads/main", who, f"data {len(message)}", message]
    git, text = ["git", "-C", str(folder)], "\n".join(lines) + "\n"
    subprocess.run(["git", "init", "-q", "-b", "main", str(folder)], check=True)
    subprocess.run([*git, "fast-import", "--quiet"], input=text, text=True, check=True)
    log = subprocess.run([*git, "log", "--reverse", "--format=%H"], capture_output=True, text=True)
    return log.stdout.split()


def measure(folder, machine, commits):
    """Write what a machine would have measured of the quick grid, seeded."""
    folder = folder / machine
    folder.mkdir(parents=True)
    record = {"machine": machine, "cpu": f"CPU of {machine}", "os": "Linux 1", "ram": "1 GB"}
    (folder / "machine.json").write_text(json.dumps({**record, "version": 1}))
    rng = random.Random(machine)
    columns = ["result", "params", "version", "started_at", "duration", "stats_ci_99_a"]
    columns += ["stats_ci_99_b", "stats_q_25", "stats_q_75", "stats_number", "stats_repeat"]
    for number, commit in enumerate(commits):
        found, started = {}, 1_800_000_000_000 + number
        for name, params in PARAMS.items():
            values = [rng.uniform(0.3, 3) for _ in itertools.product(*params)]
            ends = [[round(x * factor, 5) for x in values] for factor in (0.97, 1.03, 0.99, 1.01)]
            ones, texts = [1] * len(values), [[str(x) for x in one] for one in params]
            found[name] = [values, texts, "1", started, 1.0, *ends, ones, ones]
        content = {"commit_hash": commit, "env_name": "python-mlx0.32.4", "date": started}
        content |= {"params": {**record, "python": "3.12", "mlx": "0.32.4"}, "python": "3.12"}
        content |= {"requirements": {"mlx": "0.32.4"}, "env_vars": {}, "result_columns": columns}
        content |= {"results": found, "durations": {}, "version": 2}
        (folder / f"{commit[:8]}-python-mlx0.32.4.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder with the page."""
    folder = tmp_path_factory.mktemp("many")
    commits = history(folder / "repository")
    for machine in MACHINES:
        measure(folder / "results", machine, commits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "ROOT", folder / "repository")
        (folder / "overhead.html").write_text(page(gather(folder / "results")))
    return folder


def test_it_is_small_and_shows_the_phases_and_the_newest(built):
    """A page of some megabytes; a table of 39 rows, whatever there is."""
    assert (built / "overhead.html").stat().st_size < 5e6
    with browse(built) as (tab, address):
        overhead = OverheadPage(tab)
        overhead.open(f"{address}/overhead.html", machine=MACHINES[0])
        assert tab.locator("#commit option").count() == COMMITS
        assert tab.locator("#machine option").count() == len(MACHINES)
        assert len(overhead.table("phases-table")) == 1 + PHASES + 30
        assert overhead.text("#phases-note").startswith("39 of 500 commits")
