"""Calls that take as long as a test says, on a machine that only they move the clock of."""

import os

import mlx.core as mx
import numpy as np

from pagedkv.attention import findings, measured
from pagedkv.attention.measured import Trial, find, measure

RIVALS = "fused", "gather_rows"
DEVICE, KIND = "A GPU of nobody", "float16 D=64"
RIGHT = mx.array(np.random.default_rng(0).standard_normal((2, 4, 1, 8), dtype=np.float32))


def new_process():
    """Forget what this process has found and read."""
    findings.findings.cache_clear()
    findings.environment.cache_clear()


class Machine:
    """Calls by path that take a scripted time; counts them."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(measured, "perf_counter", lambda: self.now)
        self.outputs = {"fused": RIGHT, "gather_rows": RIGHT}
        self.seconds = {"fused": 0.001, "gather_rows": 0.002}
        self.exact = RIGHT
        self.order, self.trials = [], 0

    def call(self, name):
        def attend():
            self.order.append(name)
            self.now += self.seconds[name]
            output = self.outputs[name]
            return output() if callable(output) else output

        return attend

    def trial(self):
        self.trials += 1
        calls = {name: self.call(name) for name in self.outputs}
        return Trial(calls, lambda: self.exact, [mx.ones(2) * 2])

    def measure(self):
        return measure(RIVALS, self.trial())

    def find(self, kind=KIND, device=DEVICE):
        return find(device, kind, RIVALS, self.trial)


def fails(message):
    def output():
        raise RuntimeError(message)

    return output


def fails_when_evaluated(tmp_path):
    """An array that can be built and not be evaluated."""
    path = tmp_path / "short.npy"
    np.save(path, np.zeros((2, 4, 1, 8), np.float32))
    array = mx.load(str(path))
    os.truncate(path, 150)
    return array
