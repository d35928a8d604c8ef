"""git from a program: in the repository that is meant, and by nobody's habits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from asv.util import UserError
from test_bundle import script as bundle

from tracking import history, repository, results_branch
from tracking.repository import ROOT

TESTS = Path(__file__).parent
TINY = """
import subprocess


def test_commits(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "a").touch()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--no-verify", "-m", "a"], check=True)
    assert (tmp_path / ".git/index").exists()
"""


def git(root, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def repository_at(folder, name):
    """A repository whose only commit has one file, of that name."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / name).write_text(name)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", name)
    return folder


def content(folder):
    """Every file below a folder with what it holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hook_of(folder):
    """What git sets for a hook, a shell alias or `rebase -x` in a linked worktree."""
    return {
        "GIT_DIR": str(folder / ".git/worktrees/linked"),
        "GIT_WORK_TREE": str(folder.with_name("linked")),
        "GIT_COMMON_DIR": str(folder / ".git"),
        "GIT_INDEX_FILE": str(folder / ".git/worktrees/linked/index"),
        "GIT_OBJECT_DIRECTORY": str(folder / ".git/objects"),
        "GIT_NAMESPACE": "users",
        "GIT_PREFIX": "",
        "GIT_CONFIG_PARAMETERS": "'core.bare'='true'",
        "GIT_AUTHOR_NAME": "the user",
    }


@pytest.fixture
def hook(tmp_path):
    """The variables of a hook of the user's repository, which has to stay as it is."""
    users = repository_at(tmp_path / "users", "theirs")
    git(users, "worktree", "add", "--quiet", "-b", "linked", str(tmp_path / "linked"))
    before = content(users) | content(tmp_path / "linked")
    yield hook_of(users)
    assert content(users) | content(tmp_path / "linked") == before


@pytest.fixture
def project(tmp_path):
    return repository_at(tmp_path / "project", "ours")


def test_tests_in_a_hook_leave_its_repository_alone(hook, tmp_path):
    tiny = tmp_path / "test_tiny.py"
    tiny.write_text(TINY)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", tmp_path, tiny]
    env = {**os.environ, **hook, "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_command_in_a_hook_is_about_the_project(hook, project, monkeypatch):
    head = git(project, "rev-parse", "HEAD")
    for name, value in hook.items():
        monkeypatch.setenv(name, value)
    assert repository.git("rev-parse", "HEAD", root=project) == head
    assert repository.git("ls-files", root=project) == "ours"
    repository.git("tag", "--force", "phase-0", head, root=project)
    assert bundle.git("rev-parse", "phase-0", repository=project) == head


def test_commits_that_are_made_in_a_hook_are_the_projects(hook, project, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", project)
    (project / "pagedkv").mkdir()
    (project / "pagedkv/__init__.py").touch()
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "a package")
    for name, value in hook.items():
        monkeypatch.setenv(name, value)
    made = repository.commit_of("HEAD^{tree}", "made")
    assert repository.git("log", "-1", "--format=%an", made) == "compare"
    assert repository.git("ls-tree", "--name-only", made).split() == ["ours", "pagedkv"]


def test_make_in_a_hook_adds_to_the_projects_index(hook, project):
    shutil.copy(ROOT / "Makefile", project)
    (project / "results/box").mkdir(parents=True)
    (project / "results/box/machine.json").touch()
    command = ["make", "record", "MACHINE=box"]
    done = subprocess.run(command, cwd=project, env={**os.environ, **hook}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "results/box/machine.json" in git(project, "ls-files")


def test_a_project_without_git_is_not_the_repository_around_it(project, monkeypatch):
    """An unpacked archive may lie in a repository of something else."""
    inner = project / "inner"
    inner.mkdir()
    with pytest.raises(UserError, match="not a git repository"):
        repository.git("tag", "phase-0", "HEAD", root=inner)
    assert git(project, "tag", "--list") == ""


# Whatever git may ask or run for a user says so in a file, and fails.
HABITS = """
[alias]
    log = log --oneline
[color]
    ui = always
    branch = always
    diff = always
    status = always
[column]
    ui = always
    tag = always
[commit]
    gpgSign = true
[core]
    askPass = {program}
    attributesFile = {folder}/attributes
    autocrlf = true
    editor = {program}
    fsmonitor = {program}
    hooksPath = {folder}/hooks
    pager = {program}
    safecrlf = true
[credential]
    helper = "!{program}"
[diff]
    external = {program}
[format]
    pretty = fuller
[gpg]
    program = {program}
[i18n]
    logOutputEncoding = latin1
[init]
    templateDir = {folder}
[log]
    follow = true
    showSignature = true
[pager]
    log = {program}
    tag = {program}
[push]
    followTags = true
    gpgSign = true
    pushOption = theirs
    recurseSubmodules = only
[sequence]
    editor = {program}
[status]
    branch = true
    short = true
    showUntrackedFiles = no
[tag]
    forceSignAnnotated = true
    gpgSign = true
[user]
    useConfigOnly = true
"""
HOOKS = ("pre-push", "post-checkout", "post-index-change", "pre-auto-gc", "reference-transaction")


@pytest.fixture
def habits(tmp_path, monkeypatch):
    """The settings and variables of a user with habits; nothing of theirs may run."""
    folder, asked = tmp_path / "home", tmp_path / "asked"
    (folder / "hooks").mkdir(parents=True)
    program = folder / "program"
    program.write_text(f'#!/bin/sh\necho "$0 $*" >> {asked}\nexit 1\n')
    program.chmod(0o755)
    for hook in HOOKS:
        shutil.copy(program, folder / "hooks")
        (folder / "hooks/program").rename(folder / f"hooks/{hook}")
    (folder / "attributes").write_text("* text eol=crlf\n")
    (folder / ".gitconfig").write_text(HABITS.format(program=program, folder=folder))
    for name in ("GIT_ASKPASS", "GIT_EDITOR", "GIT_EXTERNAL_DIFF", "GIT_PAGER", "SSH_ASKPASS"):
        monkeypatch.setenv(name, str(program))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(folder / ".gitconfig"))
    yield folder / ".gitconfig"
    assert not asked.exists(), asked.read_text()


@pytest.fixture
def remote(project):
    """A project of two phases that ignores its results, and the repository it pushes to."""
    (project / ".gitignore").write_text("/results/\n")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "Müller's\n\nPhase: 0")
    git(project, "commit", "--quiet", "--allow-empty", "-m", "more\n\nPhase: 1")
    git(project.parent, "init", "--quiet", "--bare", "remote")
    there = project.with_name("remote")
    git(there, "config", "core.hooksPath", os.devnull)  # its hooks are its owner's
    git(project, "remote", "add", "origin", str(there))
    return there


