"""What pip and PyPI get: metadata, a readme that needs no repository, and archives that build."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tracking.repository import ROOT

pytest.importorskip("hatchling", reason="the build group is not installed")


def build(source, target, *kinds):
    """Run what `python -m build` runs, without an environment of its own."""
    kinds = [word for kind in kinds for word in ("--target", kind)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(target), *kinds]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(files of the sdist, the wheel that was built of it)."""
    folder = tmp_path_factory.mktemp("a package")
    build(ROOT, folder, "sdist")
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        files = {name.split("/", 1)[1] for name in archive.getnames()}
    build(folder / sdist.name.removesuffix(".tar.gz"), folder, "wheel")
    [wheel] = folder.glob("*.whl")
    return files, zipfile.ZipFile(wheel)


def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_of_an_sdist_has_the_whole_package(archives):
    files, wheel = archives
    tracked = subprocess.run(
        ["git", "ls-files", "pagedkv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) <= files
    assert set(tracked) - {"pagedkv/README.md"} <= set(wheel.namelist())
    packed = {Path(name).parts[0] for name in wheel.namelist()}
    assert packed == {"pagedkv", next(name for name in packed if name.endswith(".dist-info"))}
    assert not [name for name in files if name.startswith(("tests", "results", "tracking"))]


def test_it_has_types_and_the_versions_that_it_supports(archives):
    _, wheel = archives
    found = metadata(wheel)
    assert found["Author"] == "the pagedkv authors"
    kinds = found.get_all("Classifier")
    assert "Typing :: Typed" in kinds
    oldest = int(found["Requires-Python"].removeprefix(">=3."))
    versions = {kind.rpartition(" ")[2] for kind in kinds if ":: Python :: 3." in kind}
    assert versions == {f"3.{minor}" for minor in range(oldest, 14)}


def test_its_readme_needs_no_repository(archives):
    """PyPI has no files beside it, and no page for a relative link."""
    _, wheel = archives
    found = metadata(wheel)
    assert found["Description-Content-Type"] == "text/markdown"
    text = found.get_payload(decode=True).decode()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "<" not in text


def test_the_server_is_a_command(archives, capsys):
    _, wheel = archives
    [name] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "pagedkv-server = pagedkv.mlx_lm.server:main" in wheel.read(name).decode()
    pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
    from pagedkv.mlx_lm.server import main

    with pytest.raises(SystemExit, match="2"):
        main(["--nosuch"])
    assert "pagedkv-server: error: expected a budget" in capsys.readouterr().err


def test_the_example_shows_reuse(tmp_path, capsys):
    pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
    pytest.importorskip("openai", reason="the test group is not installed")
    from served_models import saved_model

    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "pagedkv/README.md").read_text(), re.S)
    path = saved_model(tmp_path / "model")
    example = re.sub(r'load\("[^"]+"\)', f"load({path!r})", example).replace('"2GB"', '"8MB"')
    exec(example, {})
    cached = [int(number) for number in re.findall(r"\[(\d+) of", capsys.readouterr().out)]
    assert cached[0] == 0
    assert cached[1] > 0
