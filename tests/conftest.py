import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A hook, a shell alias or `rebase -x` that runs the tests has variables of its repository: each git
# command of a test would work there. With the user's settings a commit may ask for a password.
for name in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[name]
os.environ["GIT_CONFIG_GLOBAL"] = str(Path(__file__).with_name("gitconfig"))
os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
# On CUDA MLX multiplies float32 in TF32 unless told otherwise, which is 1e-3 from the oracle.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# Tests neither measure this machine nor write into the user's cache folder.
os.environ["PAGEDKV_AUTOTUNE"] = "0"


def pytest_configure(config):
    config.addinivalue_line("markers", "own_process: run a test in a process of its own")


def pytest_collection_finish():
    """Let garbage collections pass over what was imported: it stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test in a process of its own, if it asks for that.

    MLX 0.32.4 counts a task that failed on a CPU as under way for good. With two of them an
    evaluation of more than ten tasks may wait for ever.
    """
    if not pyfuncitem.get_closest_marker("own_process") or "PAGEDKV_OWN_PROCESS" in os.environ:
        return None
    # Importing Hypothesis and the other plugins takes longer than such a test.
    plugins = [f"-pno:{name}" for name in ("xdist", "hypothesispytest", "anyio", "cacheprovider")]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, "PAGEDKV_OWN_PROCESS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return True


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """An empty folder in place of the user's, of which nothing was read yet."""
    from pagedkv.attention import findings  # not before the environment is set

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    findings.findings.cache_clear()
    findings.environment.cache_clear()
    yield tmp_path / "pagedkv"
    findings.findings.cache_clear()
    findings.environment.cache_clear()


@pytest.fixture(scope="module")
def model():
    """A small model of Llama's shape."""
    from small_models import small_model

    return small_model("llama")


@pytest.fixture
def store(model):
    """An open store of it with 64 blocks."""
    from pagedkv.mlx_lm import PagedStore

    with PagedStore(model, num_blocks=64, block_size=4) as store:
        yield store


@pytest.fixture
def joined(monkeypatch):
    """Compute a prompt's last token with the chunk before it, as on a GPU."""
    from pagedkv.mlx_lm import prompt_cache

    monkeypatch.setattr(prompt_cache, "joins_last_token", lambda: True)


@pytest.fixture
def versions(tmp_path):
    """Results of one commit with two versions of MLX, the newer ten times as slow.

    (results folder, machine, commit, names of the two environments)
    """
    source = Path(__file__).parents[1] / "results/h200"
    folder = tmp_path / "results/h200"
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text((source / "machine.json").read_text())
    [file] = source.glob("0b9e8013-*.json")
    result = json.loads(file.read_text())
    columns = result["result_columns"]
    environments = []
    for version, factor in (("0.32.4", 1), ("99.0", 10)):
        name = f"cuda13-py3.12-mlx{version}"
        result["env_name"], result["params"]["mlx"] = name, version
        for row in result["results"].values():
            values = row[columns.index("result")]
            row[0] = [value and value * factor for value in values]
        (folder / f"0b9e8013-{name}.json").write_text(json.dumps(result))
        environments.append(name)
    return tmp_path / "results", "h200", result["commit_hash"], environments


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """Stands in for `pagedkv.kernels.kernel` on a CPU; compiles each kernel once."""
    from emulator import COMPILER, Emulator

    if COMPILER is None:
        pytest.skip("no C++ compiler to run the Metal text with")
    return Emulator(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def attend(request):
    """Run a case through plan and kernels: the GPU's own, or on a CPU their Metal text."""
    from launching import BACKEND, run

    from pagedkv import kernels

    if BACKEND != "cpu":
        yield run
        return
    emulator = request.getfixturevalue("emulator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel", emulator.kernel)
        yield run


@pytest.fixture(scope="module", params=["donated", "in place"])
def storage(request):
    """How pools are written: as on a CPU, or as on a GPU, which on a CPU is emulated."""
    from launching import BACKEND, emulate

    if BACKEND != "cpu":
        if request.param == "donated":
            pytest.skip("there is a GPU here")
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in place":
            emulate(patch, request.getfixturevalue("emulator"))
        yield request.param


@pytest.fixture(scope="session")
def smollm_folder():
    """Where the small real model of the examples is; skips where it cannot be had."""
    from examples import smollm

    try:
        smollm.fetch()
    except smollm.NoModelError as error:
        pytest.skip(str(error))
    return smollm.FOLDER / smollm.NAME