def test_publishing_tags_and_asks_nobody(project, remote, habits, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", project)
    monkeypatch.setattr(history, "RESULTS", project / "results")
    monkeypatch.setattr(history, "record_machine", lambda machine: None)
    monkeypatch.setattr(history, "config_for", lambda backend: None)
    monkeypatch.setattr(history, "discover", lambda machine, config: None)
    history.prepare("box", "cpu")
    assert repository.git("tag", "--list").split() == ["phase-0", "phase-1"]
    types = repository.git("for-each-ref", "--format=%(objecttype)", "refs/tags")
    assert types.split() == ["commit", "commit"]
    assert [*repository.phase_commits().values()] == ["0", "1"]
    head = repository.resolve("HEAD")
    assert [*repository.subjects([head, f"{head}^"]).values()] == ["more", "Müller's"]
    made = repository.commit_of("HEAD^{tree}", "made")
    assert repository.git("log", "-1", "--format=%s", made) == "made"


def test_results_are_pushed_and_fetched_as_they_are(project, remote, habits):
    identity = ["-c", "user.name=t", "-c", "user.email=t"]
    repository.git(*identity, "tag", "-m", "theirs", "noted", root=project)
    file = project / "results/box/machine.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"machine": "box", "version": 1}')
    results_branch.push_results(root=project)
    refs = repository.git("for-each-ref", "--format=%(refname)", root=remote)
    assert refs == "refs/heads/results"
    stored = repository.git("cat-file", "blob", "results:results/box/machine.json", root=remote)
    assert stored == file.read_text()
    file.unlink()
    results_branch.fetch_results(root=project)
    assert file.read_text() == stored


def test_what_is_not_committed_is_seen(project, habits, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", project)
    (project / "benchmarks").mkdir()
    (project / "benchmarks/Müller.py").touch()
    assert repository.uncommitted_suite() == "benchmarks/Müller.py"
    assert repository.git("branch", "--list", "main") == "* main"
    assert repository.git("status", "--porcelain") == "?? benchmarks/"
    assert repository.git("diff", "--name-only", "HEAD") == ""


def test_what_is_committed_is_checked_out_and_listed_as_it_is(project, habits):
    """asv checks commits out to build them."""
    (project / "Müller").write_bytes(b"a\nb\n")
    repository.git("add", ".", root=project)
    assert repository.git("ls-files", root=project).split() == ["Müller", "ours"]
    (project / "Müller").unlink()
    repository.git("checkout", "-f", "--", ".", root=project)
    assert (project / "Müller").read_bytes() == b"a\nb\n"


def test_history_is_listed_as_it_is(project, habits):
    head = repository.git("cat-file", "commit", "HEAD", root=project)
    signed = head.replace("\n\n", "\ngpgsig -----BEGIN PGP SIGNATURE-----\n\n", 1) + "\n"
    store = ("hash-object", "-t", "commit", "-w", "--stdin")
    commit = repository.git(*store, root=project, text=signed)
    assert repository.git("log", "-1", "--format=%s", commit, root=project) == "ours"
    repository.git("tag", "one", root=project)
    repository.git("tag", "two", root=project)
    assert repository.git("tag", "--list", root=project).splitlines() == ["one", "two"]
    assert repository.git("var", "GIT_EDITOR", root=project) == "false"
    assert repository.git("var", "GIT_PAGER", root=project) == "cat"


def test_a_remote_that_wants_a_password_is_an_error(project, habits):
    """Nobody is asked for it: git fails at once."""
    program = habits.with_name("program")
    said = repository.unattended(os.environ)
    assert said["GIT_ASKPASS"] == ""
    assert said["GIT_TERMINAL_PROMPT"] == "0"
    assert str(program) not in said.values()
    helper = ["-c", "credential.helper="]  # asked first, and the user's to keep
    fill = "protocol=https\nhost=example.invalid\n\n"
    with pytest.raises(UserError, match="terminal prompts disabled"):
        repository.git(*helper, "credential", "fill", root=project, text=fill)


def test_where_a_user_keeps_what_is_needed_stays(tmp_path):
    kept = {
        "GIT_CONFIG_GLOBAL": "a file",  # credential helpers, safe.directory, proxies
        "GIT_SSH_COMMAND": "ssh -i key",
        "GIT_SSL_CAINFO": "certificates",
        "HOME": "home",
    }
    said = repository.unattended(kept)
    assert kept.items() <= said.items()
    assert repository.unattended(said) == said
