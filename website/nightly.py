"""What the benchmark machine does for main: measure what is new, keep results on a branch.

Results live on the branch `results`, beside the history they are about: its commits are no commits
of main, so they are not measured and start nothing.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from asv.util import UserError

from website import history
from website.compare import COMPARED, changes, recorded_noise
from website.history import (
    ROOT,
    asv,
    asv_settings,
    backend_settings,
    check_history,
    config_for,
    derive_config,
    discover,
    git,
    machine_name,
    record_machine,
    selection,
)
from website.lock import acquire
from website.report import RESULTS, measured_commits

BRANCH = "results"
AGAIN = 4  # rounds of what looks like a regression


def _git(root, *args, text=None, env=None):
    """Return what a git command prints; a UserError says what it said when it failed."""
    done = subprocess.run(
        ["git", "-C", str(root), *args],
        capture_output=True,
        text=True,
        input=text,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise UserError(f"git {args[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def fetch_results(remote="origin", root=ROOT):
    """Bring the files of the branch `results` into results/; those that are there give way."""
    if not _git(root, "ls-remote", "--heads", remote, BRANCH):
        print(f"{remote} has no branch {BRANCH} yet")
        return
    _git(root, "fetch", "--quiet", remote, BRANCH)
    tree = _git(root, "rev-parse", "FETCH_HEAD^{tree}")
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        _git(root, "read-tree", tree, env=index)
        _git(root, "checkout-index", "--all", "--force", f"--prefix={root}/", env=index)


def push_results(remote="origin", root=ROOT):
    """Commit results/ on top of the remote's branch `results`, and push it if that is new.

    Another push in between is an error, and nothing has been lost then: fetch, and push again.
    """
    parents = []
    if _git(root, "ls-remote", "--heads", remote, BRANCH):
        _git(root, "fetch", "--quiet", remote, BRANCH)
        parents = [_git(root, "rev-parse", "FETCH_HEAD")]
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        # What the branch has and this checkout lacks stays.
        _git(root, "read-tree", *(parents or ["--empty"]), env=index)
        _git(root, "add", "--force", "--ignore-removal", "results", env=index)
        _git(
            root,
            "rm",
            "--cached",
            "--quiet",
            "--ignore-unmatch",
            "results/benchmarks.json",
            env=index,
        )
        tree = _git(root, "write-tree", env=index)
    if parents and tree == _git(root, "rev-parse", f"{parents[0]}^{{tree}}"):
        print("no new results")
        return
    head = _git(root, "rev-parse", "--short", "HEAD")
    identity = ["-c", "user.name=benchmark-publish", "-c", "user.email=benchmark@localhost"]
    message = f"Results up to {head}"
    parent = ["-p", parents[0]] if parents else []
    commit = _git(root, *identity, "commit-tree", tree, *parent, "-m", message)
    _git(root, "push", "--quiet", remote, f"{commit}:refs/heads/{BRANCH}")
    print(f"{message}: {commit[:8]}")


def nightly(machine, backend, grid):
    """Measure what is new on main and the phases, then once more what looks like a regression."""
    head, before, status = git("rev-parse", "HEAD"), measured_commits(machine), 0
    config = config_for(backend)
    if before and head not in before:
        if grid == "quick":
            os.environ["PAGEDKV_GRID"] = "quick"
        status = asv("run", "--machine", machine, "--show-stderr", "NEW", config=config)
        os.environ.pop("PAGEDKV_GRID", None)
    if status in (0, 2):
        status = max(status, history.run(grid, machine, backend, rounds=2))
    if before[:-1] and status in (0, 2):
        status = max(status, again(machine, config, head))
    return status


def again(machine, config, head):
    """Measure apparent regressions of HEAD once more, at both commits, and print what stays."""
    previous = [commit for commit in measured_commits(machine) if commit != head][-1]
    factors, _, _ = recorded_noise(machine)

    def worsened():
        compared = changes(RESULTS, machine, previous, head)
        return [change for change in compared if change.verdict(factors) == "worsened"]

    suspects = worsened()
    if not suspects:
        print("no regressions")
        return 0
    names = {change.name.split("(")[0] for change in suspects}
    options = ["--machine", machine, "--attribute", f"rounds={AGAIN}", "--show-stderr"]
    for name, benchmark in discover(machine, config).items():
        if name in names:
            options += selection(benchmark, "quick")
    status = max(asv("run", *options, f"{commit}^!", config=config) for commit in (previous, head))
    for change in worsened():
        print(f"regression: {change.name} {change.ratio.show(interval=True)}")
    return status


def newest_mlx():
    """Return the newest released version of MLX."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "mlx"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip does not know MLX's versions: {done.stderr.strip()}")
    return re.match(r"mlx \((\S+)\)", done.stdout)[1]


def with_newest_mlx(machine, backend):
    """Measure HEAD with the newest MLX, as an axis of its own beside the pinned version."""
    version, matrix = newest_mlx(), asv_settings()["matrix"]
    if version in matrix["req"]["mlx"]:
        print(f"MLX {version} is the newest and the one that is measured anyway")
        return 0
    newest = {**matrix, "req": {**matrix["req"], "mlx": [version]}}
    config = derive_config("newest", **backend_settings(backend), matrix=newest)
    options = ["--machine", machine, "--show-stderr"]
    for name, benchmark in discover(machine, config).items():
        if name.startswith(COMPARED):
            options += selection(benchmark, "quick")
    return asv("run", *options, "HEAD^!", config=config)


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m website.nightly", description=__doc__)
    commands = ["run", "newest-mlx", "fetch-results", "push-results"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("--grid", choices=["quick", "full"], default="quick")
    parser.add_argument("--remote", default="origin", help="where the branch results is")
    parser.add_argument("--backend", choices=["cpu", "cuda12", "cuda13"], default="cpu")
    parser.add_argument("--machine", help="name in results/ (default: this host's name)")
    args = parser.parse_args()
    machine = args.machine or machine_name(args.backend)
    try:
        if args.command == "fetch-results":
            return fetch_results(args.remote)
        if args.command == "push-results":
            return push_results(args.remote)
        acquire()
        check_history()
        record_machine(machine)
        if args.command == "newest-mlx":
            return with_newest_mlx(machine, args.backend)
        return nightly(machine, args.backend, args.grid)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
