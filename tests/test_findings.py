"""What is kept of findings: where, for which calls, and what happens to the file."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
from trials import DEVICE, KIND, RIGHT, Machine, new_process

import pagedkv
from pagedkv.attention import findings
from pagedkv.attention.findings import Finding, kind_of
from pagedkv.attention.inputs import Call

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_the_next_process_reads_what_this_one_measured(machine, cache_folder):
    finding = machine.find()
    assert machine.find() is finding
    assert finding.because == "measured here by this process: fused 1 ms, gather_rows 2 ms"
    new_process()
    again = machine.find()
    assert (again.path, again.ms, machine.trials) == (finding.path, finding.ms, 1)
    assert re.fullmatch(
        r"measured here on \d{4}-\d\d-\d\d: fused 1 ms, gather_rows 2 ms", again.because
    )
    assert [file.name for file in cache_folder.iterdir()] == ["measured.json"]


@pytest.mark.parametrize("what", ["mlx", "pagedkv", "sources", "device", "kind"])
def test_what_is_measured_anew(machine, monkeypatch, tmp_path, what):
    machine.find()
    new_process()
    kind, device = KIND, DEVICE
    if what == "mlx":
        monkeypatch.setattr(mx, "__version__", "99.0")
    elif what == "pagedkv":
        monkeypatch.setattr(pagedkv, "__version__", "99.0")
    elif what == "sources":
        (tmp_path / "split.h").write_text("// another kernel\n")
        monkeypatch.setattr(findings.kernels, "FOLDER", tmp_path)
    elif what == "device":
        device = "Another GPU"
    else:
        kind = "another kind"
    machine.find(kind, device)
    assert machine.trials == 2
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process()
    machine.find()
    assert machine.trials == 2  # the first is still known


DAMAGED = {
    "empty": "",
    "cut": '{"A GPU of nobody, MLX',
    "not JSON": "path: fused",
    "not UTF-8": b"\xff\xfe{}",
    "a list": "[1, 2]",
    "deep": "[" * 100_000,
    "no kinds": '{"WHERE": 3}',
    "no finding": '{"WHERE": {"KIND": "fused"}}',
    "half a finding": '{"WHERE": {"KIND": {"path": "fused"}}}',
    "times in words": '{"WHERE": {"KIND": {"path": "fused", "ms": {"fused": "fast"}}}}',
    "times beyond floats": '{"WHERE": {"KIND": {"path": "fused", "ms": {"fused": 1'
    + "0" * 400
    + "}}}}",
    "unknown path": '{"WHERE": {"KIND": {"path": "x", "ms": {}, "fault": "", "day": "today"}}}',
    "no path": '{"WHERE": {"KIND": {"path": null, "ms": {}, "fault": "", "day": "today"}}}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_measured_anew_and_mended(machine, cache_folder, name):
    cache_folder.mkdir()
    held = DAMAGED[name]
    if isinstance(held, str):
        where = findings.environment(DEVICE)
        held = held.replace("WHERE", where).replace("KIND", KIND).encode()
    (cache_folder / "measured.json").write_bytes(held)
    assert machine.find().path == "fused"
    new_process()
    assert machine.find().path == "fused"
    assert machine.trials == 1


def denied(*args, **kwargs):
    raise PermissionError("permission denied")


@pytest.mark.parametrize("how", ["a file", "a folder in its place", "read-only"])
def test_a_folder_that_cannot_be_written(machine, cache_folder, monkeypatch, how):
    if how == "a file":
        cache_folder.write_text("")
    elif how == "a folder in its place":
        (cache_folder / "measured.json").mkdir(parents=True)
    else:
        cache_folder.mkdir()
        monkeypatch.setattr(tempfile, "mkstemp", denied)
    before = sorted(cache_folder.parent.rglob("*"))
    machine.outputs["fused"] = RIGHT * 1.1
    with pytest.warns(RuntimeWarning, match="not kept, for the cache folder is not writable"):
        assert machine.find().path == "gather_rows"
    assert machine.find().path == "gather_rows"
    assert machine.trials == 1
    assert sorted(cache_folder.parent.rglob("*")) == before


def test_a_disk_that_is_full(machine, cache_folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    machine.find("before")
    monkeypatch.setattr(os, "replace", full)  # what was written is beside it by then
    assert machine.find().path == "fused"
    assert [file.name for file in cache_folder.iterdir()] == ["measured.json"]
    [kinds] = json.loads((cache_folder / "measured.json").read_text()).values()
    assert kinds.keys() == {"before"}


def test_an_unreadable_file_is_not_fatal(machine, cache_folder, monkeypatch):
    machine.find()
    new_process()
    monkeypatch.setattr(Path, "read_text", denied)
    assert machine.find().path == "fused"
    assert machine.trials == 2


def write_many(process):
    for number in range(20):
        finding = Finding("fused", {"fused": 1.0, "gather_rows": 2.0})
        assert findings.store(f"device {process}", f"kind {number}", finding)


def test_processes_that_write_at_once(cache_folder):
    """None fails or leaves half a file; what one writes alone at last is there."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=write_many, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        file = cache_folder / "measured.json"
        if file.exists():
            json.loads(file.read_text())
        processes[0].join(0.001)
    assert [process.exitcode for process in processes] == [0, 0]
    write_many("last")
    held = json.loads((cache_folder / "measured.json").read_text())
    assert len(held["device last"]) == 20
    assert held.keys() & {"device 0", "device 1"}
    assert len(list(cache_folder.iterdir())) == 1


