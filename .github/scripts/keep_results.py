"""Commit what the benchmark machine measured to the branch `results`, and push it.

The files come from a job that ran downloaded code. So this takes nothing but regular files of
bounded size with the names of results, and imports Python's own library alone.
"""

import argparse
import filecmp
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

BRANCH = "results"
REF = f"refs/heads/{BRANCH}"
# results/MACHINE/FILE.json: no hidden names, nothing that means something in HTML.
NAME = r"(?!\.)[^\x00-\x1f\x7f-\x9f/\\<>&\"`]{1,200}"
PATH = re.compile(rf"{NAME}/{NAME}\.json")
LARGEST = 2 * 2**20  # bytes of a file; the largest that is recorded has 32,000
MOST = 20_000  # files
IDENTITY = ("-c", "user.name=benchmark-publish", "-c", "user.email=benchmark@localhost")


class RefusedError(Exception):
    """The files are not what they have to be, or git refused them."""


def git(repository, *args):
    """Return what a git command prints; it asks for no password."""
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(["git", "-C", str(repository), *args], env=env, capture_output=True)
    if done.returncode:
        raise RefusedError(f"git: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace").strip()


def take(measured, results, recorded):
    """Copy the results in a folder into `results`, all or none, except what main has `recorded`."""
    taken = []
    for place, folders, files in os.walk(measured):
        for path in (Path(place, name) for name in [*folders, *files]):
            about, name = path.lstat(), path.relative_to(measured)
            regular, result = stat.S_ISREG(about.st_mode), PATH.fullmatch(name.as_posix())
            if stat.S_ISDIR(about.st_mode) or (regular and not result):
                continue
            if not regular or about.st_size > LARGEST:
                raise RefusedError(f"expected a file of up to {LARGEST} bytes, got {str(name)!a}")
            known = Path(recorded, name)
            if not (known.is_file() and filecmp.cmp(path, known, shallow=False)):
                taken.append(name)
    if len(taken) > MOST:
        raise RefusedError(f"expected up to {MOST} files of results, got {len(taken)}")
    for name in taken:
        Path(results, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(measured, name), Path(results, name), follow_symlinks=False)


def keep(measured, remote, recorded="results"):
    """Push the results in a folder on top of the remote's branch, if they add anything to it."""
    with tempfile.TemporaryDirectory() as clone:
        git(clone, "init", "--quiet", "--template=")
        if git(clone, "ls-remote", remote, REF):
            git(clone, "fetch", "--quiet", "--depth=1", remote, REF)
            git(clone, "reset", "--quiet", "--hard", "FETCH_HEAD")
        take(measured, Path(clone, BRANCH), recorded)
        git(clone, "add", "--force", "--all")
        if not git(clone, "status", "--porcelain"):
            print("no new results")
            return
        git(clone, *IDENTITY, "commit", "--quiet", "--message", "Results of the benchmark machine")
        git(clone, "push", "--quiet", remote, f"HEAD:{REF}")
        print(f"pushed {git(clone, 'rev-parse', '--short', 'HEAD')}")


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", help="a folder with a folder for each machine")
    parser.add_argument("--remote", required=True, help="the repository that has the branch")
    args = parser.parse_args()
    try:
        keep(args.measured, args.remote)
    except RefusedError as error:
        sys.exit(f"refused: {error}")


if __name__ == "__main__":
    main()
