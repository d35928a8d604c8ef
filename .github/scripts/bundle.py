"""Hand results from the job that checks them to the job that may write, and push them there.

`take` copies what the benchmark machine measured into results/, `bundle` hands on the commit that
`make push-results REMOTE=.` made of it, `push` pushes that commit. Nothing is believed: jobs before
ran foreign code. So this imports Python's own library alone, and calls git.
"""

import argparse
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

BRANCH = "results"
# results/MACHINE/FILE.json: no hidden names, nothing that means something in HTML.
NAME = r"(?!\.)[^\x00-\x1f\x7f-\x9f/\\<>&\"`]{1,200}"
PATH = re.compile(rf"{BRANCH}/{NAME}/{NAME}\.json")
LARGEST = 2 * 2**20  # bytes of a file; the largest that is recorded has 27,000
MOST = 20_000  # files
BUNDLE = 64 * 2**20  # bytes, compressed
STALE = "if the branch got other results since, run the job that makes the commit again"


class RefusedError(Exception):
    """What was handed on is not what it has to be."""


@cache
def redirecting():
    """Return the names of the variables that send git to another repository, as it lists them."""
    listed = subprocess.run(["git", "rev-parse", "--local-env-vars"], capture_output=True)
    return listed.stdout.decode().split()


def git(*args, repository="."):
    """Return what a git command prints; it asks nobody for a password."""
    env = {name: value for name, value in os.environ.items() if name not in redirecting()}
    env["GIT_TERMINAL_PROMPT"] = "0"
    command = ["git", "-C", str(repository), *args]
    done = subprocess.run(command, env=env, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise RefusedError(f"git: {said}")
    return done.stdout.decode(errors="surrogateescape").strip()


def take(folder, results):
    """Copy the results in a folder into `results`, all or none: regular files that are not large.

    asv's other files, beside them, are left out. Whether they are results is for who merges them.
    """
    taken = []
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise RefusedError(f"{path} is neither a file nor a folder")
        for name in files:
            path = Path(place, name).relative_to(folder)
            if PATH.fullmatch(f"{BRANCH}/{path.as_posix()}"):
                taken.append(path)
    if len(taken) > MOST:
        raise RefusedError(f"expected up to {MOST} files of results, got {len(taken)}")
    for path in taken:
        check_size(path, Path(folder, path).stat().st_size)
    for path in taken:
        Path(results, path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder, path), Path(results, path), follow_symlinks=False)
    print(f"took {len(taken)} files of results")


def check_size(path, size):
    """Refuse a file that is too large."""
    if size > LARGEST:
        raise RefusedError(f"{path} has {size} bytes, expected up to {LARGEST}")


def bundle(file, repository="."):
    """Write the commit that the local branch has and the remote's lacks; return if there is one."""
    ref = git("for-each-ref", "--format=%(refname)", f"refs/heads/{BRANCH}", repository=repository)
    new = [ref, "--not", "--remotes=origin"]
    if not ref or not git("rev-list", *new, repository=repository):
        print("no new results")
        return False
    git("bundle", "create", "--quiet", str(file), *new, repository=repository)
    return True


def push(file, remote):
    """Push the commit in a bundle, if it adds to the remote's branch results and nothing else."""
    if Path(file).stat().st_size > BUNDLE:
        raise RefusedError(f"{file} has more than {BUNDLE} bytes")
    with tempfile.TemporaryDirectory() as scratch:
        git("init", "--quiet", "--bare", "--template=", scratch)
        tip = git("ls-remote", remote, f"refs/heads/{BRANCH}").partition("\t")[0]
        if tip:
            git("fetch", "--quiet", remote, tip, repository=scratch)
        ref = f"refs/heads/{BRANCH}"
        fetch = ["-c", "transfer.fsckObjects=true", "fetch", "--quiet", "--no-tags"]
        try:
            git(*fetch, str(Path(file).resolve()), ref, repository=scratch)
        except RefusedError as error:
            raise RefusedError(f"{error}\n{STALE}") from None
        commit = git("rev-parse", "FETCH_HEAD", repository=scratch)
        check_commit(commit, tip, scratch)
        git("push", "--quiet", remote, f"{commit}:{ref}", repository=scratch)
    print(f"pushed {commit[:8]}")


def check_commit(commit, tip, repository):
    """Refuse a commit that is not one on top of `tip` that adds to or changes results alone."""
    parents = git("show", "--no-patch", "--format=%P", commit, repository=repository).split()
    if parents != ([tip] if tip else []):
        raise RefusedError(f"{commit[:8]} does not follow {tip[:8] or 'nothing'}: {STALE}")
    nothing = git("hash-object", "-t", "tree", os.devnull, repository=repository)
    raw = ["diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-commit-id", tip or nothing]
    fields = git(*raw, commit, repository=repository).split("\0")[:-1]
    changes = list(zip(fields[::2], fields[1::2], strict=True))
    if not 0 < len(changes) <= MOST:
        raise RefusedError(f"expected 1 to {MOST} files, got {len(changes)}")
    for change, path in changes:
        _, mode, _, blob, status = change.split()
        if mode != "100644" or status not in ("A", "M") or not PATH.fullmatch(path):
            raise RefusedError(f"{commit[:8]} is more than results: {status} {mode} {path!r}")
        look = partial(git, "cat-file", repository=repository)
        check_size(path, int(look("-s", blob)))
        try:
            json.loads(look("blob", blob))
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{path} is no JSON: {error}") from None


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["take", "bundle", "push"])
    parser.add_argument("path", help="a folder (take) or a file (bundle, push)")
    parser.add_argument("--remote", help="where push pushes to")
    args = parser.parse_args()
    try:
        if args.step == "take":
            take(args.path, BRANCH)
        elif args.step == "push":
            push(args.path, args.remote)
        elif bundle(args.path) and "GITHUB_OUTPUT" in os.environ:
            with open(os.environ["GITHUB_OUTPUT"], "a") as out:
                out.write("new=true\n")
    except RefusedError as error:
        sys.exit(f"refused: {error}")


if __name__ == "__main__":
    main()
