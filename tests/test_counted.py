"""Counted work: the same each time, whatever the hash seed, and 3% more is always seen."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import pagedkv
from benchmarks import counted, host, scheduler, step
from benchmarks.kinds import NotApplicableError, TrackBenchmark
from tracking.changes import Change
from tracking.noise import Noise
from tracking.repository import ROOT
from tracking.results import Value

CELLS = {
    "scheduler.Instructions.track_instructions": (16, 0),
    "scheduler.Allocated.track_allocated": (16, 0),
    "host.PlanInstructions.track_instructions": (64, 4096, 32),
    "host.PlanAllocated.track_allocated": (64, 4096, 32),
    "step.Instructions.track_instructions": (8,),
    "step.Allocated.track_allocated": (8,),
}
PRINT = """
import importlib
for name, cell in {}.items():
    module, cls, function = name.split(".")
    benchmark = getattr(importlib.import_module("benchmarks." + module), cls)()
    benchmark.setup(*cell)
    print(name, getattr(benchmark, function)(*cell))
"""


def test_identical_code_counts_the_same_in_every_process():
    said = set()
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", PRINT.format(CELLS)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(done.stdout)
    [counts] = said
    assert len(counts.splitlines()) == len(CELLS)
    assert all(float(line.split()[1]) > 0 for line in counts.splitlines())


def test_three_percent_more_of_the_scheduler_is_certain(monkeypatch):
    benchmark, cell = scheduler.Instructions(), (16, 0)

    def count():
        benchmark.setup(*cell)
        return benchmark.track_instructions(*cell)

    before = count()
    assert count() == before
    schedule = pagedkv.Scheduler.schedule
    more = counted.instructions(lambda: pagedkv.blocks_needed(1, 2))
    times = -int(-0.03 * before // more)

    def slower(self):
        for _ in range(times):
            pagedkv.blocks_needed(1, 2)
        return schedule(self)

    monkeypatch.setattr(pagedkv.Scheduler, "schedule", slower)
    after = count()
    assert 1.03 < after / before < 1.03 + 2 * more / before
    name = "scheduler.Instructions.track_instructions(16, 0)"

    def verdict(a, b):
        return Change(name, Value(a), Value(b), True).verdict(Noise())

    assert (verdict(before, after), verdict(after, before)) == ("worsened", "improved")
    assert verdict(before, before) == "unchanged"


def test_bytecode_of_the_package_is_counted_and_no_other():
    assert counted.instructions(lambda: sorted(range(100), key=lambda x: -x)) == 0
    once = counted.instructions(lambda: pagedkv.blocks_needed(5, 2))
    assert once > 0
    assert counted.instructions(lambda: [pagedkv.blocks_needed(5, 2) for _ in "abc"]) == 3 * once
    assert sys.gettrace() is None


def test_memory_of_python_and_numpy_is_counted_also_if_it_goes():
    nothing = counted.allocated(lambda: None)
    for make in (lambda: bytes(10**6), lambda: np.zeros(10**6, np.uint8)):
        assert 10**6 <= counted.allocated(make) - nothing < 10**6 + 1000
    assert counted.allocated(lambda: [bytes(10**6) for _ in range(3)]) >= 3 * 10**6

    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        counted.allocated(fails)
    assert counted.allocated(lambda: None) == nothing


def test_retired_instructions_are_counted_or_it_is_said_why_not():
    try:
        counted.require_retired()
    except NotApplicableError as error:
        pytest.skip(str(error))
    few, many = (counted.retired(lambda n=n: sum(range(n))) for n in (10**4, 10**6))
    assert 50 < many / few < 110


def test_where_nobody_counts_the_cell_says_so(monkeypatch):
    monkeypatch.setattr(counted.platform, "system", lambda: "Plan9")
    for instance in (scheduler.Retired(), host.PlanRetired(), step.Retired()):
        benchmark = TrackBenchmark("a.B.track_retired", instance.track_retired, [instance])
        assert benchmark.unit == "instructions"
        benchmark.set_param_idx(0)
        benchmark.do_setup()
        assert benchmark.do_run()["number"] == -4


@pytest.mark.parametrize(
    ("machine", "said"),
    [("riscv64", "perf_event_open on riscv64"), ("x86_64", "perf_event_open: .*virtual machines")],
)
def test_linux_that_does_not_count(machine, said, monkeypatch):
    monkeypatch.setattr(counted.platform, "machine", lambda: machine)
    libc = SimpleNamespace(syscall=lambda *args: -1)
    monkeypatch.setattr(counted.ctypes, "CDLL", lambda *args, **kw: libc)
    monkeypatch.setattr(counted.ctypes, "get_errno", lambda: 1)
    with pytest.raises(NotApplicableError, match=said) as raised:
        counted._perf_counter.__wrapped__()
    assert raised.value.why == "not counted"


def test_macos_counts_for_the_process(monkeypatch):
    """The number's place in rusage_info_v4, which has a UUID before 35 numbers."""

    def proc_pid_rusage(process, flavor, usage):
        assert (process, flavor, len(usage)) == (os.getpid(), 4, 2 + 35)
        usage[2 + 27 + 2] += proc_pid_rusage.step  # 27 numbers of version 3, then the third
        return 0

    libc = SimpleNamespace(proc_pid_rusage=proc_pid_rusage)
    monkeypatch.setattr(counted.ctypes, "CDLL", lambda *args, **kw: libc)
    proc_pid_rusage.step = 0
    with pytest.raises(NotApplicableError, match="counts no instructions"):
        counted._rusage_counter.__wrapped__()
    proc_pid_rusage.step = 7
    read = counted._rusage_counter.__wrapped__()
    assert read() - read() == -7
