"""Work that is counted instead of timed: a change of it is certain, and no machine is too noisy.

Host code is Python. `track_instructions` counts its bytecode, `track_allocated` the memory it asks
for: the same in every run and on every machine of one Python and NumPy version and kind of device.
`track_retired` counts what the processor executes: what NumPy does inside a call counts, too, and
machines differ.
"""

import ctypes
import functools
import gc
import inspect
import os
import platform
import statistics
import struct
import sys
import tracemalloc

import pagedkv

from .kinds import NotApplicableError


def instructions(call):
    """Return how many bytecode instructions of the package's files `call` runs."""
    folder = os.path.dirname(inspect.getfile(pagedkv)) + os.sep
    count = 0

    def in_frame(frame, event, _):
        nonlocal count
        count += event == "opcode"
        return in_frame

    def on_call(frame, event, _):
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return in_frame

    # Python 3.12 traces instructions only where a frame had asked for it before.
    sys._getframe().f_trace_opcodes = True
    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def allocated(call):
    """Return the most bytes of Python's and NumPy's memory that `call` holds at once.

    Beside what there was before, without garbage collection. What comes out of Python's free lists
    does not count.
    """
    collecting = gc.isenabled()
    gc.disable()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        if collecting:
            gc.enable()


def retired(call):
    """Return how many instructions the processor executed in `call`.

    Raises
    ------
    NotApplicableError
        If the system does not count them, or not for an ordinary process.
    """
    read = _retired_counter()
    before = read()
    call()
    return read() - before


def require_retired():
    """Raise NotApplicableError (n/a) where the system does not count retired instructions."""
    _retired_counter()


def _retired_counter():
    """Return a function without arguments that returns the instructions executed so far."""
    counters = {"Linux": _perf_counter, "Darwin": _rusage_counter}
    if platform.system() not in counters:
        raise NotApplicableError(
            f"{platform.system()} does not say what it executed", "not counted"
        )
    return counters[platform.system()]()


@functools.cache
def _perf_counter():
    """Linux counts what this thread executes outside of the kernel: perf_event_open(2)."""
    number = {"x86_64": 298, "aarch64": 241}.get(platform.machine())
    if number is None:
        raise NotApplicableError(f"perf_event_open on {platform.machine()}", "not counted")
    attributes = bytearray(128)
    struct.pack_into("=IIQ", attributes, 0, 0, len(attributes), 1)  # hardware: instructions
    struct.pack_into("=Q", attributes, 40, 1 << 5 | 1 << 6)  # not the kernel's, not a hypervisor's
    event = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(number, event, 0, -1, -1, 1 << 3)  # closed on exec
    if descriptor < 0:
        why = os.strerror(ctypes.get_errno())
        raise NotApplicableError(
            f"perf_event_open: {why} (virtual machines have no counters, and "
            "/proc/sys/kernel/perf_event_paranoid has to be 2 at most)",
            "not counted",
        )
    return lambda: struct.unpack("=Q", os.read(descriptor, 8))[0]


@functools.cache
def _rusage_counter():
    """MacOS counts what the process executes: proc_pid_rusage in sys/resource.h."""
    usage = (ctypes.c_uint64 * 37)()  # rusage_info_v4: a UUID, 35 numbers
    libc = ctypes.CDLL(None, use_errno=True)

    def read():
        if libc.proc_pid_rusage(os.getpid(), 4, usage):
            raise OSError(ctypes.get_errno(), "proc_pid_rusage")
        return usage[2 + 29]  # ri_instructions

    if not read():
        raise NotApplicableError("proc_pid_rusage counts no instructions here", "not counted")
    return read


class _Counted:
    """Counts what `work` does: the mean of some calls, after one that warms up."""

    calls = 16
    better = "smaller"

    def mean(self, count):
        self.work()
        return statistics.fmean(count(self.work) for _ in range(self.calls))


class _Instructions(_Counted):
    unit = "instructions"

    def track_instructions(self, *cell):
        return self.mean(instructions)


class _Allocated(_Counted):
    unit = "bytes"

    def track_allocated(self, *cell):
        return self.mean(allocated)


class _Retired(_Counted):
    unit = "instructions"

    def setup(self, *cell):
        require_retired()
        super().setup(*cell)

    def track_retired(self, *cell):
        return self.mean(retired)
