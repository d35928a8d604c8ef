"""Running the history, tables of results, and the offline page; no benchmark runs here."""

import copy
import importlib
import json
import math
import os
import plistlib
import re
import shutil
import subprocess
import sys

import pytest
from asv.util import UserError, load_json

from tracking import adopt, history, report
from website import offline

ROOT = history.ROOT


def benchmark(name, *params, names=("batch", "context", "block_size")):
    params = [[str(value) for value in values] for values in params]
    return {"name": name, "params": params, "param_names": list(names)[: len(params)]}


GRID = benchmark("decode.Auto.time_decode", (1, 4), (1024, 4096, 16384, 32768), (16, 32, 64))
TREE = benchmark("prefix_cache.Match.time_match", (10**4, 10**6), names=["tokens"])
PLAIN = benchmark("memory.Index.track_bytes")


def chosen(some, grid):
    option, pattern = history.selection(some, grid)
    assert option == "--bench"
    labels = [f"{some['name']}({', '.join(cell)})" for cell in history.cells(some)]
    return [label for label in labels if re.search(pattern, label)]


def test_quick_selection_is_four_cells_of_the_grid():
    assert chosen(GRID, "quick") == [
        f"decode.Auto.time_decode({cell})"
        for cell in ("1, 1024, 32", "1, 4096, 32", "4, 1024, 32", "4, 4096, 32")
    ]
    assert len(chosen(GRID, "full")) == 24


@pytest.mark.parametrize("grid", ["quick", "full"])
def test_benchmarks_with_other_parameters_are_whole_in_both_grids(grid):
    assert len(chosen(TREE, grid)) == 2
    _, pattern = history.selection(PLAIN, grid)
    assert re.search(pattern, PLAIN["name"])
    assert not re.search(pattern, PLAIN["name"] + "_more")


def test_the_quick_grid_keeps_to_the_headline_at_old_commits_and_leaves_settled_questions():
    names = ["append.Auto.time_append", "decode.Auto.time_decode", "decode.Slabs.ratio_x"]
    assert history.in_quick_run(names, is_head=True) == names[:2]
    assert history.in_quick_run(names, is_head=False) == names[:1]


def test_a_quick_run_starts_asv_once_for_a_module():
    names = ["append.Auto.time_append", "append.PoolSize.time_append", "decode.Auto.time_decode"]
    assert history.in_one_run(names, "quick") == [names[:2], names[2:]]
    assert history.in_one_run(names, "full") == [[name] for name in names]
    assert history.in_one_run([], "quick") == []


@pytest.mark.parametrize("names", [history.HISTORY, history.SETTLED])
def test_benchmarks_that_runs_name_exist(names):
    for name in names:
        module, cls, _ = name.split(".")
        assert hasattr(importlib.import_module(f"benchmarks.{module}"), cls)


NAN = math.nan
QUICK_DONE = [1.0 if i in (1, 4, 13, 16) else NAN for i in range(24)]


@pytest.mark.parametrize(
    ("values", "quick", "full"),
    [
        (QUICK_DONE, True, False),
        ([1.0] * 24, True, True),
        ([1.0] * 20 + [NAN] * 4, True, True),  # four cells too large
        ([NAN] * 24, True, True),  # the commit lacks the feature
        ([NAN] + QUICK_DONE[1:4] + [NAN] * 20, False, False),  # one cell, chosen by hand
        ([*QUICK_DONE[:-1], None], False, False),  # a failure is tried again
    ],
)
def test_what_needs_no_run(values, quick, full):
    assert [history.cells(GRID)[i] for i in (1, 16)] == [("1", "1024", "32"), ("4", "4096", "32")]
    assert history.is_measured(values, GRID, "quick") is quick
    assert history.is_measured(values, GRID, "full") is full


def test_what_needs_no_run_off_the_grid():
    for grid in ("quick", "full"):
        assert history.is_measured([1.0, 2.0], TREE, grid)
        assert history.is_measured([1.0], PLAIN, grid)
        assert not history.is_measured([None], PLAIN, grid)


