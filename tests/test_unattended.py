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
    """A repository of two phases."""
    project = repository_at(tmp_path / "project", "ours")
    git(project, "commit", "--quiet", "--allow-empty", "-m", "Müller's\n\nPhase: 0")
    git(project, "commit", "--quiet", "--allow-empty", "-m", "more\n\nPhase: 1")
    return project


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


# What git may ask or run for a user says so in a file, and fails.
HABITS = """
[color]
    ui = always
[column]
    ui = always
[core]
    askPass = {program}
    hooksPath = {folder}
[log]
    showSignature = true
[push]
    followTags = true
[tag]
    gpgSign = true
[gpg]
    program = {program}
"""


@pytest.fixture
def habits(tmp_path, monkeypatch):
    """The settings of a user with habits; nothing of theirs may run."""
    folder, asked = tmp_path / "home", tmp_path / "asked"
    folder.mkdir()
    for name in ("program", "pre-push", "reference-transaction"):
        (folder / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {asked}\nexit 1\n')
        (folder / name).chmod(0o755)
    program = folder / "program"
    (folder / ".gitconfig").write_text(HABITS.format(program=program, folder=folder))
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.setenv(name, str(program))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(folder / ".gitconfig"))
    yield
    assert not asked.exists(), asked.read_text()


def test_publishing_tags_and_asks_nobody(project, habits, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", project)
    monkeypatch.setattr(history, "RESULTS", project / "results")
    for name in ("config_for", "discover"):
        monkeypatch.setattr(history, name, lambda *args: None)
    history.prepare("box", "cpu")
    assert repository.git("tag", "--list").splitlines() == ["phase-0", "phase-1"]
    types = repository.git("for-each-ref", "--format=%(objecttype)", "refs/tags")
    assert types.split() == ["commit", "commit"]
    assert [*repository.phase_commits().values()] == ["0", "1"]
    head = repository.resolve("HEAD")
    assert [*repository.subjects([head, f"{head}^"]).values()] == ["more", "Müller's"]


def test_results_are_pushed_as_they_are(project, habits):
    (project / "results/box").mkdir(parents=True)
    file = project / "results/box/machine.json"
    file.write_text('{"machine": "box", "version": 1}')
    git(project.parent, "init", "--quiet", "--bare", "remote")
    remote = project.with_name("remote")
    git(remote, "config", "core.hooksPath", os.devnull)  # its hooks are its owner's
    git(project, "remote", "add", "origin", str(remote))
    git(project, "-c", "core.hooksPath=/dev/null", "tag", "--no-sign", "-m", "theirs", "noted")
    results_branch.push_results(root=project)
    refs = repository.git("for-each-ref", "--format=%(refname)", root=remote)
    assert refs == "refs/heads/results"
    stored = repository.git("cat-file", "blob", "results:results/box/machine.json", root=remote)
    assert stored == file.read_text()


def test_what_is_not_committed_is_seen(project, habits, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", project)
    (project / "benchmarks").mkdir()
    (project / "benchmarks/Müller.py").touch()
    assert repository.uncommitted_suite() == "benchmarks/Müller.py"
    assert repository.git("branch", "--list", "main") == "* main"


def test_a_remote_that_wants_a_password_is_an_error(project, habits):
    helper = ["-c", "credential.helper="]  # asked first, and the user's to keep
    fill = "protocol=https\nhost=example.invalid\n\n"
    with pytest.raises(UserError, match="terminal prompts disabled"):
        repository.git(*helper, "credential", "fill", root=project, text=fill)


def test_where_a_user_keeps_what_is_needed_stays():
    kept = {
        "GIT_CONFIG_GLOBAL": "a file",  # credential helpers, safe.directory, proxies
        "GIT_SSH_COMMAND": "ssh -i key",
        "GIT_SSL_CAINFO": "certificates",
        "HOME": "home",
    }
    said = repository.unattended(kept)
    assert kept.items() <= said.items()
    assert repository.unattended(said) == said
