"""What people type and get wrong: a sentence says what to do, and nothing was changed."""

import subprocess
import sys

import pytest

from tracking.repository import ROOT


def typed(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("machine", [[], ["MACHINE=nosuch"], ["MACHINE="]])
def test_recording_a_machine_that_has_no_results(machine):
    done = typed("make", "--no-print-directory", "record", *machine)
    assert done.returncode == 2
    assert done.stdout.startswith("say whose results: make record MACHINE=name, a folder in")
    assert " linux-2core-xeon/" in done.stdout
    assert "git add" not in done.stdout


@pytest.mark.parametrize(
    "module", ["tracking.history", "tracking.doctor", "tools.report", "website.overhead"]
)
def test_outside_of_the_environment(module):
    done = typed(sys.executable, "-S", "-m", module)  # without what is installed
    assert done.returncode == 1
    assert done.stderr == (
        f"asv is not installed for {sys.executable}: run this with .venv/bin/python, "
        "which `make test` and `make bench` set up\n"
    )
