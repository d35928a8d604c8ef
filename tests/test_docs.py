"""The documentation as a site: it builds, and no link leads nowhere."""

import re
import shutil
import subprocess
import sys

import pytest

from tracking.documents import DOCUMENTS
from tracking.repository import ROOT

pytest.importorskip("sphinx", reason="the site group is not installed")


def build(root, site):
    """Run what `make docs` runs."""
    command = re.search(r"^docs:.*\n\t\$\(BIN\)/python (.*)", (ROOT / "Makefile").read_text(), re.M)
    arguments = command[1].replace("$(DOCS)", str(site)).split()
    command = [sys.executable, *arguments, "-d", str(site.parent / "doctrees")]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("docs") / "html"
    done = build(ROOT, site)
    assert done.returncode == 0, done.stderr
    return site


def test_it_needs_no_network(site):
    load = re.compile(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]+)"')
    loaded = [
        address for page in site.rglob("*.html") for address in load.findall(page.read_text())
    ]
    assert len(loaded) > 100
    assert not [address for address in loaded if "//" in address]
    for file in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\W*https?:", file.read_text()), file


def test_the_way_to_every_page_is_beside_the_first(site):
    first = _page(site, "README")
    assert 'href="../overhead.html"' in first  # what it is published beside
    for page in (ROOT / "docs").rglob("*.md"):
        assert f'href="{page.relative_to(ROOT).with_suffix(".html")}"' in first, page


def test_links_that_lead_nowhere_fail(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/conf.py", tmp_path / "docs")
    with (tmp_path / "docs/conf.py").open("a") as conf:
        conf.write("CONTENTS = {}\n")
    links = "[a](#here) [b](nowhere.md) [c](#nowhere) [d](README.md#nowhere)"
    (tmp_path / "README.md").write_text(f"# Here\n\n{links}\n")
    done = build(tmp_path, tmp_path / "html")
    assert done.returncode == 1
    assert done.stderr.count("WARNING") == 3


def test_make_targets_that_are_named_exist():
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", *ROOT.glob("tracking/*.py")]:
        named = re.findall(r"(?:^|`|&& )make (?:-k )?([a-z-]+)", document.read_text(), re.M)
        assert set(named) <= targets, document


def test_every_target_is_in_make_help_or_make_help_all():
    makefile = (ROOT / "Makefile").read_text()
    targets = {*" ".join(re.findall(r"^\.PHONY: (.*)", makefile, re.M)).split()}
    few, rest = (
        {
            target
            for line in re.findall(r"@echo \"make ([a-z, -]+?)  .*", recipe)
            for target in line.split(", ")
        }
        for recipe in re.search(
            r"^help:\n(.*?)^help-all: help\n(.*?)\n\n", makefile, re.M | re.S
        ).groups()
    )
    assert len(few - {"help-all"}) == 8
    assert few | rest == targets - {"help"}


def _page(site, name):
    return (site / f"{name}.html").read_text()
