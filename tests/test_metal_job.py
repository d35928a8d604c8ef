"""CI's job on Metal, with a device that pretends."""

import importlib.util
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import cases
import mlx.core as mx
import pytest
from launching import on_a_cpu

from tracking.repository import ROOT

FOLDER = ROOT / ".github/metal"
ALIVE = sys.executable, "-c", "print('alive')"


def load(name):
    spec = importlib.util.spec_from_file_location(f"metal_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


canary, job = load("canary"), load("run")


@pytest.fixture
def device(emulator, monkeypatch):
    """A GPU that runs Metal text; `.change` is done to the text before, as a broken one would."""
    pretended = SimpleNamespace(change=lambda text: text)

    def metal_kernel(*, name, input_names, output_names, source):
        def launch(*, inputs, grid, threadgroup, output_shapes, output_dtypes):
            text = pretended.change(source)
            outputs = dict(zip(output_names, output_dtypes, strict=True))
            groups = [grid[0] // threadgroup[0], 1, 1]
            arrays = input_names, inputs, outputs, output_shapes
            return emulator.run("", text, *arrays, groups, threadgroup[0])

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    return pretended


@on_a_cpu
def test_the_canary_lives_on_a_device_that_works(device):
    assert canary.problems() == []


@on_a_cpu
@pytest.mark.parametrize(
    ("wrong", "right", "problem"),
    [
        ("ushort(8)", "ushort(4)", "simd_shuffle_xor"),
        ("2.0f *", "2.1f *", "bfloat16"),
        ("((device float*)pool)[i] = new_values[i];", "", "write_through_an_input"),
    ],
)
def test_the_canary_names_what_a_device_does_wrong(device, wrong, right, problem):
    device.change = lambda text: text.replace(wrong, right)
    assert canary.problems() == [f"{problem}: wrong numbers"]


@on_a_cpu
def test_a_device_that_compiles_nothing(device):
    def change(text):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\n code=2")

    device.change = change
    assert canary.problems() == [
        f"{check}: [metal::Device] Unable to build metal library from source code=2"
        for check in ("simd_shuffle_xor", "bfloat16", "write_through_an_input")
    ]


def test_mlxs_own_kernels_are_held_to_float64(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    monkeypatch.setattr(canary, "launch", lambda *_, **__: mx.zeros(canary.SIZE))
    attend = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **k) * 1.2
    )
    assert "sdpa: wrong numbers" in canary.problems()
    assert "matmul: wrong numbers" not in canary.problems()


@on_a_cpu
def test_without_a_gpu_it_fails_before_any_test(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "shard", "1", "4", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    first, *_, not_run, _ = done.stdout.splitlines()
    assert first.startswith("::error::the machine, not a kernel: before all tests the canary")
    assert "expected a GPU as the default device, got Device(cpu, 0)" in done.stdout
    assert not_run.startswith("not run")


@pytest.mark.parametrize("arguments", [["shard", "5", "4", "x"], ["shard", "0", "4", "x"], []])
def test_arguments_that_say_nothing_are_refused(arguments):
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"got {arguments}" in done.stderr


def script(folder, name, text):
    file = folder / f"test_{name}.py"
    file.write_text(text)
    return file


def of_files(file):
    return sys.executable, file


def recorded(out):
    lines = map(json.loads, (out / "record.jsonl").read_text().splitlines())
    return {line["file"]: line["what"] for line in lines if "file" in line}


def test_a_file_that_fails_on_a_live_machine_fails(tmp_path, capsys):
    files = [
        script(tmp_path, "a", "print('the reason'); raise SystemExit(1)"),
        script(tmp_path, "b", "import os; os.abort()"),
        script(tmp_path, "c", ""),
    ]
    assert job.run(files, tmp_path / "out", command=of_files, canary=ALIVE) == 1
    said = capsys.readouterr().out
    assert "the machine" not in said
    assert "the reason" in said
    assert recorded(tmp_path / "out") == {
        "test_a.py": "failed (exit status 1)",
        "test_b.py": "ended by signal 6 (Aborted)",
        "test_c.py": "ok",
    }


def test_a_file_that_leaves_the_machine_broken(tmp_path, capsys):
    """The canary was alive before it: what fails is the machine, and nothing more is run on it."""
    broken = tmp_path / "broken"
    look = f"import os, sys; sys.exit(os.path.exists({str(broken)!r}) and 'no kernel compiles')"
    files = [
        script(tmp_path, "a", ""),
        script(tmp_path, "b", f"open({str(broken)!r}, 'w'); raise SystemExit(1)"),
        script(tmp_path, "c", f"open({str(tmp_path / 'ran')!r}, 'w')"),
    ]
    look = sys.executable, "-c", look
    assert job.run(files, tmp_path / "out", command=of_files, canary=look) == 3
    said = capsys.readouterr().out
    assert "::error::the machine, not a kernel: after test_b.py the canary failed" in said
    assert "no kernel compiles" in said
    assert recorded(tmp_path / "out")["test_c.py"] == "not run"
    assert not (tmp_path / "ran").exists()


def test_a_file_beyond_its_time_is_ended_with_its_children(tmp_path):
    child = "import subprocess; sleep = subprocess.Popen(['sleep', '600']);"
    child += "print(sleep.pid, flush=True); sleep.wait()"
    files = [script(tmp_path, "a", child), script(tmp_path, "b", "")]
    assert job.run(files, tmp_path / "out", 3, command=of_files, canary=ALIVE) == 1
    assert recorded(tmp_path / "out") == {"test_a.py": "stopped after 3 s", "test_b.py": "ok"}
    process = int((tmp_path / "out/test_a.log").read_text().split()[0])
    deadline = time.monotonic() + 30
    while is_running(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process):
    ps = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return ps.stdout.strip().strip("Z+sNl<") != ""


def test_a_canary_that_hangs_is_dead(tmp_path, capsys):
    hangs = sys.executable, "-c", "import time; time.sleep(600)"
    assert job.run([script(tmp_path, "a", "")], tmp_path, 0.5, canary=hangs) == 3
    assert "the canary stopped after 0.5 s" in capsys.readouterr().out


def test_four_shards_run_each_file_once(monkeypatch):
    files = job.files_of_tests()
    shards = [files[number::4] for number in range(4)]
    assert sorted(file for shard in shards for file in shard) == files
    names = {file.name for file in files}
    every = {file.name: file.read_text() for file in (ROOT / "tests").glob("test_*.py")}
    kernels = {name for name, text in every.items() if "from launching import" in text}
    assert kernels - names == {"test_metal_job.py"}
    assert {"test_fused.py", "test_codes.py", "test_attention.py", "test_chunk.py"} <= names


TESTS = """
import mlx.core as mx
import pytest
import record
from pagedkv import kernels

record.LARGEST = 10**6

def launch(body, dim, fails=None):
    def made(**arguments):
        if fails:
            raise RuntimeError(fails)
    mx.fast.metal_kernel = lambda **arguments: made
    constants = (("D", dim), ("T", "Float16"))
    kernels.kernel(body, "metal", constants)(inputs=[])

def test_passes(): launch("split", 64)
def test_fails():
    launch("split", 80)
    assert False
def test_does_not_compile(): launch("split", 96, "[metal::Device] Unable to build metal library")
def test_is_skipped(): pytest.skip("why")
def test_holds_much():
    launch("merge", 64)
    mx.eval(mx.zeros(10**6))
"""


def test_the_table_says_what_compiled_and_passed(tmp_path):
    file, out = script(tmp_path, "a", TESTS), tmp_path / "metal/shard"
    assert job.run([file], out, canary=ALIVE) == 1
    assert "to hold 1,000,000 bytes at most, got 4,0" in (out / "test_a.log").read_text()
    assert subprocess.run([sys.executable, FOLDER / "run.py", "table", out.parent]).returncode == 0
    kernels = (out.parent / "kernels.txt").read_text().splitlines()
    assert kernels == [
        "failed: merge D=64 T=Float16",
        "passed: split D=64 T=Float16",
        "failed: split D=80 T=Float16",
        "did not compile: split D=96 T=Float16",
    ]
    lines = (out.parent / "metal.md").read_text().splitlines()
    assert "| split | 64 | 0/0 | Float16 | 1 | 0 | 0 |" in lines
    assert "| split | 80 | 0/0 | Float16 | 0 | 1 | 0 |" in lines
    assert "| split | 96 | 0/0 | Float16 | 0 | 0 | 1 |" in lines
    assert "| split | 256 | 0/0 | Float32 | 0 | 0 | 0 |" in lines  # no test launched it
    assert "| test_a.py | failed (exit status 1) |" in lines


def test_a_kernel_that_compiles_elsewhere_is_not_the_one_that_did_not(tmp_path):
    one, two = "split D=64 T=Float16", "merge D=64 OUT=Float16"
    lines = [
        {"test": "a", "outcome": "did not compile", "kernels": [one, two]},
        {"test": "b", "outcome": "passed", "kernels": [one]},
    ]
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job.table(tmp_path)
    said = (tmp_path / "kernels.txt").read_text().splitlines()
    assert said == [f"did not compile: {two}", f"passed: {one}"]


@pytest.mark.parametrize(
    ("of_sdpa", "allowed"), [(1e-7, 1e-5), (2e-5, 4e-5), (1e-3, 1e-4)], ids=["less", "more", "far"]
)
def test_on_a_gpu_what_sdpa_misses_is_allowed_twice(of_sdpa, allowed, monkeypatch):
    monkeypatch.setattr(cases, "sdpa_error", lambda dtype: of_sdpa)
    monkeypatch.setattr(cases, "ON_CPU", False)
    assert cases.tolerances({mx.float32: 1e-5}) == {mx.float32: pytest.approx(allowed)}
    monkeypatch.setattr(cases, "ON_CPU", True)
    assert cases.tolerances({mx.float32: 1e-5}) == {mx.float32: 1e-5}


def test_sdpa_is_held_to_float64():
    assert 0 < cases.sdpa_error(mx.float32) < 1e-5 < cases.sdpa_error(mx.bfloat16) < 1e-2
