import math
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from benchmarks.common import workload
from pagedkv.attention import auto, cut, findings
from tools import tune


@pytest.mark.parametrize(
    ("fused", "rows", "expected"),
    [
        ([0.8, 0.7], [2.0, 3.0], [(math.inf, "fused")]),
        ([1.04, 0.7], [1.0, 3.0], [(math.inf, "fused")]),  # within the slack
        ([1.2, 0.7], [1.0, 3.0], [(1024.0, "rows"), (math.inf, "fused")]),
        ([1.2, 1.2], [1.0, 1.0], [(math.inf, "rows")]),
        ([math.inf, 0.7], [1.0, 3.0], [(1024.0, "rows"), (math.inf, "fused")]),
    ],
)
def test_thresholds(fused, rows, expected):
    over = {"fused": fused, "rows": rows}
    assert tune.thresholds([1024, 4096], over) == expected
    backwards = {name: values[::-1] for name, values in over.items()}
    assert tune.thresholds([4096, 1024], backwards) == expected


def test_a_ratio_is_that_of_the_call_to_contiguous_attention():
    cell = workload(3, 64, 32, num_layers=2)
    attend = tune._named("gather_rows")(cell)
    layers = []

    def counted(queries, keys, values):
        layers.append(keys)
        return attend(queries, keys, values)

    assert 0 < tune.over_contiguous(cell, counted, 3) < 100
    assert len(layers) == 2 * 4  # a warm-up and three samples of two layers


@pytest.mark.skipif(mx.default_device().type == mx.cpu, reason="the kernels need a GPU")
def test_the_constants_are_those_of_the_candidate():
    cell = workload(3, 64, 32, num_layers=2)
    base = cut.TUNING[tune.backend_of(mx.default_device())]
    attend = tune._planned(tune.plan_of(cell, replace(base, warps=(4,))))
    layer = cell.layers[0]
    expected = tune._named("fused")(cell)(cell.queries, layer.key_pool, layer.value_pool)
    got = attend(cell.queries, layer.key_pool, layer.value_pool)
    assert mx.allclose(got, expected, rtol=1e-2, atol=1e-3).item()


def test_candidates_change_one_constant_or_more():
    base = cut.TUNING["cuda"]
    tunings = list(tune.candidates(base).values())
    assert base in tunings
    assert len(set(tunings)) == len(tunings) == 36


def test_what_auto_is_for_a_cell_is_measured_where_nobody_has(monkeypatch):
    found = findings.Finding("gather_rows", {"fused": 2.0, "gather_rows": 1.0})
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", "1")
    monkeypatch.setattr(auto, "gpu_name", lambda device: "A GPU of nobody")
    monkeypatch.setattr(auto, "refusal", lambda name, call: None)
    monkeypatch.setattr(auto, "find", lambda *arguments: found)
    told = tune.auto_of(workload(3, 64, 32, num_layers=1))
    assert (
        told == "auto is gather_rows, measured here by this process: fused 2 ms, gather_rows 1 ms"
    )


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="there is a GPU here")
def test_a_cpu_has_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit, match="expected a GPU"):
        tune.main()


@pytest.mark.skipif(mx.default_device().type == mx.cpu, reason="the kernels need a GPU")
def test_tuning_prints_what_to_commit(monkeypatch, capsys):
    options = ["--batches", "1", "--contexts", "256"]
    monkeypatch.setattr(sys, "argv", ["tune", *options, "--samples", "3"])
    assert tune.main() == 0
    printed = capsys.readouterr().out
    assert "TUNING['" in printed
    assert "AUTO['" in printed
