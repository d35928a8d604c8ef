"""Where machine code of CUDA kernels is kept; the compiler and MLX's launches are stand-ins."""

import os

import mlx.core as mx
import pytest

from pagedkv import kernels
from pagedkv.kernels import nvrtc


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A folder of MLX's; NVRTC that counts; MLX that finds files of one form, or none."""

    class Machine:
        compiled, launches, form = [], [], nvrtc.FORMS[0]

    here = Machine()
    here.compiled, here.launches = [], []
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    monkeypatch.setattr(nvrtc, "_compile", lambda text: here.compiled.append(text) or b"code")
    monkeypatch.setattr(nvrtc, "_name", lambda text, symbol: f"{symbol}_{abs(hash(text))}")

    def launch(name, code, inputs, scalars, *others):
        here.launches.append((name, code, scalars))
        file = nvrtc.folder() / f"{here.form.format(name)}.ptx"
        if code == b"" and not (file.is_file() and file.with_suffix(".txt").is_file()):
            raise RuntimeError("failed to load")
        return [mx.zeros(8)]

    monkeypatch.setattr(nvrtc, "launch", launch)
    nvrtc._form.cache_clear()
    yield here
    nvrtc._form.cache_clear()


@pytest.mark.parametrize("form", nvrtc.FORMS)
def test_machine_code_is_found_by_its_name(machine, form):
    machine.form = form
    name, code = nvrtc.kept("some text", "pagedkv_some")
    assert code == b""
    assert machine.compiled == [nvrtc.PROBE, "some text"]
    files = sorted(nvrtc.folder().iterdir())  # nothing of the probe, no temporary files
    assert [file.name for file in files] == [f"{form.format(name)}{x}" for x in (".ptx", ".txt")]
    assert files[0].read_bytes() == b"code"
    assert files[1].read_text() == f"{name}\tpagedkv_some\n"
    assert nvrtc.kept("some text", "pagedkv_some") == (name, b"")  # as in the next process
    assert machine.compiled == [nvrtc.PROBE, "some text"]


def test_where_mlx_looks_for_files_of_another_name_the_code_goes_along(machine):
    machine.form = "{}_unheard_of"
    assert nvrtc.kept("some text", "pagedkv_some")[1] == b"code"
    assert nvrtc.kept("some text", "pagedkv_some")[1] == b"code"
    assert list(nvrtc.folder().iterdir()) == []


def test_where_nothing_can_be_written_the_code_goes_along(machine, monkeypatch):
    nvrtc.folder().write_text("no folder")
    assert nvrtc.kept("some text", "pagedkv_some")[1] == b"code"


def test_a_kernel_is_compiled_when_it_is_first_called(machine):
    kernel = kernels.CudaKernel(
        "split", (("D", 64),), ("queries", "keys", "values", "block_tables", "plan"), ("outputs",)
    )
    tables = mx.zeros((3, 7), mx.int32)
    arrays = [mx.zeros(8), mx.zeros(8), mx.zeros(8), tables, mx.zeros(8, mx.int32)]
    launch = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
    for _ in range(2):
        kernel(inputs=arrays, output_shapes=[(8,)], output_dtypes=[mx.float32], **launch)
    assert len(machine.compiled) == 2  # with the probe
    assert [scalars for _, _, scalars in machine.launches[1:]] == [[7], [7]]


def test_the_folder_is_mlxs(monkeypatch, tmp_path):
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)
    monkeypatch.setattr(nvrtc.tempfile, "gettempdir", lambda: str(tmp_path))
    assert nvrtc.folder() == tmp_path / "mlx" / vars(mx)["__version__"] / "ptx"
    assert os.fspath(nvrtc.folder()).startswith(os.fspath(tmp_path))
