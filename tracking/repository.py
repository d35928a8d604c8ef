"""The project's git repository: where it is, its commits and phases."""

import os
import re
import subprocess
from pathlib import Path

from asv.util import UserError

from tracking.files import shown

ROOT = Path(__file__).parents[1]

PHASES = (
    "gather",
    "in place",
    "rows",
    "copy-on-write",
    "radix",
    "scheduler",
    "fused",
    "step",
    "mlx-lm",
    "groups",
    "bits",
    "prompt",
)
"""What the phases are called, by number."""

# Of git's variables, where its settings lie and how it reaches a remote. Any other is of a hook or
# `rebase -x`, and of the repository that runs it.
KEPT = re.compile("GIT_(CONFIG_(GLOBAL|SYSTEM|NOSYSTEM)|EXEC_PATH|(SSH|SSL|HTTP|PROXY)(_.*)?)")
# A user's settings that would change what git prints, or ask for a key.
SETTINGS = {"color.ui": "false", "log.showSignature": "false", "tag.gpgSign": "false"}


def git_environment(environ):
    """Return an environment in which git uses the repository it runs in, and never prompts."""
    kept = {n: v for n, v in environ.items() if not n.startswith("GIT_") or KEPT.fullmatch(n)}
    for number, (name, value) in enumerate(SETTINGS.items()):
        kept |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return {**kept, "GIT_CONFIG_COUNT": str(len(SETTINGS)), "GIT_TERMINAL_PROMPT": "0"}


def git(*args, text=None, env=None):
    """Return what a git command prints in this project, without white space around it.

    `text` is what the command reads, `env` environment variables to add. A hook's variables do not
    redirect it, nor does it take a repository around the project for its own.

    Raises
    ------
    UserError
        If it fails, with what it said.
    """
    around = {"GIT_CEILING_DIRECTORIES": str(ROOT.resolve().parent)}
    done = subprocess.run(
        ["git", "-C", str(ROOT), *args],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # as Python has file names that are not UTF-8
        input=text,
        env={**git_environment(os.environ), **around, **(env or {})},
    )
    if done.returncode:
        command = next(arg for arg in args if not arg.startswith("-") and "=" not in arg)
        raise UserError(f"git {command}: {done.stderr.strip()}")
    return done.stdout.strip()


def phase_commits():
    """Return {commit hash: phase} of the commits with a `Phase:` trailer, oldest first."""
    trailer = "%(trailers:key=Phase,valueonly,separator=%x20)"
    log = git("log", "--reverse", f"--format=%H {trailer}").splitlines()
    return dict(line.split() for line in log if " " in line.strip())


def check_history():
    """Stop with what to do when asv would measure or publish something else than it seems."""
    if not (ROOT / ".git").exists():
        raise UserError("this is no git clone, and asv measures a history: `git clone` the project")
    if git("rev-parse", "--is-shallow-repository") == "true":
        raise UserError("this clone is shallow, its history is cut off: `git fetch --unshallow`")
    if not git("branch", "--list", "main"):
        name = "%(if)%(symref)%(then)%(symref:short)%(else)%(refname:short)%(end)"
        where = ("refs/remotes/*/main", "refs/remotes/*/HEAD")
        there = git("for-each-ref", "--sort=-refname", f"--format={name}", *where).split()
        raise UserError(
            f"there is no branch main here: run `git branch main {[*there, 'HEAD'][0]}`"
        )
    if git("status", "--porcelain", "--", "pagedkv", "pyproject.toml"):
        print("note: uncommitted changes in pagedkv/ are not measured, asv builds commits")


def uncommitted_suite():
    """Return in words which benchmarks and settings of asv are not committed."""
    where = ("--", "benchmarks", "asv.conf.json")
    changed = git("diff", "--name-only", "-z", "HEAD", *where)
    new = git("ls-files", "--others", "--exclude-standard", "-z", *where)
    names = sorted({*changed.split("\0"), *new.split("\0")} - {""})
    more = f" (and {len(names) - 1} more)" if names[1:] else ""
    return f"{shown(names[0])}{more}" if names else ""


def check_suite():
    """Stop if benchmarks are not committed: results would be recorded as of HEAD's benchmarks."""
    if changed := uncommitted_suite():
        raise UserError(
            f"{changed} is not committed, and would be measured and recorded as of HEAD's "
            "benchmarks: commit or stash it. `asv run --dry-run` and `make compare` record nothing"
        )


def phase_name(phase):
    """Return what tables call a phase: its number and its name, if it has one yet."""
    number = int(phase)
    return f"{number} · {PHASES[number]}" if number < len(PHASES) else f"phase {number}"


def commit_labels(commits):
    """Return what tables call commits: {commit: its phase, if it has one, and its hash}."""
    phases, labels = phase_commits(), {}
    for commit in commits:
        phase = next((p for full, p in phases.items() if full.startswith(commit)), None)
        labels[commit] = f"{phase_name(phase)} ({commit[:8]})" if phase else commit[:8]
    return labels


def commit_label(commit):
    """Return what a table calls a commit."""
    return commit_labels([commit])[commit]


def subjects(commits):
    """Return the first lines of commits' messages: {commit: subject}."""
    if not commits:
        return {}
    log = git("log", "--no-walk=unsorted", "--format=%H %s", "--stdin", text="\n".join(commits))
    return dict(line.partition(" ")[::2] for line in log.splitlines())


def resolve(name):
    """Return the hash of a commit."""
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except UserError:
        raise UserError(f"expected a commit, got {name!r}: is it fetched?") from None


def commit_of(tree, message, parent="HEAD"):
    """Return the hash of a commit of a tree, on no branch, child of HEAD or of another commit."""
    identity = ["-c", "user.name=compare", "-c", "user.email=compare@localhost"]
    return git(*identity, "commit-tree", tree, "-p", parent, "-m", message)
