import math
import sys

import mlx.core as mx
import pytest

from pagedkv import tune


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
    ratios = {"fused": fused, "rows": rows}
    assert tune.thresholds([1024, 4096], ratios) == expected
    backwards = {name: values[::-1] for name, values in ratios.items()}
    assert tune.thresholds([4096, 1024], backwards) == expected


def test_a_cell_is_what_it_says(monkeypatch):
    monkeypatch.setattr(tune, "LAYERS", (2, 2))
    cell = tune.Cell.make(3, 64)
    assert len(cell.contiguous) == len(cell.paged) == 2
    assert cell.contiguous[0][0].shape == (3, 8, 64, 128)
    assert cell.step.lens.tolist() == [64] * 3
    taken = cell.step.block_tables.reshape(-1).tolist()
    assert len(set(taken)) == 6
    attend = tune._named("gather_rows")(cell)
    assert 0 < cell.over_contiguous(attend, 3) < 100


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="there is a GPU here")
def test_a_cpu_has_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit, match="expected a GPU"):
        tune.main()


@pytest.mark.skipif(mx.default_device().type == mx.cpu, reason="the kernels need a GPU")
def test_tuning_prints_what_to_commit(monkeypatch, capsys):
    options = ["--batches", "1", "--contexts", "256", "--warps", "4", "--groups", "64"]
    monkeypatch.setattr(sys, "argv", ["tune", *options, "--samples", "3"])
    assert tune.main() == 0
    printed = capsys.readouterr().out
    assert "TUNING['" in printed
    assert "AUTO['" in printed
