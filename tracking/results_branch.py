"""Results that main does not record, on the branch `results`, beside the history they are about.

Its commits are no commits of main, so they are not measured and start nothing.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from asv.util import UserError

from tracking import valid
from tracking.files import write_text
from tracking.noise import is_noise, merge_noise
from tracking.repository import ROOT, git

BRANCH = "results"
SYNCED = "refs/tracking/results"  # what this clone last had in common with the branch


def merge(file, other, base):
    """Add to a file of results what another of that commit has more of or newer, by benchmark.

    `base` has the rows that the two last had in common, {} if that is not known: whose row is
    still that one has nothing newer, whatever the clocks say. Where both are new the file's own
    stays unless the other has more numbers.
    """
    ours, theirs = valid.load(file), valid.load(other)

    def numbers(row):
        return sum(value is not None and not math.isnan(value) for value in row[0] or ())

    def is_better(name, row):
        own = ours["results"].get(name)
        if own is None or json.dumps(own) == json.dumps(base.get(name)):  # NaN is equal to NaN
            return json.dumps(own) != json.dumps(row)
        return own[2:3] == row[2:3] and numbers(row) > numbers(own)  # of one version

    better = {name: row for name, row in theirs["results"].items() if is_better(name, row)}
    if better:
        # Both are the first few of asv's, and rows may end early.
        ours["result_columns"] = max(ours["result_columns"], theirs["result_columns"], key=len)
        ours["results"] |= better
        valid.write_json(file, ours)


def _rows(commit, path, root):
    """Return the rows of a file of results in a commit, {} if it has none that are valid."""
    try:
        content = git("show", f"{commit}:{path}", root=root).encode(errors="surrogateescape")
        return valid.parse(path, content)["results"]
    except UserError:
        return {}


def fetch_results(remote="origin", root=ROOT):
    """Bring what the branch `results` has into results/; return its commit, None without a branch.

    Where both have results of a commit, they are merged. Machine records that are there stay. What
    is broken is named: on the branch it is left out, here it is set aside.
    """
    valid.set_aside(Path(root, "results"))
    if not git("ls-remote", remote, f"refs/heads/{BRANCH}", root=root):
        print(f"{remote} has no branch {BRANCH} yet")
        return None
    git("fetch", "--quiet", remote, f"refs/heads/{BRANCH}", root=root)
    tip = git("rev-parse", "FETCH_HEAD", root=root)
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        git("read-tree", tip, env=index, root=root)
        checkout = ["-c", "core.symlinks=false", "checkout-index", "--all", f"--prefix={scratch}/"]
        git(*checkout, env=index, root=root)
        for file in sorted(Path(scratch).glob("results/*/*.json")):
            path = file.relative_to(scratch)
            try:
                valid.load(file)
            except valid.BrokenFileError as error:
                said = str(error).replace(f"{scratch}/", "")
                print(f"on the branch {BRANCH} {said}; left out", file=sys.stderr)
                continue
            here = Path(root, path)
            if not here.exists():
                write_text(here, file.read_text(encoding="utf-8"))
            elif file.name != "machine.json":
                merge(here, file, _rows(SYNCED, path, root))
        for file in sorted(Path(scratch).glob("results/*/noise.csv")):
            merge_noise(Path(root, file.relative_to(scratch)), file)
    git("update-ref", SYNCED, tip, root=root)
    return tip


def unrecorded(root):
    """Return the files of results that HEAD does not have like this, but for broken noise."""
    pattern = ("--", ":(glob)results/*/*.json", ":(glob)results/*/noise.csv")
    new = git("ls-files", "--others", "-z", *pattern, root=root)
    changed = git("diff", "--name-only", "-z", "--diff-filter=d", "HEAD", *pattern, root=root)
    found = sorted({*new.split("\0"), *changed.split("\0")} - {""})
    return [file for file in found if file.endswith(".json") or is_noise(Path(root, file))]


def push_results(remote="origin", root=ROOT):
    """Merge with the remote's branch `results`, and push to it what HEAD does not record.

    Another push in between is an error, and nothing has been lost then: push again.
    """
    tip = fetch_results(remote, root)
    files = unrecorded(root)
    if not files:
        print("no new results")
        return
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        # What the branch has and this checkout lacks stays.
        git("read-tree", tip or "--empty", env=index, root=root)
        git("--literal-pathspecs", "add", "--force", "--", *files, env=index, root=root)
        tree = git("write-tree", env=index, root=root)
    if tip and tree == git("rev-parse", f"{tip}^{{tree}}", root=root):
        print("no new results")
        return
    head = git("rev-parse", "--short", "HEAD", root=root)
    identity = ["-c", "user.name=benchmark-publish", "-c", "user.email=benchmark@localhost"]
    message = f"Results up to {head}"
    parent = ["-p", tip] if tip else []
    commit = git(*identity, "commit-tree", tree, *parent, "-m", message, root=root)
    git("push", "--quiet", remote, f"{commit}:refs/heads/{BRANCH}", root=root)
    git("update-ref", SYNCED, commit, root=root)
    print(f"{message}: {commit[:8]}")
