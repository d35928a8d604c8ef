"""The git repository and the asv project: commits, environments, machines."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from asv.util import UserError
from packaging.requirements import Requirement

from tracking import project, repository


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
    return tmp_path


def test_machine_is_recorded_in_full_once(home):
    project.record_machine("box")
    path = home / ".asv-machine.json"
    record = json.loads(path.read_text())["box"]
    assert set(record) == {"machine", "os", "arch", "cpu", "num_cpu", "ram"}
    assert all(record.values())
    assert record["machine"] == "box"
    assert re.fullmatch(r"\d+ GB", record["ram"])
    assert int(record["ram"].split()[0]) < 100_000
    path.write_text(path.read_text().replace(record["os"], "by hand"))
    project.record_machine("box")
    assert json.loads(path.read_text())["box"]["os"] == "by hand"


def test_another_machine_does_not_add_to_recorded_results(home):
    (home / "results/box").mkdir(parents=True)
    (home / "results/box/machine.json").write_text(
        '{"machine": "box", "cpu": "abacus", "version": 1}'
    )
    with pytest.raises(UserError, match=r"results/box was measured on abacus, this is .*MACHINE="):
        project.record_machine("box")
    assert not (home / ".asv-machine.json").exists()


@pytest.mark.parametrize("name", ["<b>", "../box", "a/b", ""])
def test_names_that_no_machine_may_have(name, home):
    with pytest.raises(UserError, match="expected a machine's name of letters, digits"):
        project.record_machine(name)
    assert not (home / ".asv-machine.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b'{"box": {', b"[]", b'{"box": 1, "version": 1}', b'{"version": 1, "\xff": {}}'],
)
def test_what_asv_knows_of_machines_is_broken(content, home):
    (home / ".asv-machine.json").write_bytes(content)
    for call in (lambda: project.record_machine("box"), lambda: project.machine_name("cpu")):
        with pytest.raises(UserError, match=r"^\S+/\.asv-machine\.json is broken: .+"):
            call()
    assert (home / ".asv-machine.json").read_bytes() == content


def test_a_broken_record_does_not_stop_a_machine(home, capsys):
    (home / "results/box").mkdir(parents=True)
    (home / "results/box/machine.json").write_text("{")
    project.record_machine("box")
    assert "machine.json is broken: " in capsys.readouterr().err
    assert (home / "results/box/machine.json.broken").read_text() == "{"
    assert json.loads((home / ".asv-machine.json").read_text())["box"]["machine"] == "box"


def test_a_recorded_machine_keeps_its_record_on_a_new_home(home, monkeypatch):
    monkeypatch.setattr(project.Machine, "get_defaults", lambda: {"cpu": "c", "ram": "1", "os": ""})
    (home / "results/box").mkdir(parents=True)
    record = {
        "machine": "box",
        "os": "Old 1.0",
        "arch": "a",
        "cpu": "c",
        "num_cpu": "2",
        "ram": "1",
    }
    (home / "results/box/machine.json").write_text(json.dumps({**record, "version": 1}))
    project.record_machine("box")
    assert json.loads((home / ".asv-machine.json").read_text())["box"] == record


def test_host_name_is_what_asv_uses(home, monkeypatch):
    monkeypatch.setattr(project.platform, "node", lambda: "host")
    assert project.machine_name("cpu") == "host"
    assert project.machine_name("cuda13") == "host-cuda13"
    project.record_machine("lab")
    monkeypatch.setattr("asv.machine._get_unique_machine_name", lambda: "host")
    assert project.machine_name("cpu") == "lab"


def git(repo, *args):
    subprocess.run(["git", "-C", str(repo), *args], check=True, capture_output=True)


@pytest.fixture
def history_of_four(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "-b", "main")
    git(repo, "config", "commit.gpgsign", "false")
    git(repo, "config", "user.name", "tester")
    git(repo, "config", "user.email", "tester@example.invalid")
    for message in ("one", "two\n\nPhase: 0", "three", "four\n\nwhy\n\nPhase: 1"):
        git(repo, "commit", "--allow-empty", "-m", message)
    monkeypatch.setattr(repository, "ROOT", repo)
    return repo


def test_phases_are_read_from_trailers(history_of_four):
    assert list(repository.phase_commits().values()) == ["0", "1"]
    assert list(repository.phase_commits())[1] == repository.git("rev-parse", "HEAD")


def test_shallow_clones_and_missing_main_are_refused(history_of_four, tmp_path, monkeypatch):
    repository.check_history()
    git(tmp_path, "clone", "--depth", "1", f"file://{history_of_four}", "shallow")
    monkeypatch.setattr(repository, "ROOT", tmp_path / "shallow")
    with pytest.raises(UserError, match="shallow"):
        repository.check_history()
    git(history_of_four, "branch", "-m", "main", "trunk")
    monkeypatch.setattr(repository, "ROOT", history_of_four)
    with pytest.raises(UserError, match="no branch main"):
        repository.check_history()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_numpy_is_pinned_for_every_python(python):
    """It decides Plan, prefix cache and scheduler; the pin is no part of a series' name."""
    [command] = [c for c in project.asv_settings()["install_command"] if "numpy" in c]
    wanted = [Requirement(word) for word in shlex.split(command) if word.startswith("numpy")]
    [chosen] = [r for r in wanted if not r.marker or r.marker.evaluate({"python_version": python})]
    [pin] = chosen.specifier
    assert pin.operator == "=="
    assert "numpy" not in str(project.asv_settings()["matrix"])


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
    monkeypatch.setattr(repository, "phase_commits", lambda: {"a" * 40: "0", "b" * 40: "99"})
    assert repository.commit_label(commit) == label


def test_every_phase_has_a_name():
    assert {int(phase) for phase in repository.phase_commits().values()} <= {
        number for number, _ in enumerate(repository.PHASES)
    }