def test_another_version_of_mlx_is_measured_anew(versions, monkeypatch):
    results, machine, commit, (pinned, newest) = versions
    monkeypatch.setattr(history, "ROOT", results.parent)
    (results / machine / f"{commit[:8]}-{newest}.json").unlink()
    name = "overhead.Auto.ratio_vs_contiguous"
    some = {name: GRID | {"name": name, "version": "1"}}
    assert history.unmeasured(some, machine, commit, "quick", pinned) == []
    assert history.unmeasured(some, machine, commit, "quick", newest) == [name]


def test_environments_have_the_names_that_asv_gives_them():
    name = history.environment_name("asv.conf.json")
    version = history.asv_settings()["matrix"]["req"]["mlx"][0]
    python = "{}.{}".format(*sys.version_info)
    assert name == f"virtualenv-py{python}-mlx{version}"


def test_asv_that_is_killed_is_an_error(monkeypatch):
    killed = subprocess.CompletedProcess([], -9)
    monkeypatch.setattr(history.subprocess, "run", lambda *args, **kw: killed)
    with pytest.raises(UserError, match="asv run was ended by signal 9"):
        history.asv("run")


def test_backend_settings_replace_the_backend_and_keep_environments_apart():
    assert history.backend_settings("cpu") == {}
    settings = history.backend_settings("cuda13")
    assert "mlx[cuda13] numpy" in settings["install_command"][0]
    assert "[cpu]" not in "".join(settings["install_command"])
    assert settings["env_dir"] == ".asv/env-cuda13"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(history, "ROOT", tmp_path)
    return tmp_path


def test_machine_is_recorded_in_full_once(home):
    history.record_machine("box")
    path = home / ".asv-machine.json"
    record = json.loads(path.read_text())["box"]
    assert set(record) == {"machine", "os", "arch", "cpu", "num_cpu", "ram"}
    assert all(record.values())
    assert record["machine"] == "box"
    assert re.fullmatch(r"\d+ GB", record["ram"])
    assert int(record["ram"].split()[0]) < 100_000
    path.write_text(path.read_text().replace(record["os"], "by hand"))
    history.record_machine("box")
    assert json.loads(path.read_text())["box"]["os"] == "by hand"


def test_another_machine_does_not_add_to_recorded_results(home):
    (home / "results/box").mkdir(parents=True)
    (home / "results/box/machine.json").write_text('{"cpu": "abacus", "version": 1}')
    with pytest.raises(UserError, match=r"results/box was measured on abacus, this is .*MACHINE="):
        history.record_machine("box")
    assert not (home / ".asv-machine.json").exists()


def test_a_recorded_machine_keeps_its_record_on_a_new_home(home, monkeypatch):
    monkeypatch.setattr(history.Machine, "get_defaults", lambda: {"cpu": "c", "ram": "1", "os": ""})
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
    history.record_machine("box")
    assert json.loads((home / ".asv-machine.json").read_text())["box"] == record


def test_host_name_is_what_asv_uses(home, monkeypatch):
    monkeypatch.setattr(history.platform, "node", lambda: "host")
    assert history.machine_name("cpu") == "host"
    assert history.machine_name("cuda13") == "host-cuda13"
    history.record_machine("lab")
    monkeypatch.setattr("asv.machine._get_unique_machine_name", lambda: "host")
    assert history.machine_name("cpu") == "lab"


def git(repo, *args):
    subprocess.run(["git", "-C", str(repo), *args], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "-b", "main")
    git(repo, "config", "commit.gpgsign", "false")
    git(repo, "config", "user.name", "tester")
    git(repo, "config", "user.email", "tester@example.invalid")
    for message in ("one", "two\n\nPhase: 0", "three", "four\n\nwhy\n\nPhase: 1"):
        git(repo, "commit", "--allow-empty", "-m", message)
    monkeypatch.setattr(history, "ROOT", repo)
    return repo


def test_phases_are_read_from_trailers(repository):
    assert list(history.phase_commits().values()) == ["0", "1"]
    assert list(history.phase_commits())[1] == history.git("rev-parse", "HEAD")


