"""The git repository and the asv project: commits, environments, machines."""

import json
import re
import subprocess
import sys

import pytest
from asv.util import UserError
from repositories import git

from tracking import history, project, repository


def test_environments_have_the_names_that_asv_gives_them():
    name = project.environment_name("asv.conf.json")
    version = project.asv_settings()["matrix"]["req"]["mlx"][0]
    python = "{}.{}".format(*sys.version_info)
    assert name == f"virtualenv-py{python}-mlx{version}"


def test_asv_that_is_killed_is_an_error(monkeypatch):
    kill = "import os; os.kill(os.getpid(), 9)"
    popen = subprocess.Popen
    monkeypatch.setattr(
        project.subprocess, "Popen", lambda *_, **__: popen([sys.executable, "-c", kill])
    )
    with pytest.raises(UserError, match="asv run was ended by signal 9"):
        project.asv("run")


def test_backend_settings_replace_the_backend_and_keep_environments_apart():
    assert project.backend_settings("cpu") == {}
    settings = project.backend_settings("cuda13")
    assert "mlx[cuda13]" in settings["install_command"][0]
    assert "[cpu]" not in "".join(settings["install_command"])
    assert settings["env_dir"] == ".asv/env-cuda13"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(project, "ROOT", tmp_path)
    (tmp_path / "results/box").mkdir(parents=True)
    return tmp_path


def recorded(home):
    return json.loads((home / ".asv-machine.json").read_text())["box"]


def test_machine_is_recorded_in_full_once(home):
    project.record_machine("box")
    record = recorded(home)
    assert set(record) == {"machine", "os", "arch", "cpu", "num_cpu", "ram"}
    assert all(record.values())
    assert record["machine"] == "box"
    assert re.fullmatch(r"\d{1,5} GB", record["ram"])
    path = home / ".asv-machine.json"
    path.write_text(path.read_text().replace(record["os"], "by hand"))
    project.record_machine("box")
    assert recorded(home)["os"] == "by hand"


def test_a_recorded_machine_keeps_its_record_on_a_new_home(home, monkeypatch):
    record = {"machine": "box", "os": "Old 1.0", "arch": "a", "cpu": "c", "num_cpu": "2"}
    record["ram"] = "1"
    (home / "results/box/machine.json").write_text(json.dumps({**record, "version": 1}))
    with pytest.raises(UserError, match=r"results/box was measured on c, this is .*MACHINE="):
        project.record_machine("box")
    assert not (home / ".asv-machine.json").exists()
    monkeypatch.setattr(project.Machine, "get_defaults", lambda: {"cpu": "c", "ram": "1", "os": ""})
    project.record_machine("box")
    assert recorded(home) == record


def test_a_broken_record_of_results_does_not_stop_a_machine(home, capsys):
    (home / "results/box/machine.json").write_text("{")
    project.record_machine("box")
    assert "machine.json is broken: " in capsys.readouterr().err
    assert (home / "results/box/machine.json.broken").read_text() == "{"
    assert recorded(home)["machine"] == "box"


@pytest.mark.parametrize("content", [b"", b'{"box": 1, "version": 1}', b'{"\xff": {}}'])
def test_what_asv_knows_of_machines_is_broken(content, home):
    (home / ".asv-machine.json").write_bytes(content)
    for call in (lambda: project.record_machine("box"), lambda: project.machine_name("cpu")):
        with pytest.raises(UserError, match=r"^\S+/\.asv-machine\.json is broken: .+"):
            call()
    assert (home / ".asv-machine.json").read_bytes() == content


def test_host_name_is_what_asv_uses(home, monkeypatch):
    monkeypatch.setattr(project.platform, "node", lambda: "host")
    assert project.machine_name("cpu") == "host"
    assert project.machine_name("cuda13") == "host-cuda13"
    project.record_machine("lab")
    monkeypatch.setattr("asv.machine._get_unique_machine_name", lambda: "host")
    assert project.machine_name("cpu") == "lab"


@pytest.fixture
def four_commits(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    git(tmp_path, "init", "-b", "main", "repo")
    for message in ("one", "two\n\nPhase: 0", "three", "Müller's\n\nwhy\n\nPhase: 1"):
        git(repo, "commit", "--allow-empty", "-m", message)
    monkeypatch.setattr(repository, "ROOT", repo)
    return repo


HABITS = {"color.ui": "always", "log.showSignature": "true", "tag.gpgSign": "true"}


def test_a_hook_and_a_users_settings_do_not_change_what_git_does(
    four_commits, tmp_path, monkeypatch
):
    """Publishing tags the phases, from a hook of another repository too."""
    git(tmp_path, "init", "users")
    for name, value in {**HABITS, "gpg.program": "false"}.items():
        git(tmp_path, "config", "--file", "gitconfig", name, value)
    users = str(tmp_path / "users")
    hook = {"GIT_DIR": f"{users}/.git", "GIT_WORK_TREE": users, "GIT_INDEX_FILE": f"{users}/index"}
    hook |= {"GIT_AUTHOR_NAME": "the user", "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig")}
    kept = {"GIT_SSH_COMMAND": "ssh -i key", "HOME": "home"}
    assert kept.items() <= repository.git_environment(hook | kept).items()
    for name, value in hook.items():
        monkeypatch.setenv(name, value)
    for name in ("config_for", "discover"):
        monkeypatch.setattr(history, name, lambda *args: None)
    history.prepare("box", "cpu")
    assert repository.git("tag", "--list").splitlines() == ["phase-0", "phase-1"]
    types = repository.git("for-each-ref", "--format=%(objecttype)", "refs/tags")
    assert types.split() == ["commit", "commit"]
    head = repository.git("rev-parse", "HEAD")
    assert list(repository.phase_commits().items())[-1] == (head, "1")
    assert [*repository.subjects([head, f"{head}^"]).values()] == ["Müller's", "three"]
    made = repository.commit_of("HEAD^{tree}", "made")
    assert repository.git("log", "-1", "--format=%an", made) == "compare"
    (four_commits / "benchmarks").mkdir()
    (four_commits / "benchmarks/Müller.py").touch()
    assert repository.uncommitted_suite() == "benchmarks/Müller.py"
    assert list((tmp_path / "users").iterdir()) == [tmp_path / "users/.git"]


def test_a_project_without_git_is_not_the_repository_around_it(four_commits, monkeypatch):
    """An unpacked archive may lie in a repository of something else."""
    (four_commits / "inner").mkdir()
    monkeypatch.setattr(repository, "ROOT", four_commits / "inner")
    with pytest.raises(UserError, match="not a git repository"):
        repository.git("tag", "phase-0", "HEAD")


@pytest.mark.parametrize(
    ("commit", "label"),
    [
        ("a" * 40, "0 · gather (aaaaaaaa)"),
        ("a" * 8, "0 · gather (aaaaaaaa)"),
        ("b" * 40, "phase 99 (bbbbbbbb)"),
        ("c" * 40, "cccccccc"),
    ],
)
def test_a_phase_is_called_by_its_number_and_name(commit, label, monkeypatch):
    assert len(repository.PHASES) > max(map(int, repository.phase_commits().values()))
    monkeypatch.setattr(repository, "phase_commits", lambda: {"a" * 40: "0", "b" * 40: "99"})
    assert repository.commit_label(commit) == label
