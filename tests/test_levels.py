"""Steps of a series by its own threshold: simulated nights of every kind of noise, seeded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.levels import levels
from tracking.noise import Noise, Threshold

SERIES = "overhead.Auto.ratio_vs_contiguous(1, 1024, 32)"
TENTH = Threshold(1.1, "series")
SELDOM = Threshold(1.1, "series", (1.01, 1.3))  # identical code once differed by 30%


@pytest.mark.parametrize(
    ("nights", "threshold", "bounds"),
    [
        ([], TENTH, []),
        ([1.0], TENTH, [(0, 1)]),
        ([1.0, 1.09], TENTH, [(0, 2)]),
        ([1.0, 1.11], TENTH, [(0, 1), (1, 2)]),
        ([1.0] * 6 + [1.07] * 3, TENTH, [(0, 6), (6, 9)]),
        ([1.0] * 6 + [1.07], TENTH, [(0, 7)]),
        ([1.0] * 50 + [1.04] * 50, TENTH, [(0, 100)]),  # less than half of the threshold
        ([1.0] * 4 + [1.2] + [1.0] * 4, TENTH, [(0, 9)]),  # it went away
        ([2.0, 2.0, 1.0, 1.0, 3.0, 3.0], TENTH, [(0, 2), (2, 4), (4, 6)]),
        ([1.0, 1.15, 1.0, 1.15, 1.0, 1.15], TENTH, [(0, 6)]),  # two modes
        ([1.0] * 5 + [1.25], SELDOM, [(0, 6)]),
        ([1.0] * 5 + [1.35], SELDOM, [(0, 5), (5, 6)]),
        ([1.0] * 5 + [1.25] * 2, SELDOM, [(0, 5), (5, 7)]),
    ],
)
def test_levels(nights, threshold, bounds):
    found = levels(nights, threshold)
    assert [level[:2] for level in found] == bounds
    medians = [np.exp(np.median(np.log(nights[start:end]))) for start, end in bounds]
    assert [level[2] for level in found] == pytest.approx(medians)


# Of powers of two the logarithms are exact, so that cuts which are equally good stay so.
@given(st.lists(st.integers(-6, 6).map(lambda power: 2.0**power), max_size=30), st.floats(1.01, 16))
def test_levels_are_of_all_nights_and_turn_with_the_series(nights, factor):
    threshold = Threshold(factor, "series")
    found, turned = (levels(each, threshold) for each in (nights, [1 / night for night in nights]))
    assert [level[:2] for level in turned] == [level[:2] for level in found]
    bounds = [0, *(end for _, end, _ in found)]
    assert [start for start, _, _ in found] == bounds[:-1]
    assert bounds[-1] == len(nights)


def normal(rng, size):
    return rng.normal(0, 0.01, size)


def heavy(rng, size):
    return 0.006 * rng.standard_t(3, size)


def seldom_slow(rng, size):
    return rng.normal(0, 0.01, size) + 0.1 * (rng.random(size) < 0.1)


def worse(nights, threshold):
    """Whether the last level is above an earlier one."""
    values = [value for _, _, value in levels(np.exp(nights), threshold)]
    return values[-1] > min(values)


@pytest.mark.parametrize(
    ("draw", "alarms", "tenth", "twentieth"),
    [(normal, 0.01, 0.98, 0.97), (heavy, 0.03, 0.95, 0.95), (seldom_slow, 0.06, 0.25, 0.4)],
)
def test_weeks_of_nights(draw, alarms, tenth, twentieth):
    """A week of identical code; 10% on the next night; 5% for three nights. Noise of 20 runs."""
    rng = np.random.default_rng(0)
    called = []
    for _ in range(400):
        runs = np.exp(draw(rng, 20))
        threshold = Noise((SERIES, "code", run) for run in runs).threshold(SERIES)
        week, next_night, three = draw(rng, 7), draw(rng, 8), draw(rng, 10)
        next_night[-1:] += np.log(1.1)
        three[-3:] += np.log(1.05)
        called.append([worse(nights, threshold) for nights in (week, next_night, three)])
    said = np.mean(called, axis=0)
    assert said[0] <= alarms
    assert said[1] >= tenth
    assert said[2] >= twentieth
