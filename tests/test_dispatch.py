"""The dispatch table against recorded results: `auto` is never a path that another one beats."""

import mlx.core as mx
import pytest

from benchmarks import overhead
from benchmarks.common import DTYPE, HEAD_DIM, KV_HEADS, QUERY_HEADS, SCALE
from pagedkv import DECODE_PATHS, Layout
from pagedkv.attention.inputs import Call
from pagedkv.attention.paths import choose
from tracking.results import ATTENTION, load

# Machine -> its device, the commit that measured every path, and what `auto` was there.
RECORDED = {
    "linux-2core-xeon": (mx.cpu, "0b9e8013", "gather_rows_grouped"),
    "h200": (mx.gpu, "0b9e8013", "fused"),
}
# The alternatives that read the layout of the cache's pools, by their classes in `overhead`.
OTHERS = [
    name.title().replace("_", "")
    for name, path in DECODE_PATHS.items()
    if path.layout is Layout.BLOCK_MAJOR
]
SLACK = 1.05


@pytest.mark.parametrize("machine", RECORDED)
def test_no_path_beats_auto_by_more_than_5_percent(machine, monkeypatch):
    device, commit, path = RECORDED[machine]
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    table = load(machine, commit)
    compared = 0
    for cell, auto in table[ATTENTION].items():
        batch, context, block_size = (int(x) for x in cell)
        queries = batch, QUERY_HEADS, 1, HEAD_DIM
        pool = 2 * batch * context // block_size, block_size, KV_HEADS, HEAD_DIM
        call = Call(device, "auto", SCALE, queries, pool, pool, DTYPE, DTYPE, DTYPE)
        assert choose(call, batch * context) == path, (
            "the table was changed: measure it and record the results"
        )
        for name in OTHERS:
            other = table.get(f"overhead.{name}.ratio_vs_contiguous", {}).get(cell)
            if auto.known and other is not None and other.known:
                apart = auto.low > other.high  # the confidence intervals do not overlap
                assert not (apart and auto.value > SLACK * other.value), (cell, name)
                compared += 1
    assert compared >= 8


def test_every_path_is_measured():
    for name in DECODE_PATHS:
        assert getattr(overhead, name.title().replace("_", "")).path == name
