"""asv's own commands, as a user types them, in a small project that has this one's safeguards."""

import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from asv.util import UserError

from tracking import history, lock, nightly, repository, safeguards
from tracking.repository import ROOT

MODULES = ("__init__", "files", "lock", "repository", "safeguards", "unattended", "valid")
SUITE = """
import os
import re
import pagedkv


class Answer:
    version = "1"

    def track_answer(self):
        return pagedkv.ANSWER + (100 if os.environ.get("PAGEDKV_DECODE_PATH") else 0)
"""
HERE = ("-E", f"existing:{sys.executable}", "--set-commit-hash", "HEAD")


def git(root, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path):
    """A git repository with a package, a suite of one benchmark, and a machine `box`."""
    root = tmp_path / "project"
    for folder in ("tracking", "benchmarks", "pagedkv"):
        (root / folder).mkdir(parents=True)
    for module in MODULES:
        shutil.copy(ROOT / f"tracking/{module}.py", root / "tracking")
    shutil.copy(ROOT / "tracking/results.schema.json", root / "tracking")
    (root / "benchmarks/__init__.py").touch()
    (root / "benchmarks/all.py").write_text(SUITE)
    (root / "pagedkv/__init__.py").write_text("ANSWER = 42\n")
    config = {"version": 1, "project": "p", "repo": ".", "branches": ["main"], "dvcs": "git"}
    config |= {"plugins": [".tracking.safeguards"], "html_dir": ".asv/html", "env_dir": ".asv/env"}
    config |= {"environment_type": "virtualenv"}
    (root / "asv.conf.json").write_text(json.dumps(config))
    (root / ".gitignore").write_text("/results\n/.asv\n__pycache__\n/asv.*.conf.json\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", "begin")
    box = {"machine": "box", "os": "", "arch": "", "cpu": "", "num_cpu": "1", "ram": ""}
    (tmp_path / ".asv-machine.json").write_text(json.dumps({"box": box, "version": 1}))
    return root


@pytest.fixture
def asv(project):
    """Runs asv in the project; returns (exit status, what it said)."""

    def run(*args, stdin=subprocess.DEVNULL, cwd=project, **env):
        done = subprocess.run(
            [sys.executable, "-m", "asv", *args],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "HOME": str(project.parent), "ASV_PYTHONPATH": str(project), **env},
            timeout=120,
        )
        assert "Traceback" not in done.stdout, done.stdout
        print(done.stdout)
        return done.returncode, done.stdout

    return run


def measured(project):
    """What is recorded of the answer, None if nothing is."""
    files = [f for f in project.glob("results/box/*.json") if f.name != "machine.json"]
    return (
        json.loads(files[0].read_text())["results"]["all.Answer.track_answer"][0] if files else None
    )