def test_shallow_clones_and_missing_main_are_refused(repository, tmp_path, monkeypatch):
    history.check_history()
    git(tmp_path, "clone", "--depth", "1", f"file://{repository}", "shallow")
    monkeypatch.setattr(history, "ROOT", tmp_path / "shallow")
    with pytest.raises(UserError, match="shallow"):
        history.check_history()
    git(repository, "branch", "-m", "main", "trunk")
    monkeypatch.setattr(history, "ROOT", repository)
    with pytest.raises(UserError, match="no branch main"):
        history.check_history()


@pytest.mark.parametrize(
    ("context", "block_size", "percent"), [(1024, 32, 0), (1000, 32, 2.34375), (1, 64, 98.4375)]
)
def test_fragmentation(context, block_size, percent):
    assert report.fragmentation(context, block_size) == percent


def test_values_tell_failed_from_not_applicable():
    assert report.Value(None).show() == "failed"
    assert report.MISSING.show() == "n/a"
    assert report.Value(0.0123, 0.012, 0.013).show(1000, interval=True) == "12.30 [12.00, 13.00]"
    assert report.Value(1.5, -math.inf, math.inf).show(interval=True) == "1.50"


def test_percentages():
    assert report.percent_over(report.Value(1.56, 1.5, 1.625)).show(digits=1) == "56.0"
    assert report.percent_over(report.MISSING).show() == "n/a"
    assert report.percent(0.95) == "-5%"
    assert report.percent(3.0) == "+200%"


TABLE = (["a", "long name"], [["1", "2.50"], ["n/a", "10.00"]])