def call(**changes):
    queries, keys = (4, 32, 1, 128), (64, 32, 8, 128)
    dtype = mx.float16
    usual = Call(mx.gpu, "auto", 1.0, queries, keys, keys, dtype, dtype, dtype)
    values = changes.get("keys", keys)
    return usual._replace(**{"values": values, **changes})


def test_kinds():
    usual = "float16 D=128 Hkv=8 G=4 S=32 Q=1 B<=4 tokens<=4096"
    assert kind_of(call(), 4096) == usual
    assert kind_of(call(scale=0.5, keys=(99, 32, 8, 128)), 2049) == usual
    assert kind_of(call(), 4097).endswith("B<=4 tokens<=8192")
    others = [
        call(dtype=mx.bfloat16),
        call(queries=(4, 32, 1, 64), keys=(64, 32, 8, 64)),
        call(queries=(4, 16, 1, 128)),
        call(queries=(4, 16, 1, 128), keys=(64, 32, 4, 128)),
        call(keys=(64, 16, 8, 128)),
        call(queries=(4, 32, 2, 128)),
        call(queries=(5, 32, 1, 128)),
        call(keys=(64, 32, 8, 33), keys_dtype=mx.uint32, values_dtype=mx.uint32),
        call(keys=(64, 32, 8, 17), keys_dtype=mx.uint32, values_dtype=mx.uint32),
        call(options=(("window", 7),)),
        call(options=(("window", 7), ("softcap", 2.0))),
        call(options=(("sinks", ((32,), mx.float32)),)),
    ]
    assert len({kind_of(other, 4096) for other in others} | {usual}) == len(others) + 1
    assert kind_of(call(options=(("window", 7),)), 1) == kind_of(call(options=(("window", 9),)), 1)


def test_a_sequence_that_grows_is_measured_five_times():
    alone = call(queries=(1, 32, 1, 128))
    assert len({kind_of(alone, tokens) for tokens in range(1025, 32769)}) == 5


def test_where_findings_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert findings.cache_file() == tmp_path / "pagedkv/measured.json"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setattr(sys, "platform", "linux")
        assert findings.cache_file() == tmp_path / ".cache/pagedkv/measured.json"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert findings.cache_file() == tmp_path / "Library/Caches/pagedkv/measured.json"


def test_a_user_without_a_home(machine, monkeypatch):
    def nobody():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", nobody)
    assert machine.find().path == "fused"


def test_importing_the_package_reads_no_findings(cache_folder):
    """Nor does it hash its sources, or make the folder."""
    program = (
        "import pagedkv.attention.findings as f;"
        "print(f.findings.cache_info().currsize + f.environment.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
    assert not cache_folder.exists()