def test_a_run_records_what_head_answers(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    assert measured(project) == [42]


def test_the_environment_forces_nothing(asv, project):
    forced = {"PAGEDKV_DECODE_PATH": "gather_sdpa", "MLX_DISABLE_COMPILE": "1"}
    status, said = asv("run", "--machine", "box", *HERE, **forced)
    assert status == 0
    assert re.search(
        "benchmarks run without .*MLX_DISABLE_COMPILE, .*PAGEDKV_DECODE_PATH, which", said
    )
    assert measured(project) == [42]


def test_without_the_safeguard_the_environment_falsifies(asv, project):
    config = json.loads((project / "asv.conf.json").read_text())
    (project / "asv.bare.conf.json").write_text(json.dumps({**config, "plugins": []}))
    options = ("--config", "asv.bare.conf.json", "--machine", "box", *HERE)
    assert asv("run", *options, PAGEDKV_DECODE_PATH="gather_sdpa")[0] == 0
    assert measured(project) == [142]


def test_what_forces_is_forgotten_and_the_rest_stays():
    stays = {"PATH": "", "HOME": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", "LC_ALL": ""}
    goes = {"PAGEDKV_AUTOTUNE": "", "OMP_NUM_THREADS": "", "PYTHONOPTIMIZE": ""}
    environ = {**stays, **goes}
    safeguards.forget(environ)
    assert environ == stays


def test_another_package_is_for_existing_environments_alone(asv):
    """asv puts it before what it installs."""
    environ = {"ASV_PYTHONPATH": "/elsewhere"}
    safeguards.forget(environ, keep=("ASV_PYTHONPATH",))
    assert environ
    safeguards.forget(environ)
    assert not environ
    assert "benchmarks run without ASV_PYTHONPATH" in asv("check", "-E", "nosuch")[1]


def test_a_hook_of_another_repository_redirects_nothing(asv, project, tmp_path):
    """asv calls git itself: for revisions, tags, branches and checkouts."""
    git(tmp_path, "init", "--quiet", "--initial-branch=main", "users")
    users = tmp_path / "users"
    git(users, "commit", "--quiet", "--allow-empty", "-m", "another project")
    before = {path: path.read_bytes() for path in users.rglob("*") if path.is_file()}
    hook = {"GIT_DIR": str(users / ".git"), "GIT_WORK_TREE": str(users)}
    hook["GIT_INDEX_FILE"] = str(users / ".git/index")
    git(project, "tag", "phase-0")
    assert asv("run", "--machine", "box", *HERE, **hook)[0] == 0
    assert asv("publish", "--no-pull", **hook)[0] == 0
    published = json.loads((project / ".asv/html/index.json").read_text())
    assert published["revision_to_hash"] == {"0": git(project, "rev-parse", "HEAD")}
    assert [*published["tags"]] == ["phase-0"]
    assert {path: path.read_bytes() for path in users.rglob("*") if path.is_file()} == before


def test_a_users_settings_of_git_change_nothing(asv, project, tmp_path):
    """In columns two tags are one line, which asv takes for one name."""
    settings = tmp_path / "gitconfig"
    settings.write_text("[column]\n\tui = always\n[color]\n\tui = always\n")
    for tag in ("phase-0", "phase-1"):
        git(project, "tag", tag)
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    assert asv("publish", "--no-pull", GIT_CONFIG_GLOBAL=str(settings))[0] == 0
    published = json.loads((project / ".asv/html/index.json").read_text())
    assert [*published["tags"]] == ["phase-0", "phase-1"]


def make_dirty(project, name):
    file = project / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(file.read_text() + " \n" if file.exists() else "")


def test_what_is_not_committed_is_not_recorded(asv, project):
    make_dirty(project, "benchmarks/Müller.py")
    for command in (("run", *HERE), ("continuous", "HEAD", "HEAD")):
        status, said = asv(command[0], "--machine", "box", *command[1:])
        assert status == 1
        assert "benchmarks/Müller.py is not committed" in said
        assert "commit or stash it" in said
    assert measured(project) is None


@pytest.mark.parametrize(
    ("module", "command"),
    [(history, "run"), (nightly, "run"), (nightly, "newest-mlx")],
)
def test_what_records_asks_for_it_first(module, command, project, monkeypatch, capsys):
    monkeypatch.setattr(repository, "ROOT", project)
    monkeypatch.setattr(module, "acquire", lambda: None)
    monkeypatch.setattr("sys.argv", ["", command, "--machine", "box"])
    make_dirty(project, "benchmarks/all.py")
    try:
        said = module.main()
    except SystemExit as stopped:
        said = stopped.code
    assert "benchmarks/all.py is not committed" in f"{said}{capsys.readouterr().err}"


@pytest.mark.parametrize("name", ["benchmarks/all.py", "benchmarks/a/b.py", "asv.conf.json"])
def test_what_is_not_committed(name, project, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", project)
    repository.check_suite()
    make_dirty(project, name)
    with pytest.raises(UserError, match=f"^{name} is not committed"):
        repository.check_suite()
    git(project, "add", "-A")
    make_dirty(project, "benchmarks/z.py")
    with pytest.raises(UserError, match=rf"^{name} \(and 1 more\) is not committed"):
        repository.check_suite()
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "more")
    repository.check_suite()


def test_what_records_nothing_may_be_uncommitted(asv, project):
    make_dirty(project, "benchmarks/more.py")
    assert asv("run", "--machine", "box", "--python=same", "--quick")[0] == 0
    assert asv("run", "--machine", "box", *HERE, "--dry-run")[0] == 0
    assert measured(project) is None


def test_results_of_another_folder_may_be_of_uncommitted_benchmarks(asv, project):
    config = json.loads((project / "asv.conf.json").read_text())
    elsewhere = str(project / ".asv/compare")
    derived = {**config, "results_dir": elsewhere}
    (project / "asv.compare.conf.json").write_text(json.dumps(derived))
    make_dirty(project, "benchmarks/more.py")
    status, said = asv("run", "--config", "asv.compare.conf.json", "--machine", "box", *HERE)
    assert status == 0
    assert "benchmarks/more.py is not committed, and measures all the same" in said
    assert measured(project) is None


def test_an_existing_environment_has_the_commit_that_it_is_recorded_as(asv, project):
    for name in ("more.py", "__init__.py"):
        make_dirty(project, f"pagedkv/{name}")
        status, said = asv("run", "--machine", "box", *HERE)
        assert status == 1
        assert f"is not that of HEAD: {name} differs" in said
    assert measured(project) is None


def test_an_existing_environment_without_the_package(asv, project):
    nowhere = ("-c", "import venv, sys; venv.create(sys.argv[1])", str(project.parent / "env"))
    subprocess.run([sys.executable, *nowhere], check=True)
    there = ("-E", f"existing:{project.parent}/env/bin/python", "--set-commit-hash", "HEAD")
    status, said = asv("run", "--machine", "box", *there, ASV_PYTHONPATH="")
    assert status == 1
    assert "there is no pagedkv in existing-" in said


@pytest.mark.parametrize(
    ("command", "takes"),
    [
        ("run --machine box HEAD^!", True),
        ("check", True),
        ("publish", False),
    ],
)
def test_the_lock_is_taken_for_commands_that_measure(command, takes, asv, project):
    (project / ".asv").mkdir()
    with (project / ".asv/lock").open("a+") as handle:
        lock.fcntl.flock(handle, lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB)
        status, said = asv(*command.split())
        assert ("another run measures in this checkout" in said) is takes
        assert status == 1
        if command.startswith("run"):  # of who holds the lock
            assert asv("run", "--machine", "box", *HERE, stdin=handle)[0] == 0


def test_broken_files_do_not_stop_asv(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    [result] = [f for f in project.glob("results/box/*.json") if f.name != "machine.json"]
    broken = {
        result: b"[]",
        result.with_name("machine.json"): b'{"machine": "\xff"',
        project / "results/benchmarks.json": b"",
    }
    for file, content in broken.items():
        file.write_bytes(content)
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 0
    for file, content in broken.items():
        assert f"{file.relative_to(project)} is broken: " in said
        assert f"set aside as {file.name}.broken" in said
        assert file.with_name(f"{file.name}.broken").read_bytes() == content
    assert measured(project) == [42]


def test_what_asv_knows_of_machines_is_broken(asv, project):
    (project.parent / ".asv-machine.json").write_text('{"version": 1, "box": []}')
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 1
    assert ".asv-machine.json is broken: [] is not of type 'object', at box" in said


def test_a_machine_may_not_be_called_so(asv, project):
    record = {"machine": "<b>", "os": "", "arch": "", "cpu": "", "num_cpu": "1", "ram": ""}
    (project.parent / ".asv-machine.json").write_text(json.dumps({"<b>": record, "version": 1}))
    status, said = asv("run", "--machine", "<b>", *HERE)
    assert status == 1
    assert "expected a machine's name of letters, digits" in said
    assert not (project / "results").exists()


def test_nor_may_the_host_be(asv, project):
    """asv takes the only machine that it knows for this host, whatever its name."""
    record = {"machine": "<b>", "os": "", "arch": "", "cpu": "", "num_cpu": "1", "ram": ""}
    (project.parent / ".asv-machine.json").write_text(json.dumps({"<b>": record, "version": 1}))
    status, said = asv("run", *HERE)
    assert status == 1
    assert "results/<b>/machine.json would be broken: " in said
    assert not (project / "results").exists()


def test_results_that_cannot_be_written(asv, project):
    (project / "results").mkdir()
    (project / "results/box").touch()  # where a folder should be; a superuser may write all others
    status, said = asv("run", "--machine", "box", *HERE)
    assert status == 1
    assert "results/box/machine.json cannot be written and is as it was: " in said


def test_a_clone_without_main(asv, project):
    git(project, "branch", "--move", "trunk")
    for command in ("run", "publish"):
        status, said = asv(command)
        assert status == 1
        assert "there is no branch main here: run `git branch main" in said
    assert asv("run", "--machine", "box", "--python=same")[0] == 0


@pytest.mark.parametrize("listed", [None, "", '{"version": 2}'])
def test_a_clone_without_a_list_of_benchmarks_keeps_its_pages(listed, asv, project):
    page = project / ".asv/html/index.html"
    page.parent.mkdir(parents=True)
    page.write_text("published before")
    if listed is not None:
        (project / "results").mkdir()
        (project / "results/benchmarks.json").write_text(listed)
    status, said = asv("publish", "--no-pull")
    assert status == 1
    assert "results/benchmarks.json does not list the suite yet: `make publish`" in said
    assert page.read_text() == "published before"


def test_nothing_to_preview(asv):
    assert asv("preview") == (1, "· nothing is published here yet: run `make publish`\n")


def test_pages_that_cannot_be_written(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    (project / ".asv/html").touch()
    status, said = asv("publish", "--no-pull")
    assert status == 1
    assert "asv stopped: [Errno 20] Not a directory: '.asv/html'" in said


def test_what_is_no_clone(asv, project):
    shutil.rmtree(project / ".git")
    status, said = asv("publish")
    assert status == 1
    assert "this is no git clone" in said


def test_a_shallow_clone(asv, project, tmp_path):
    git(project, "commit", "--quiet", "--allow-empty", "-m", "more")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{project}", "shallow")
    for command in ("run", "publish"):
        status, said = asv(command, cwd=tmp_path / "shallow")
        assert status == 1
        assert "`git fetch --unshallow`" in said


HTML = "<script>alert(1)</script>"


def test_no_stored_html_is_published(asv, project):
    """Wherever it is stored; without it the machine is published."""
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    [result] = [f for f in project.glob("results/box/*.json") if f.name != "machine.json"]
    text = result.read_text()
    for number, old in enumerate(
        ('"all.Answer', '"machine": "box"', '"python": "', '"env_name": "')
    ):
        name = f"{number}" * 8
        evil = text.replace(old, f"{old}{HTML}").replace(json.loads(text)["commit_hash"][:8], name)
        (result.parent / result.name.replace(result.name[:8], name)).write_text(evil)
    evil = project / f"results/box/{HTML.replace('/', '')}"
    evil.mkdir()
    (evil / "machine.json").write_text(json.dumps({"machine": HTML, "version": 1}))
    status, said = asv("publish", "--no-pull")
    assert status == 0
    assert said.count(" is broken: ") == said.count("set aside as") == 5
    published = (project / ".asv/html/index.json").read_text()
    assert '"box"' in published
    for file in (project / ".asv/html").rglob("*"):
        assert "alert(1)" not in file.name
        assert file.is_dir() or b"alert(1)" not in file.read_bytes()


COMMANDS = (("publish", "--no-pull"), ("compare", "HEAD", "HEAD"), ("show", "HEAD"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_stands_for_endless_cells_stops_nothing(command, asv, project):
    """asv makes each cell of it, 2 to the 60th."""
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    [file] = [f for f in project.glob("results/box/*.json") if f.name != "machine.json"]
    data = json.loads(file.read_text())
    data["results"]["all.Answer.track_answer"] = [None, [["0", "1"]] * 60]
    file.write_text(json.dumps(data))
    said = asv(*command)[1]
    assert "is too long, at results/all.Answer.track_answer/1; set aside" in said


def test_without_the_safeguards_stored_html_is_published(asv, project):
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    record = project / "results/box/machine.json"
    record.write_text(json.dumps({"machine": "box", "cpu": HTML, "version": 1}))
    config = json.loads((project / "asv.conf.json").read_text())
    (project / "asv.bare.conf.json").write_text(json.dumps({**config, "plugins": []}))
    assert asv("publish", "--no-pull", "--config", "asv.bare.conf.json")[0] == 0
    assert HTML in (project / ".asv/html/index.json").read_text()


def test_code_of_benchmarks_is_published_as_text(asv, project):
    """asv shows it as HTML beside a benchmark's name."""
    suite = project / "benchmarks/all.py"
    suite.write_text(SUITE.replace("return", f'"""{HTML}"""\n        return'))
    git(project, "commit", "--quiet", "--all", "-m", "a string")
    assert asv("run", "--machine", "box", *HERE)[0] == 0
    assert asv("publish", "--no-pull")[0] == 0
    [about] = json.loads((project / ".asv/html/index.json").read_text())["benchmarks"].values()
    assert html.escape(HTML) in about["code"]
    assert HTML not in about["code"]
