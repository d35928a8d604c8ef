"""Is this machine fit to measure: what is wrong, and what to do about it.

`make doctor`. Each check looks at one thing and finds it good, bad, or worth knowing; with `--wait`
it looks again until the machine is idle and cool. Commands of macOS as in `man pmset`.
"""

import argparse
import itertools
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from asv.machine import Machine, MachineCollection
from asv.util import UserError

from benchmarks.common import GRID, kv_bytes, layers
from tracking import valid
from tracking.lock import acquire
from tracking.noise import recorded_noise
from tracking.project import asv_settings, known_machines, machine_name
from tracking.repository import ROOT, check_history, git
from tracking.results import ATTENTION, RESULTS

GOOD, NOTE, BAD = "ok", "note", "BAD"
BUSY = 0.25  # runnable processes a core, beside the one that asks
WAIT = 15  # seconds between two looks
THERMAL = "com.apple.system.thermalpressurelevel"


@dataclass(frozen=True)
class Finding:
    """What a check found: how it is, what was seen, what to do."""

    state: str
    seen: str
    remedy: str = ""


def output(*command):
    """Return what a command prints, or None if this machine lacks it or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_device(machine):
    """Check MLX's backend, and on a Mac that Python is native."""
    device = mx.default_device()
    if platform.system() == "Darwin":
        if platform.machine() != "arm64":
            return Finding(BAD, f"Python runs as {platform.machine()}", "install an arm64 Python")
        if device.type != mx.gpu or not mx.metal.is_available():
            return Finding(BAD, f"MLX uses {device}, not Metal", "run outside a virtual machine")
    name = mx.device_info().get("device_name", "") if device.type == mx.gpu else ""
    if "Paravirtual" in name:
        return Finding(BAD, f"MLX runs on {name}", "run outside a virtual machine")
    return Finding(GOOD, f"MLX runs on {name or platform.machine()} ({device})")


def check_mlx(machine):
    """Check that the installed MLX is one that results are labelled with."""
    wanted = asv_settings()["matrix"]["req"]["mlx"]
    seen = f"MLX {mx.__version__}, measured: {', '.join(wanted)}"
    if mx.__version__ in wanted:
        return Finding(GOOD, seen)
    return Finding(NOTE, seen, "asv measures with its own; after `make clean` so does .venv")


def check_record(machine):
    """Asv's record of this machine is complete and is the one its results carry."""
    path = Path(MachineCollection.get_machine_file_path())
    known = known_machines()
    if machine not in known:
        return Finding(NOTE, f"asv has no record of {machine}", "`make bench` writes it")
    record = known[machine]
    empty = [key for key in ("arch", "cpu", "num_cpu", "os", "ram") if not record.get(key)]
    if empty:
        remedy = f"`.venv/bin/asv machine --machine {machine}`, with all of its options"
        return Finding(
            BAD, f"the record lacks {', '.join(empty)}: each change splits series", remedy
        )
    now = Machine.get_defaults()
    moved = [key for key in ("arch", "cpu", "num_cpu") if now[key] and now[key] != record[key]]
    if moved:
        is_now = ", ".join(f"{key} is {now[key]!r}, recorded {record[key]!r}" for key in moved)
        return Finding(BAD, is_now, "give this machine a name of its own: MACHINE=name")
    recorded = RESULTS / machine / "machine.json"
    if recorded.exists():
        stored = valid.load(recorded)
        apart = [key for key in record if key in stored and stored[key] != record[key]]
        if apart:
            seen = f"{', '.join(apart)} differ from results/{machine}/machine.json"
            return Finding(BAD, seen, f"give {path} the values of the results")
    return Finding(GOOD, f"{machine}: {record['cpu']}, {record['ram']}, {record['os']}")


def check_power(machine):
    """Check that nothing saves power."""
    if platform.system() == "Darwin":
        battery, settings = output("pmset", "-g", "batt"), output("pmset", "-g")
        if battery and "Battery Power" in battery:
            return Finding(BAD, "runs on battery", "plug it in")
        if settings and re.search(r"lowpowermode\s+1", settings):
            return Finding(BAD, "low power mode is on", "sudo pmset -a lowpowermode 0")
        return Finding(GOOD, "on mains, low power mode off")
    supplies = [p.read_text().strip() for p in Path("/sys/class/power_supply").glob("*/online")]
    if supplies and "1" not in supplies:
        return Finding(BAD, "runs on battery", "plug it in")
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    mode = governor.read_text().strip() if governor.exists() else "not known"
    if mode == "powersave":
        return Finding(NOTE, "governor powersave", "sudo cpupower frequency-set -g performance")
    return Finding(GOOD, f"not on battery, governor {mode}")


