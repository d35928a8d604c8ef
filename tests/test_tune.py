import math
import sys

import mlx.core as mx
import pytest

from tools import tune

CPU = mx.default_device().type == mx.cpu


@pytest.mark.parametrize(
    ("fused", "rows", "expected"),
    [
        ([0.8, 0.7], [2.0, 3.0], [(math.inf, "fused")]),
        ([1.04, 0.7], [1.0, 3.0], [(math.inf, "fused")]),  # within the slack
        ([1.2, 0.7], [1.0, 3.0], [(1024.0, "rows"), (math.inf, "fused")]),
        ([math.inf, 0.7], [1.0, 3.0], [(1024.0, "rows"), (math.inf, "fused")]),
    ],
)
def test_thresholds(fused, rows, expected):
    over = {"fused": fused, "rows": rows}
    assert tune.thresholds([1024, 4096], over) == expected
    backwards = {name: values[::-1] for name, values in over.items()}
    assert tune.thresholds([4096, 1024], backwards) == expected


@pytest.mark.skipif(CPU, reason="the kernels need a GPU")
def test_tuning_prints_what_to_commit(monkeypatch, capsys):
    options = ["--batches", "1", "--contexts", "256"]
    monkeypatch.setattr(sys, "argv", ["tune", *options, "--samples", "3"])
    tune.main()
    printed = capsys.readouterr().out
    assert "TUNING['" in printed
    assert "AUTO['" in printed
