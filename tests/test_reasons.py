"""asv's own results, with the plugin that keeps reasons, and without."""

import math
from types import SimpleNamespace

import pytest
from asv.results import Results

from tracking import reasons
from tracking.results import _values


@pytest.fixture(params=["with the plugin", "without"])
def add_result(request):
    plain = asvs_own()
    return reasons.keep_reasons(plain) if request.param == "with the plugin" else plain


def asvs_own():
    """asv's own, whether or not a test has loaded the plugin."""
    return getattr(Results.add_result, "__wrapped__", Results.add_result)


def outcome(samples, numbers):
    return SimpleNamespace(
        result=[0.0] * len(samples),
        samples=samples,
        number=numbers,
        stderr="",
        errcode=0,
        profile=None,
    )


def test_a_cell_that_is_not_asked_for_keeps_its_reason(add_result, request):
    nan = math.nan
    benchmark = {"name": "a.B.time_b", "version": "1", "params": [["1", "2", "3", "4"]]}
    results = Results({"machine": "box"}, {}, "c0ffee", 0, "3.12", "env", {})
    # 2 lacks it, 3 is too slow; then 1 alone is measured again, and 2 found too large.
    first = outcome([[1.0], [nan], [nan], [5.0]], [1, -1, -2, 1])
    add_result(results, benchmark, first, selected_idx={0, 1, 2, 3})
    assert [v.why for v in _values(results, "a.B.time_b").values()][1:3] == ["lacks", "too slow"]
    again = outcome([[2.0], [nan], None, None], [1, -3, None, None])
    again.result = [0.0, 0.0, nan, nan]
    add_result(results, benchmark, again, selected_idx={0, 1})
    values = list(_values(results, "a.B.time_b").values())
    assert [value.value for value in values[::3]] == [2.0, 5.0]
    kept = "too slow" if "with the plugin" in request.node.name else "n/a"
    assert [value.why for value in values[1:3]] == ["too large", kept]
    # A new version of the benchmark begins anew.
    add_result(results, {**benchmark, "version": "2"}, again, selected_idx={0, 1})
    assert [value.why for value in _values(results, "a.B.time_b").values()][2] == "n/a"