def test_tables_are_about_one_version_of_mlx(versions, monkeypatch):
    results, machine, commit, (pinned, newest) = versions
    cell = "1", "1024", "32"

    def ratio(**which):
        return report.load(machine, commit, results, **which)[report.HEADLINE][cell].value

    assert report.usual_environment(machine, results) == pinned
    assert ratio() == ratio(environment=pinned) == pytest.approx(ratio(environment=newest) / 10)
    monkeypatch.setattr(report, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert report.usual_environment(machine, results) == newest
    (results / machine / f"{commit[:8]}-{newest}.json").unlink()
    assert ratio() == ratio(environment=pinned)
    with pytest.raises(ValueError, match="expected results of one commit, got 0"):
        ratio(environment=newest)


def test_documents_are_about_what_is_recorded(monkeypatch):
    """Results that git does not have, of a newer MLX, are not for documents."""
    commits, environment = report.recorded_commits("h200"), report.recorded_environment("h200")
    cells = report.recorded("h200", commits[-1])
    found = list(report.iter_results_for_machine(str(report.RESULTS), "h200"))
    for result in [r for r in found if r.commit_hash in commits]:
        local = copy.copy(result)
        local._env_name, local._params = "local", {**result.params, "mlx": "99.0"}
        found.append(local)
    monkeypatch.setattr(report, "iter_results_for_machine", lambda *args: iter(found))
    monkeypatch.setattr(report, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert report.usual_environment("h200") == "local"
    assert report.recorded_environment("h200") == environment
    assert report.recorded_commits("h200") == commits
    assert report.recorded("h200", commits[-1]) == cells


def test_formats():
    assert report.as_text(*TABLE) == "  a  long name\n  1       2.50\nn/a      10.00\n"
    assert report.as_csv(*TABLE) == "a,long name\n1,2.50\nn/a,10.00\n"
    markdown = "| a | long name |\n| --: | --: |\n| 1 | 2.50 |\n| n/a | 10.00 |\n"
    assert report.as_markdown(*TABLE) == markdown


def test_fill_writes_between_markers_and_nowhere_else(monkeypatch):
    monkeypatch.setitem(report.MARKS, "echo", lambda machine, commit: f"{machine} at {commit}\n")
    text = "before\n<!-- results: echo machine=m commit=c -->\nold\n<!-- end results -->\nafter\n"
    assert report.fill(text) == text.replace("old", "m at c")


def test_a_series_is_written_by_cell_and_commit(monkeypatch):
    tables = {
        "a" * 8: {"append.Auto.time_append": {("4", "64"): report.Value(0.25, 0.2, 0.3)}},
        "b" * 8: {
            "append.Auto.time_append": {
                ("4", "64"): report.Value(0.001, 0.001, 0.002),
                ("16", "1"): report.Value(None),
                ("1", "1"): report.MISSING,
                ("1", "64"): report.Value(0.002),
            }
        },
    }
    monkeypatch.setattr(report, "recorded", lambda machine, commit: tables[commit])
    monkeypatch.setattr(report, "phase_commits", lambda: {"b" * 40: "1"})
    text = report.mark_series("m", "append.Auto.time_append", ",".join(tables), "batch,size")
    assert text.splitlines() == [
        "| batch | size | aaaaaaaa | phase 1 (bbbbbbbb) |",
        "| --: | --: | --: | --: |",
        "| 1 | 64 | n/a | 2.00 |",
        "| 4 | 64 | 250.00 [200.00, 300.00] | 1.00 [1.00, 2.00] |",
    ]


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or history.git("rev-parse", "--is-shallow-repository") == "true",
    reason="needs the history",
)
@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_hold_what_results_say(path):
    text = path.read_text()
    assert text == report.fill(text), f"{path} is stale: run `make adr`"
    assert text.count("<!-- results:") == text.count("<!-- end results -->")


def existing(tmp_path, env_name="existing-py_opt_venv_bin_python3"):
    result = {
        "commit_hash": "0123456789abcdef",
        "env_name": env_name,
        "params": {"machine": "gpu", "python": "/opt/venv/bin/python3"},
        "python": "/opt/venv/bin/python3",
        "requirements": {},
        "results": {"a.B.time_c": [1.0]},
        "version": 2,
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source/machine.json").write_text('{"machine": "gpu", "os": "Linux", "version": 1}')
    source = tmp_path / "source/01234567-existing.json"
    source.write_text(json.dumps(result))
    return source, result


LABEL = {"backend": "cuda13", "python": "3.12", "mlx": "0.32.4"}


def test_adopt_relabels_and_keeps_the_measurements(tmp_path):
    source, before = existing(tmp_path)
    target = adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert target == tmp_path / "results/gpu/01234567-cuda13-py3.12-mlx0.32.4.json"
    after = json.loads(target.read_text())
    assert "/opt" not in target.read_text()
    assert after["results"] == before["results"]
    assert after["commit_hash"] == before["commit_hash"]
    assert after["params"] == {"machine": "gpu", "python": "3.12", "mlx": "0.32.4"}
    assert json.loads((target.parent / "machine.json").read_text())["os"] == "Linux"


def test_adopt_refuses_results_that_have_a_name(tmp_path):
    source, _ = existing(tmp_path, "virtualenv-py3.11-mlx0.32.4")
    with pytest.raises(ValueError, match="expected an existing environment, got virtualenv"):
        adopt.adopt(source, **LABEL, results=tmp_path / "results")
    source.write_text("{}")
    with pytest.raises(ValueError, match="expected asv results"):
        adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


ASV_PAGE = (
    '<script src="https://a.example/jquery-3.3.1.min.js" integrity="sha256-x" onerror="f()">'
    '</script>\n<script src="asv.js"></script>\n'
    '<link rel="stylesheet" href="https://b.example/x@1/bootstrap.min.css" integrity="y">\n'
    '<a href="https://github.com/airspeed-velocity/asv/">asv</a>\n'
)


def test_localise_rewrites_only_foreign_scripts_and_styles():
    assert offline.localise(ASV_PAGE, lambda file: f"vendor/{file}") == (
        '<script src="vendor/jquery-3.3.1.min.js" onerror="js_load_failure()"></script>\n'
        '<script src="asv.js"></script>\n'
        '<link rel="stylesheet" href="vendor/bootstrap.min.css">\n'
        '<a href="https://github.com/airspeed-velocity/asv/">asv</a>\n'
    )


def test_every_file_of_asvs_page_is_known():
    import asv

    page = (history.Path(asv.__file__).parent / "www/index.html").read_text()
    files = [match["file"] for match in offline.TAG.finditer(page)]
    assert len(files) == 10
    assert set(files) == set(offline.FILES)


def test_files_come_from_pinned_packages():
    dependencies = load_json(str(ROOT / "website/package.json"))["dependencies"]
    lock = load_json(str(ROOT / "website/package-lock.json"))["packages"]
    for source in offline.FILES.values():
        package = source.split("/")[0]
        assert re.fullmatch(r"[\d.]+", dependencies[package])
        assert lock[f"node_modules/{package}"]["version"] == dependencies[package]


class Conf:
    def __init__(self, html_dir):
        self.html_dir = str(html_dir)


@pytest.fixture
def page(tmp_path, monkeypatch):
    (tmp_path / "html").mkdir()
    (tmp_path / "html/index.html").write_text(ASV_PAGE)
    modules = tmp_path / "node_modules"
    for source in offline.FILES.values():
        (modules / source).parent.mkdir(parents=True, exist_ok=True)
        (modules / source).write_text(f"content of {source}")
    monkeypatch.setattr(offline, "MODULES", modules)
    return tmp_path / "html"


def publish(html_dir):
    offline.OfflineAssets.publish(Conf(html_dir), None, None, None, None)


def test_publish_copies_the_files(page):
    publish(page)
    text = (page / "index.html").read_text()
    assert "https://a.example" not in text
    copied = page / re.search(r'src="(vendor/[^"]+)"', text)[1]
    assert copied.read_text() == "content of jquery/dist/jquery.min.js"


def test_publish_without_npm_keeps_the_links_and_says_so(page, monkeypatch):
    shutil.rmtree(offline.MODULES / "jquery")
    said = []
    monkeypatch.setattr(offline.log, "warning", said.append)
    publish(page)
    assert (page / "index.html").read_text() == ASV_PAGE
    assert "loads its scripts from the network" in said[0]


def test_publish_refuses_a_script_it_does_not_know(page):
    text = ASV_PAGE.replace("jquery-3.3.1", "jquery-4.0.0")
    (page / "index.html").write_text(text)
    with pytest.raises(offline.UserError, match=r"jquery-4\.0\.0\.min\.js"):
        publish(page)
    assert (page / "index.html").read_text() == text


def test_workflows_run_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([\w -]+):", makefile, re.M) for name in line.split()}
    workflows = "".join(file.read_text() for file in ROOT.glob(".github/workflows/*.yml"))
    plist = (ROOT / "docs/runner.md").read_text()
    used = set(re.findall(r"\bmake (?:-k )?((?!targets)[a-z-]+)", workflows + plist))
    assert {"compare", "doctor", "nightly", "nightly-mlx", "publish", "push-results"} <= used
    assert used <= targets


def test_the_launchd_job_is_a_property_list():
    text = (ROOT / "docs/runner.md").read_text()
    job = plistlib.loads(re.search(r"```xml\n(.*?)```", text, re.DOTALL)[1].encode())
    assert job["StartCalendarInterval"] == {"Hour": 2, "Minute": 17}
    assert "&& make -k nightly" in job["ProgramArguments"][-1]


@pytest.mark.parametrize(
    ("workflow", "status"),
    [
        ("OWNER/pagedkv/.github/workflows/benchmark-pr.yml@refs/heads/main", 0),
        ("OWNER/pagedkv/.github/workflows/benchmark-publish.yml@refs/heads/main", 0),
        ("OWNER/pagedkv/.github/workflows/benchmark-pr.yml@refs/pull/1/merge", -9),
        ("OWNER/pagedkv/.github/workflows/mine.yml@refs/heads/main", -9),
        ("other/pagedkv/.github/workflows/benchmark-pr.yml@refs/heads/main", -9),
    ],
)
def test_the_runner_refuses_what_is_not_mains(workflow, status, tmp_path):
    """Its hook ends the process that started it, which would go on to the job's steps."""
    text = (ROOT / "docs/runner.md").read_text()
    hook = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
    script = tmp_path / "job-started.sh"
    script.write_text(hook)
    command = ["bash", "-c", f"bash -e {script}; echo went on"]
    env = {**os.environ, "GITHUB_WORKFLOW_REF": workflow}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert ("went on" in done.stdout) is (status == 0)


def test_the_runners_hook_and_the_workflows_agree():
    text = (ROOT / "docs/runner.md").read_text()
    allowed = set(re.findall(r"\$workflows/([\w.-]+)@", text))
    files = {file.name: file.read_text() for file in ROOT.glob(".github/workflows/*.yml")}
    assert allowed == {name for name, content in files.items() if "self-hosted" in content}
