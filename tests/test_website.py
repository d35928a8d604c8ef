"""The offline page, and the machine that publishes it."""

import os
import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from asv.util import load_json

from tracking.project import asv_settings
from tracking.repository import ROOT
from website import publish

ASV_PAGE = (
    '<script src="https://a.example/jquery-3.3.1.min.js" integrity="sha256-x" onerror="f()">'
    '</script>\n<script src="asv.js"></script>\n'
    '<link rel="stylesheet" href="https://b.example/x@1/bootstrap.min.css" integrity="y">\n'
    '<a href="https://github.com/airspeed-velocity/asv/">asv</a>\n'
)


def test_every_file_of_asvs_page_is_known():
    import asv

    page = (Path(asv.__file__).parent / "www/index.html").read_text()
    files = [match["file"] for match in publish.TAG.finditer(page)]
    assert len(files) == 10
    assert set(files) == set(publish.FILES)


def test_files_come_from_pinned_packages():
    dependencies = load_json(str(ROOT / "website/package.json"))["dependencies"]
    lock = load_json(str(ROOT / "website/package-lock.json"))["packages"]
    for source in publish.FILES.values():
        package = source.split("/")[0]
        assert re.fullmatch(r"[\d.]+", dependencies[package])
        assert lock[f"node_modules/{package}"]["version"] == dependencies[package]


@pytest.fixture
def page(tmp_path, monkeypatch):
    (tmp_path / "html").mkdir()
    (tmp_path / "html/index.html").write_text(ASV_PAGE)
    modules = tmp_path / "node_modules"
    for source in publish.FILES.values():
        (modules / source).parent.mkdir(parents=True, exist_ok=True)
        (modules / source).write_text(f"content of {source}")
    monkeypatch.setattr(publish, "MODULES", modules)
    return tmp_path / "html"


def test_publish_copies_the_files(page):
    publish.localise_index(page)
    assert (page / "index.html").read_text() == (
        '<script src="vendor/jquery.min.js" onerror="js_load_failure()"></script>\n'
        '<script src="asv.js"></script>\n'
        '<link rel="stylesheet" href="vendor/bootstrap.min.css">\n'
        '<a href="https://github.com/airspeed-velocity/asv/">asv</a>\n'
    )
    copied = (page / "vendor/jquery.min.js").read_text()
    assert copied == "content of jquery/dist/jquery.min.js"


def test_publish_without_npm_keeps_the_links_and_says_so(page, monkeypatch):
    shutil.rmtree(publish.MODULES / "jquery")
    said = []
    monkeypatch.setattr(publish.log, "warning", said.append)
    publish.localise_index(page)
    assert (page / "index.html").read_text() == ASV_PAGE
    assert "overhead.html is whole" in said[0]


def test_publish_refuses_a_script_it_does_not_know(page):
    text = ASV_PAGE.replace("jquery-3.3.1", "jquery-4.0.0")
    (page / "index.html").write_text(text)
    with pytest.raises(publish.UserError, match=r"jquery-4\.0\.0\.min\.js"):
        publish.localise_index(page)
    assert (page / "index.html").read_text() == text


def test_make_bench_ends_with_the_page_that_opens_from_a_disk():
    text = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(bench|publish):.*\n((?:\t.*\n)+)", text, re.M))
    folder = asv_settings()["html_dir"]
    assert recipes["bench"].splitlines()[-1].split(" && ")[0].endswith("publish")
    assert f"page: file://$(CURDIR)/{folder}/overhead.html " in recipes["publish"].splitlines()[-1]


def test_workflows_run_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([\w -]+):", makefile, re.M) for name in line.split()}
    workflows = "".join(file.read_text() for file in ROOT.glob(".github/workflows/*.yml"))
    plist = (ROOT / "docs/runner.md").read_text()
    used = set(re.findall(r"\bmake (?:-k )?((?!targets)[a-z-]+)", workflows + plist))
    assert {"compare", "doctor", "nightly", "publish"} <= used
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
