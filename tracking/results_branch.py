"""Results that main does not record, on a branch `results` whose commits measure nothing."""

import sys
import tempfile
from pathlib import Path

from tracking import valid
from tracking.files import write_text
from tracking.repository import ROOT, git

BRANCH = "results"
FILES = ("--", ":(glob)results/*/*.json")


def merge(ours, theirs):
    """Return two results of one commit as one: of each benchmark what was measured last."""
    columns = max(ours["result_columns"], theirs["result_columns"], key=len)
    at = columns.index("started_at")

    def started(row):
        return (row[at] if len(row) > at else None) or 0

    newer = {
        name: row
        for name, row in theirs["results"].items()
        if name not in ours["results"] or started(row) > started(ours["results"][name])
    }
    return {**ours, "result_columns": columns, "results": {**ours["results"], **newer}}


def fetch_results(remote="origin", root=ROOT):
    """Bring what the branch has into results/; return its commit, "" without a branch.

    A machine's record here stays. A broken file on the branch is named and left out.
    """
    valid.set_aside(Path(root, "results"))
    if not git("ls-remote", remote, f"refs/heads/{BRANCH}", root=root):
        print(f"{remote} has no branch {BRANCH} yet")
        return ""
    git("fetch", "--quiet", remote, f"refs/heads/{BRANCH}", root=root)
    listed = git("ls-tree", "-r", "-z", "--name-only", "FETCH_HEAD", "results", root=root)
    for path in listed.split("\0"):
        here = Path(root, path)
        if not path.endswith(".json") or (here.exists() and here.name == "machine.json"):
            continue
        content = git("cat-file", "blob", f"FETCH_HEAD:{path}", root=root)
        try:
            theirs = valid.parse(here, content.encode(errors="surrogateescape"))
        except valid.BrokenFileError as error:
            print(f"on the branch {BRANCH}: {error}; left out", file=sys.stderr)
            continue
        if not here.exists():
            write_text(here, content)
        elif (merged := merge(ours := valid.load(here), theirs)) != ours:
            valid.write_json(here, merged)
    return git("rev-parse", "FETCH_HEAD", root=root)


def push_results(remote="origin", root=ROOT):
    """Merge with the remote's branch, and push to it what HEAD does not record.

    Another push in between is an error, and nothing has been lost then: push again.
    """
    tip = fetch_results(remote, root)
    new = git("ls-files", "--others", "-z", *FILES, root=root).split("\0")
    changed = git("diff", "--name-only", "-z", "--diff-filter=d", "HEAD", *FILES, root=root)
    files = {*new, *changed.split("\0")} - {""}
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        git("read-tree", tip or "--empty", env=index, root=root)  # what is there and not here stays
        if files:
            add = ["--literal-pathspecs", "add", "--force", "--pathspec-from-file=-"]
            git(*add, "--pathspec-file-nul", text="\0".join(files), env=index, root=root)
        tree = git("write-tree", env=index, root=root)
    if not files or (tip and tree == git("rev-parse", f"{tip}^{{tree}}", root=root)):
        print("no new results")
        return
    identity = ["-c", "user.name=benchmark-publish", "-c", "user.email=benchmark@localhost"]
    message = f"Results up to {git('rev-parse', '--short', 'HEAD', root=root)}"
    parent = ["-p", tip] if tip else []
    commit = git(*identity, "commit-tree", tree, *parent, "-m", message, root=root)
    git("push", "--quiet", remote, f"{commit}:refs/heads/{BRANCH}", root=root)
    print(f"{message}: {commit[:8]}")
