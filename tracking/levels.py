"""The levels of a series of nights: where it stepped from one to the next, if at all.

asv fits steps without knowing the noise of a series: in a simulation with normal noise of 1%, after
20 nights of identical code, it saw a step of 10% on the next night in 7 of 60 cases.
"""

import math

import numpy as np

# Of the threshold, however many nights there are on both sides: drift is not averaged away.
LEAST_SHARE = 0.5


def levels(values, threshold):
    """Split values above zero, one by night, into [(first night, one after the last, median)].

    Neighbours differ by more than the series' threshold, less the more nights there are on both
    sides, and the middle halves of their nights do not overlap: a night now and then in another
    mode makes no level. A night alone has to differ by more than identical code ever did.
    """
    return _split(np.log(values), 0, threshold) if len(values) else []


def _split(nights, start, threshold):
    for cut in _candidates(nights, threshold):
        if _apart(nights[:cut], nights[cut:], threshold):
            before, after = nights[:cut], nights[cut:]
            return _split(before, start, threshold) + _split(after, start + cut, threshold)
    return [(start, start + len(nights), float(np.exp(np.median(nights))))]


def _needed(before, after, threshold):
    """Return by how much so many nights have to differ from so many others, in logarithms."""
    alone = np.minimum(before, after) == 1
    share = np.maximum(LEAST_SHARE, np.sqrt((1 / before + 1 / after) / 2))
    return np.where(alone, math.log(threshold.largest), share * math.log(threshold.factor))


def _candidates(nights, threshold):
    """Return the cuts whose two means are far enough apart, the farthest first."""
    before = np.arange(1, len(nights))
    after, sums = len(nights) - before, np.cumsum(nights)
    steps = np.abs((sums[-1] - sums[:-1]) / after - sums[:-1] / before)
    beyond = steps / _needed(before, after, threshold)
    order = np.argsort(-beyond, kind="stable")
    return before[order[beyond[order] > 1]]


def _apart(before, after, threshold):
    low, high = sorted((before, after), key=np.median)
    step = np.median(high) - np.median(low)
    overlap = np.quantile(low, 0.75, method="higher") >= np.quantile(high, 0.25, method="lower")
    return not overlap and step > _needed(len(before), len(after), threshold)
