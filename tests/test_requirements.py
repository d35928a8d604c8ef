"""requirements.lock agrees with pyproject.toml and asv.conf.json, and pip is held to it."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tracking import safeguards
from tracking.project import asv_settings
from tracking.repository import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked():
    """Return {name: [(version, hashes)]} of the lock, some by versions of Python."""
    text, found = safeguards.REQUIREMENTS.read_text(), {}
    for entry in re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines():
        pin, *hashes = entry.split(" --hash=")
        requirement = Requirement(pin)
        [specifier] = requirement.specifier
        assert specifier.operator == "=="
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append((specifier.version, [word.strip() for word in hashes]))
    return found


def met(wanted, lock):
    """Whether a pin of the lock fulfils a requirement."""
    pins = lock.get(canonicalize_name(wanted.name), [])
    return any(wanted.specifier.contains(version, prereleases=True) for version, _ in pins)


def asked():
    """Return what pyproject.toml and asv.conf.json ask for."""
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    lines += itertools.chain(*(extras[backend] for backend in ("cpu", "cuda12", "cuda13")))
    lines += [line for group in groups.values() for line in group if isinstance(line, str)]
    settings = asv_settings()
    for name, versions in settings["matrix"]["req"].items():
        lines += [f"{name.removeprefix('pip+')}=={version}" for version in versions]
    words = shlex.split(settings["install_command"][0])
    lines += words[words.index("install") + 1 :]
    return [Requirement(line) for line in lines]


def test_the_lock_has_what_is_asked_for_by_hash_and_names_no_index():
    lock, text = locked(), safeguards.REQUIREMENTS.read_text()
    assert [str(one) for one in asked() if not met(one, lock)] == []
    assert not any(met(Requirement(one), lock) for one in ("numpy<2", "nosuch"))
    for _, hashes in itertools.chain(*lock.values()):
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes)
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash)", text, re.MULTILINE)


@pytest.mark.parametrize("held", [True, False])
def test_pip_takes_no_file_whose_hash_is_not_locked(held, tmp_path, monkeypatch):
    """Such as an index serves by a locked name; held to nothing, pip takes it."""
    folder, lock = tmp_path / "an index", tmp_path / "requirements.lock"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tool-1-py3-none-any.whl", "w") as wheel:
        about = "Metadata-Version: 2.1\nName: tool\nVersion: 1\n"
        wheel.writestr("tool-1.dist-info/METADATA", about)
        wheel.writestr("tool-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tool-1.dist-info/RECORD", "")
    lock.write_text(f"tool==1 --hash=sha256:{64 * '0'}\n")
    monkeypatch.setattr(safeguards, "REQUIREMENTS", lock)
    environ = {"PATH": os.environ["PATH"], "ASV_UNLOCKED": "" if held else "1"}
    safeguards.bind_pip(environ)
    pip = [sys.executable, "-m", "pip", "download", "--no-index", "--find-links", str(folder)]
    pip += ["--dest", str(tmp_path / "there"), "tool"]
    done = subprocess.run(pip, env=environ, capture_output=True, text=True)
    assert (done.returncode == 0) is not held
    assert ("THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr) is held


@pytest.mark.parametrize(("lock", "bound"), [([], True), (["LOCK="], False)])
def test_make_installs_only_what_is_locked(lock, bound):
    """Every pip of the environment's rules is bound to hashes or to no network, unless told."""
    make = ["make", "--dry-run", "--always-make", *lock, ".venv/.browser"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    pips = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(pips) == 4
    free = [line for line in pips if not re.search("--require-hashes|--no-index", line)]
    assert bool(free) is not bound


def test_asvs_own_commands_fetch_nothing_beside_the_lock():
    settings = asv_settings()
    for command in [*settings["build_command"], *settings["install_command"]]:
        unbound = "PIP_REQUIRE_HASHES=0" in command
        assert ("--no-index" in command) is unbound
