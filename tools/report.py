"""Run tests and benchmarks on a volunteer's Mac for half an hour: `make report`.

Each step is a command of its own with a limit on its time. One that fails, hangs or crashes stops
none of those after it. results/MACHINE/report.md is written after every step.
"""

import argparse
import contextlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from asv.machine import Machine, MachineCollection
from asv.util import UserError

from tracking.files import write_text
from tracking.project import known_machines, record_machine
from tracking.repository import ROOT, check_history, git
from tracking.results import RESULTS

LOGS = ROOT / ".asv/report"
MINUTES = 28.0  # of all steps together
SHOWN = 25  # lines of a step's output

# Tests that compile and run the kernels, or hold mlx-lm's models over them to mlx-lm's tokens.
KERNELS = (
    "fused fused_writes codes attention layer_shapes order pools step kv_cache generate "
    "mlx_lm_tokens"
)
CELLS = r"\((1|4), (1024|4096), 32\)$"


@dataclass(frozen=True)
class Step:
    """A command, and the minutes that it may take."""

    name: str
    minutes: float
    command: tuple


def steps_on(machine):
    """Return the steps, the ones that say most first."""
    make, run = ("make", "--no-print-directory"), (sys.executable, "-m")
    tests = [f"tests/test_{name}.py" for name in KERNELS.split()]
    short = ("--batches", "1", "4", "--contexts", "1024", "4096")
    here = ("--machine", machine)
    one = (*run, "asv", "run", *here, "--attribute", "rounds=1", "HEAD^!", "--bench")
    return [
        Step("doctor", 1, (*make, "doctor", f"MACHINE={machine}")),
        Step("tests", 6, (*run, "pytest", "--tb=short", "--maxfail=20", "-rf", *tests)),
        Step("tune", 4, (*run, "tools.tune", *short)),
        # asv saves at the end of a run: two lose less than one. The first installs MLX.
        Step("step", 5, (*one, rf"^step\.Auto\.ratio_.*{CELLS}")),
        Step("attention", 3, (*one, rf"^overhead\.Auto\..*{CELLS}")),
        Step("noise", 6, (*make, "noise", f"MACHINE={machine}", "TIMES=1")),
        Step(
            "short grid",
            MINUTES,
            (*run, "tracking.history", "run", "--head", "--grid=short", *here),
        ),
    ]


def default_name(results=RESULTS):
    """Return a name made of chip and memory, such as apple-m2-max-32gb, and of no host or user.

    A number follows where the results of that name are those of another machine.
    """
    about = Machine.get_defaults()
    chip = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", (about["cpu"] or about["arch"]).lower())
    memory = round(int(about["ram"] or 0) / 2**30)
    name = re.sub(r"\W+", "-", f"{chip} {memory}gb", flags=re.ASCII).strip("-")
    own = known_machines()
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next(name for name in names if name in own or not (results / name).exists())


def run(step, seconds, log):
    """Run a step for at most some seconds; return what happened, "ok" if it succeeded.

    Its output goes into `log`. Its child processes end with it.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        end(process)
    if status < 0:
        return f"ended by signal {-status} ({signal.strsignal(-status)})"
    return f"failed (exit status {status})" if status else "ok"


def end(process):
    """End a step and its children; asv ends its own when it is interrupted, and only then."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
    finally:
        with contextlib.suppress(OSError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log):
    """Return the last lines that a step printed, without what tells whose machine it is."""
    text = log.read_text(errors="replace")
    for path, name in ((ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(path), name)
    node = platform.node()
    for word in filter(None, (node, node.split(".")[0], Path.home().name)):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "…", text)
    return [line.rstrip()[:200] for line in text.splitlines()[-SHOWN:]]


class Report:
    """Runs the steps of a report, and writes the report after each."""

    def __init__(self, machine, steps):
        self.machine, self.steps = machine, steps
        self.logs, self.folder = LOGS / machine, RESULTS / machine
        self.logs.mkdir(parents=True, exist_ok=True)
        self.happened = {step.name: ("not run", 0, []) for step in steps}

    def take(self, minutes=MINUTES):
        """Take the steps until so many minutes are over."""
        deadline = time.monotonic() + 60 * minutes
        for number, step in enumerate(self.steps, 1):
            title = f"{number} of {len(self.steps)}, {step.name}"
            begin, log = time.monotonic(), self.logs / f"{step.name.replace(' ', '-')}.log"
            seconds = min(60 * step.minutes, deadline - begin)
            if seconds <= 0:
                self._note(step, "not run, no time was left", 0, [])
                continue
            print(f"{title}, at most {seconds / 60:.0f} min, see {log}", flush=True)
            self._note(step, "interrupted", 0, [])  # unless it comes to an end
            what = run(step, seconds, log)
            self._note(step, what, time.monotonic() - begin, tail(log))
            print(f"{title}: {what}", flush=True)

    def _note(self, step, what, seconds, lines):
        """Write down what happened in a step."""
        self.happened[step.name] = what, round(seconds), lines
        write_text(self.folder / "report.md", self.text())

    def text(self):
        """Return the report as Markdown."""
        about = MachineCollection.load(self.machine)
        versions = [f"{name} {metadata.version(name)}" for name in ("pagedkv", "mlx", "numpy")]
        lines = [
            f"# {self.machine}\n",
            f"{about['cpu']}, {about['num_cpu']} cores, {about['ram']}, {about['os']}, "
            f"Python {platform.python_version()}, {', '.join(versions)}, "
            f"commit {git('rev-parse', 'HEAD')[:8]}."
            "\n\n| step | what happened | seconds |\n| --- | --- | --: |",
            *(f"| {name} | {what} | {took} |" for name, (what, took, _) in self.happened.items()),
        ]
        for name, (_, _, said) in self.happened.items():
            if said:
                lines += [f"\n## {name}\n", *("    " + line for line in said)]
        return "\n".join(lines) + "\n"


def pull_request(machine):
    """Return the commands that make a branch of a machine's results, one a line."""
    folder, quoted = (shlex.quote(text) for text in (f"results/{machine}", f"Results of {machine}"))
    return (
        f"git add --force {folder}\n"
        f"git commit --message {quoted} {folder}\n"
        f"git push origin HEAD:refs/heads/{shlex.quote(machine)}\n"
    )


def main():
    """Parse the command line; exit 130 if interrupted: a report of failures is a report, too."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("--machine", help="name in results/ (default: of chip and memory)")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # some shells have SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        check_history()
        machine = args.machine or default_name()
        record_machine(machine)
        report = Report(machine, steps_on(machine))
        report.take()
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted: results/{machine}/report.md tells of the steps so far")
        return 130
    print("\n" + report.text().split("\n## ")[0])
    print(
        f"results/{machine} is the report, and all that leaves this machine. Failures are worth as "
        "much as numbers.\nA pull request of it, from a clone of your fork:\n\n"
        + textwrap.indent(pull_request(machine), "    ")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