def check_load(machine):
    """Check that nothing else runs."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    seen = f"load {load:.2f} on {cores} cores"
    if load > BUSY * cores:
        return Finding(BAD, seen, "stop what runs beside it, or wait: `make doctor WAIT=600`")
    return Finding(GOOD, seen)


def check_thermals(machine):
    """Check that heat does not slow the CPU down (macOS)."""
    if platform.system() != "Darwin":
        return Finding(NOTE, "thermal pressure is only known on macOS")
    # Apple silicon says it in a notification: 0 nominal, 1 moderate, 2 heavy; Intel in pmset.
    pressure = re.search(r"(\d+)\s*$", output("notifyutil", "-g", THERMAL) or "")
    said = output("pmset", "-g", "therm") or ""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", said)
    warned = re.search(r"thermal warning level\s*=?\s*[1-9]", said, re.IGNORECASE)
    if (pressure and int(pressure[1])) or (limit and int(limit[1]) < 100) or warned:
        return Finding(
            BAD,
            "the machine is hot and throttled",
            "let it cool: `make doctor WAIT=600`; clean its fans",
        )
    if not pressure and not limit:
        return Finding(NOTE, "macOS does not say whether it is hot", "see `man notifyutil`")
    return Finding(GOOD, "no thermal pressure")


def check_memory(machine):
    """Check that the largest cell of the grid fits into what is free."""
    cells = itertools.product(*GRID)
    need = max((3 * layers(*cell) + 10) * kv_bytes(*cell) for cell in cells)
    free = free_memory()
    if free is None:
        return Finding(
            NOTE, "the machine does not say how much memory is free", "see `man vm_stat`"
        )
    seen = f"{free / 2**30:.0f} GiB free, the full grid takes up to {need / 2**30:.0f} GiB"
    if free < need:
        return Finding(NOTE, seen, "larger cells will be n/a, or slow if memory is swapped")
    return Finding(GOOD, seen)


def free_memory():
    """Return bytes that can be had without swapping, or None if nothing tells."""
    if platform.system() == "Darwin":
        said = output("vm_stat") or ""
        page = re.search(r"page size of (\d+)", said)
        kinds = re.findall(r"Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", said)
        return int(page[1]) * sum(map(int, kinds)) if page and kinds else None
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(available[1])


def check_indexing(machine):
    """Check that neither Spotlight nor Time Machine is at work (macOS)."""
    if platform.system() != "Darwin":
        return Finding(GOOD, "no Spotlight, no Time Machine")
    if re.search(r"Running = 1", output("tmutil", "status") or ""):
        return Finding(BAD, "Time Machine is backing up", "sudo tmutil disable")
    if "enabled" in (output("mdutil", "-s", str(ROOT)) or ""):
        return Finding(NOTE, "Spotlight indexes this disk", "sudo mdutil -i off /")
    return Finding(GOOD, "neither Spotlight nor Time Machine at work")


def check_git(machine):
    """Check that the history is whole: it is the graphs' x axis."""
    try:
        check_history()
    except UserError as error:
        return Finding(BAD, str(error))
    return Finding(GOOD, f"{git('rev-list', '--count', 'HEAD')} commits, branch main")


def check_clock(machine):
    """Check that the clock is not behind the history: results carry dates."""
    behind = int(git("log", "-1", "--format=%ct")) - time.time()
    if behind > 60:
        return Finding(BAD, f"the clock is {behind:.0f} s behind HEAD's commit", "set the clock")
    if (output("timedatectl", "show", "--property=NTPSynchronized") or "").strip().endswith("=no"):
        return Finding(NOTE, "the clock is not synchronised", "timedatectl set-ntp true")
    return Finding(GOOD, "not behind HEAD")


def check_lock(machine):
    """Check that nobody measures in this checkout."""
    try:
        acquire()
    except UserError as error:
        return Finding(BAD, str(error))
    return Finding(GOOD, "nobody else measures in this checkout")


def check_noise(machine):
    """Check that the noise of the machine is known."""
    noise = recorded_noise(machine)
    threshold = noise.threshold(ATTENTION)
    if not threshold.recorded:
        return Finding(NOTE, "not recorded, `make compare` has to guess", "`make noise`, when idle")
    return Finding(GOOD, f"attention alone {threshold.show()}")


CHECKS = {
    "device": check_device,
    "mlx": check_mlx,
    "record": check_record,
    "power": check_power,
    "load": check_load,
    "heat": check_thermals,
    "memory": check_memory,
    "indexing": check_indexing,
    "history": check_git,
    "clock": check_clock,
    "lock": check_lock,
    "noise": check_noise,
}
PASSING = ("load", "heat")  # what goes away by waiting


def examine(machine):
    """Return {check: Finding}, and print them."""
    found = {}
    for name, check in CHECKS.items():
        finding = found[name] = check(machine)
        print(f"{finding.state:>4}  {name}: {finding.seen}")
        if finding.state != GOOD and finding.remedy:
            print(f"      -> {finding.remedy}")
    return found


def wait(machine, seconds):
    """Look every now and then until load and heat are good; return whether they are in time."""
    deadline = time.monotonic() + seconds
    while True:
        busy = [found for name in PASSING if (found := CHECKS[name](machine)).state == BAD]
        if not busy:
            return True
        if time.monotonic() >= deadline:
            return False
        print("waiting:", "; ".join(found.seen for found in busy), flush=True)
        time.sleep(min(WAIT, max(0, deadline - time.monotonic())))


def main():
    """Parse the command line; exit 1 if something is bad."""
    parser = argparse.ArgumentParser(prog="python -m tracking.doctor", description=__doc__)
    parser.add_argument("--wait", type=int, default=0, help="seconds to wait for idle and cool")
    parser.add_argument("--machine", help="name in results/ (default: this host's name)")
    parser.add_argument("--backend", default="cpu", help="part of this host's name")
    args = parser.parse_args()
    machine = args.machine or machine_name(args.backend)
    wait(machine, args.wait)
    bad = [name for name, finding in examine(machine).items() if finding.state == BAD]
    print(f"not fit to measure: {', '.join(bad)}" if bad else "fit to measure")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
