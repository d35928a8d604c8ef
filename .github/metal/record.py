"""A pytest plugin: write down how each test ended and which kernels it launched, as lines of JSON.

METAL_RECORD=record.jsonl PYTHONPATH=.github/metal pytest -p record tests/test_fused.py
"""

import json
import os
import re

import mlx.core as mx
import pytest

LARGEST = 10**9  # bytes that a test may hold: a hosted Mac has 5 GB for everything
NOT_COMPILED = re.compile(r"Unable to (build metal library|load kernel)|Compilation failed")
launched, reports = set(), []


def write(**line):
    """Append a line to the record."""
    with open(os.environ["METAL_RECORD"], "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_sessionstart():
    """Watch the kernels that the package makes."""
    from pagedkv import kernels  # not before conftest has set MLX's environment
    from pagedkv.attention import fused

    make = kernels.metal_kernel

    def metal_kernel(body, constants, *others):
        kernel = make(body, constants, *others)
        name = " ".join([body, *(f"{name}={value}" for name, value in constants)])

        def launch(**arguments):
            launched.add(name)
            return kernel(**arguments)

        return launch

    kernels.metal_kernel = metal_kernel
    write(head_dims=fused.HEAD_DIMS)


@pytest.fixture(autouse=True)
def _small_buffers():
    mx.reset_peak_memory()
    yield
    held = mx.get_peak_memory()
    assert held <= LARGEST, f"expected a test to hold {LARGEST:,} bytes at most, got {held:,}"


def pytest_runtest_logreport(report):
    """Write a test down when it is over."""
    reports.append(report)
    if report.when == "teardown":
        outcomes = {each.outcome: str(each.longrepr) for each in reports}
        [outcome] = [o for o in ("failed", "skipped", "passed") if o in outcomes][:1]
        if NOT_COMPILED.search(outcomes.get("failed", "")):
            outcome = "did not compile"
        write(test=report.nodeid, outcome=outcome, kernels=sorted(launched))
        launched.clear()
        reports.clear()
