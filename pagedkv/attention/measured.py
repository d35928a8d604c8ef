"""Measurements on an unmeasured GPU: whether a kernel is right, and whether it is faster.

The kernel and a gather that is known to be right both compute the caller's own call. No data of the
caller changes.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pagedkv.attention.findings import Finding, environment, findings, store

# Relative error of one sequence's output. Of float32 too, since MLX may multiply it in TF32, which
# has the digits of float16; a kernel that is wrong is wrong by more.
TOLERANCE: Mapping[mx.Dtype, float] = {mx.float32: 2e-3, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
WARMUPS, SAMPLES = 2, 9  # calls of each; the first of all compiles
FEWEST, ENOUGH = 3, 1.0  # samples that do once all of them took so many seconds
LONGEST = 2000  # characters of an error: compilers quote what they compile


@dataclass(frozen=True)
class Trial:
    """Two ways to compute a call, with the caller's own arrays.

    Attributes
    ----------
    attend : mapping of str to callable
        By name, what builds the call and returns its output, lazy, shape [B, Hq, Q, D]. It may
        prepare when it is first called.
    exact : callable
        The gather's output in float32. Asked only if the two outputs differ.
    inputs : sequence of mx.array
        Inputs of the call. They are evaluated first, so that their time is not measured.
    written : callable or None
        The output of the kernel where it also writes, if it does, into copies. It raises if
        something else was written than should be.
    """

    attend: Mapping[str, Callable[[], mx.array]]
    exact: Callable[[], mx.array]
    inputs: Sequence[mx.array]
    written: Callable[[], mx.array] | None = None


def find(
    device: str, kind: str, rivals: tuple[str, str], make_trial: Callable[[], Trial]
) -> Finding:
    """Return what is known about calls of a kind, measured now if nothing is.

    A measurement waits for the inputs, compiles the kernel (5 s on CUDA, in every process that uses
    it) and makes 23 calls, or 11 where they take longer than a second together. Kinds have size
    classes by powers of two: a sequence that grows from 1k to 32k tokens is measured 5 times, and
    on this machine never again.

    Parameters
    ----------
    device : str
        The GPU's name.
    kind : str
        As from `kind_of`.
    rivals : tuple of (str, str)
        Names of the kernel on trial and of the gather that is known to be right.
    make_trial : callable
        Returns the trial; called only if it is needed.

    Returns
    -------
    Finding
        What was found out is the same for this process from then on, and kept for others in
        `cache_file`; what could not be is tried again.

    Warns
    -----
    RuntimeWarning
        If the kernel was tried now and is wrong, does not compile or raises. It is not used then.
    """
    where = environment(device)
    known = findings(where)
    finding = known.get(kind)
    if finding is None or finding.path not in (*rivals, None):
        finding = measure(rivals, make_trial())
        if finding.path:
            known[kind] = finding
        file = store(where, kind, finding) if finding.path else None
        if finding.fault:
            kept = f"kept in {file}" if file else "not kept, for the cache folder is not writable"
            warnings.warn(
                f"pagedkv does not use a kernel that failed here: {finding.fault}. Such calls take "
                f"{finding.path} instead. Please report this message to pagedkv's maintainers. "
                f"Device: {where}. Call: {kind}. This is {kept}",
                RuntimeWarning,
                stacklevel=2,
            )
    return finding


def measure(rivals: tuple[str, str], trial: Trial) -> Finding:
    """Compare and time a kernel and a gather.

    Parameters
    ----------
    rivals : tuple of (str, str)
        Names of the kernel on trial and of the gather that is known to be right.
    trial : Trial
        Both.

    Returns
    -------
    Finding
        The faster, the gather if the kernel is wrong, or neither if the inputs cannot be evaluated
        now (inside of `mx.compile`), the gather fails, or its output holds nothing to compare.
    """
    kernel, gather = rivals
    try:
        mx.eval(*trial.inputs)
        expected = _expected(trial.attend[gather])
    except Exception as failure:
        return Finding(None, {}, undecided=_quoted(failure))
    try:
        outputs, seconds = in_turns({name: trial.attend[name] for name in rivals})
        if trial.written:
            outputs[kernel].append(trial.written())
        rows = [_rows(output).reshape(expected.shape) for output in outputs[kernel]]
    except Exception as failure:
        return Finding(gather, {}, fault=f"{kernel} raised {_quoted(failure)}")
    tolerance = TOLERANCE[outputs[gather][0].dtype]
    error = max(error_between(row, expected) for row in rows)
    if error > tolerance:
        try:  # the gather itself may have rounded more than the kernel
            expected = _expected(trial.exact)
        except Exception as failure:
            return Finding(None, {}, undecided=_quoted(failure))
        error = max(error_between(row, expected) for row in rows)
    if error > tolerance:
        off = "are not finite" if math.isinf(error) else f"differ by {error:.2g} of their norm"
        fault = f"{kernel}'s results {off}, {gather}'s are right (rounding: up to {tolerance:.2g})"
        return Finding(gather, {}, fault=fault)
    ms = {name: float(f"{1000 * time:.4g}") for name, time in seconds.items()}
    return Finding(min(seconds, key=seconds.__getitem__), ms)


def in_turns(
    calls: Mapping[str, Callable[[], mx.array]],
) -> tuple[dict[str, list[mx.array]], dict[str, float]]:
    """Time calls one after the other, again and again, each evaluated by itself.

    Parameters
    ----------
    calls : mapping of str to callable
        By name, what returns a lazy array.

    Returns
    -------
    tuple of (dict, dict)
        By name: all outputs, and the median time of a call in seconds, building it included.
    """
    outputs: dict[str, list[mx.array]] = {name: [] for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    mx.synchronize()
    for sample in range(-WARMUPS, SAMPLES):
        for name, call in calls.items():
            begin = perf_counter()
            output = call()
            mx.eval(output)
            if sample >= 0:
                times[name].append(perf_counter() - begin)
            outputs[name].append(output)
        if sample + 1 >= FEWEST and sum(map(sum, times.values())) > ENOUGH:
            break
    return outputs, {name: statistics.median(samples) for name, samples in times.items()}


def error_between(rows: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return the largest relative error of a sequence's output.

    Parameters
    ----------
    rows, expected : ndarray
        Outputs, a sequence a row, shape [B, Hq * Q * D]. Sequences whose expected output is zero
        or not finite are left out; there is another one.

    Returns
    -------
    float
        Infinite where an output is not finite and should be.
    """
    usable = _comparable(expected)
    difference = np.linalg.norm(rows[usable] - expected[usable], axis=1)
    error = difference / np.linalg.norm(expected[usable], axis=1)
    return float(np.where(np.isfinite(error), error, math.inf).max())


def _expected(attend: Callable[[], mx.array]) -> NDArray[np.float64]:
    """Return a call's output, if there is something in it that another one can be held to."""
    rows = _rows(attend())
    if not _comparable(rows).any():
        raise ValueError("expected numbers to compare with, got only zeros, infinities and NaN")
    return rows


def _rows(output: mx.array) -> NDArray[np.float64]:
    return np.array(output.astype(mx.float32), dtype=np.float64).reshape(len(output), -1)


def _comparable(expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.array(np.isfinite(expected).all(axis=1) & expected.any(axis=1))


def _quoted(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"[:LONGEST]
