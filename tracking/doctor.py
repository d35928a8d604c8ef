"""Is this machine fit to measure, and what to do if not: `make doctor WAIT=seconds`.

Each check returns what it saw and what to do about it, "" if it is good.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx

from tracking.project import machine_options

BUSY = 0.25  # runnable processes a core
PAUSE = 15  # seconds between two looks
THERMAL = ("notifyutil", "-g", "com.apple.system.thermalpressurelevel")


def output(*command):
    """Return what a command prints, nothing if this machine lacks it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def device():
    """Check that MLX runs on the GPU of a Mac, and not of a virtual machine."""
    used = mx.default_device()
    name = mx.device_info().get("device_name", "") if used.type == mx.gpu else platform.machine()
    bad = platform.system() == "Darwin" and (used.type != mx.gpu or "Paravirtual" in name)
    return name, "run an arm64 Python outside of a virtual machine" if bad else ""


def power():
    """Check that the machine runs on mains and saves no power."""
    if platform.system() == "Darwin":
        if re.search(r"lowpowermode\s+1", output("pmset", "-g")):
            return "low power mode is on", "sudo pmset -a lowpowermode 0"
        battery = "Battery Power" in output("pmset", "-g", "batt")
    else:
        supplies = [p.read_text().strip() for p in Path("/sys/class/power_supply").glob("*/online")]
        battery = supplies and "1" not in supplies
    return ("runs on battery", "plug it in") if battery else ("on mains", "")


def load():
    """Check that little else runs."""
    now, cores = os.getloadavg()[0], os.cpu_count()
    remedy = "stop what runs, or wait: `make doctor WAIT=600`"
    return f"{now:.2f} on {cores} cores", remedy if now > BUSY * cores else ""


def heat():
    """Check that macOS reports no thermal pressure: 0 nominal, 1 moderate, 2 heavy."""
    pressure = re.search(r"(\d+)\s*$", output(*THERMAL))
    if not pressure:
        return "thermal pressure is not known here", ""
    hot = "let it cool: `make doctor WAIT=600`; clean its fans"
    return f"thermal pressure {pressure[1]}", hot if int(pressure[1]) else ""


def examine(checks=(device, power, load, heat)):
    """Print what each check says; return whether all are good."""
    remedies = []
    for check in checks:
        seen, remedy = check()
        print(f"{' BAD' if remedy else '  ok'}  {check.__name__}: {seen}", flush=True)
        if remedy:
            print(f"      -> {remedy}")
        remedies.append(remedy)
    return not any(remedies)


def main():
    """Parse the command line; exit 1 if something is bad."""
    parser = argparse.ArgumentParser(prog="python -m tracking.doctor", description=__doc__)
    parser.add_argument("--wait", type=int, default=0, help="seconds to wait for idle and cool")
    machine_options(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + args.wait
    while time.monotonic() < deadline and not examine((load, heat)):
        time.sleep(PAUSE)
    fit = examine()
    print("fit to measure" if fit else "not fit to measure")
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
