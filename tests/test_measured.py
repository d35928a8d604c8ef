"""Whether a kernel is right and faster: what measuring finds, and what it warns of."""

import math
import re
import warnings

import mlx.core as mx
import numpy as np
import pytest
from cases import TOLERANCE
from trials import DEVICE, KIND, RIGHT, RIVALS, Machine, fails, fails_when_evaluated, new_process

import pagedkv
from pagedkv.attention import measured
from pagedkv.attention.findings import Finding
from pagedkv.attention.measured import Trial, error_between, in_turns, measure

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("fused", "rows", "path"), [(1, 2, "fused"), (2, 1, "gather_rows"), (1, 1, "fused")]
)
def test_the_faster_is_used(machine, fused, rows, path):
    machine.seconds = {"fused": fused / 1000, "gather_rows": rows / 1000}
    assert machine.measure() == Finding(path, {"fused": fused, "gather_rows": rows})


def test_calls_are_timed_in_turns_after_warming_up(machine):
    machine.outputs["fused"] = fused = [RIGHT + sample for sample in range(11)]
    seconds = iter([9.0, 9.0, 1, 1, 1, 1, 1, 1, 1, 1, 9.0])  # compiling, and a stall

    def attend():
        machine.order.append("fused")
        machine.now += next(seconds) / 1000
        return fused[machine.order.count("fused") - 1]

    outputs, times = in_turns({"fused": attend, "gather_rows": machine.call("gather_rows")})
    assert machine.order == ["fused", "gather_rows"] * 11
    assert times == pytest.approx({"fused": 0.001, "gather_rows": 0.002})
    assert all(a is b for a, b in zip(outputs["fused"], fused, strict=True))


def test_long_calls_are_made_less_often(machine):
    machine.seconds = {"fused": 0.5, "gather_rows": 0.7}
    assert machine.measure().path == "fused"
    assert machine.order.count("fused") == measured.WARMUPS + measured.FEWEST


def test_a_path_is_not_timed_by_what_its_inputs_took(machine):
    """They are evaluated before the first call."""
    trial = machine.trial()
    evaluated = []
    inputs = [mx.ones(3) * 2]
    mx_eval = measured.mx.eval
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            measured.mx, "eval", lambda *a: (evaluated.append((a, machine.now)), mx_eval(*a))
        )
        measure(RIVALS, Trial(trial.attend, trial.exact, inputs))
    assert evaluated[0][0][0] is inputs[0]
    assert evaluated[0][1] == 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rounding_is_not_wrong(machine, dtype):
    machine.outputs = {name: RIGHT.astype(dtype) for name in RIVALS}
    machine.outputs["fused"] = (RIGHT * (1 + TOLERANCE[dtype] / 2)).astype(dtype)
    machine.exact = None  # not asked
    assert machine.measure().path == "fused"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (RIGHT * 1.1, r"fused's results differ by 0\.1 of their norm, gather_rows's are right"),
        (mx.concatenate([RIGHT[:1], RIGHT[1:] * 2]), "differ by 1 of their norm"),
        (RIGHT * math.nan, "fused's results are not finite"),
        (mx.where(RIGHT[1, 2, 0, 3] == RIGHT, math.inf, RIGHT), "results are not finite"),
        (fails("it does not compile"), "fused raised RuntimeError: it does not compile"),
        (RIGHT[:, :2], "fused raised ValueError"),
    ],
    ids=["factor", "one sequence", "NaN", "one infinite", "at build", "shape"],
)
def test_a_wrong_kernel_is_not_used_however_fast(machine, wrong, message):
    machine.outputs["fused"] = wrong
    finding = machine.measure()
    assert finding.path == "gather_rows"
    assert re.search(message, finding.fault)


@pytest.mark.own_process
def test_a_kernel_that_fails_when_it_is_evaluated(machine, tmp_path):
    machine.outputs["fused"] = fails_when_evaluated(tmp_path)
    finding = machine.measure()
    assert finding.path == "gather_rows"
    assert finding.fault.startswith("fused raised RuntimeError: [read]")


def test_a_kernel_that_is_wrong_now_and_then(machine):
    outputs = iter([RIGHT] * 7 + [RIGHT * 2] + [RIGHT] * 3)
    machine.outputs["fused"] = lambda: next(outputs)
    assert "differ by 1 " in machine.measure().fault


def test_a_gather_that_rounds_more_than_the_kernel(machine):
    machine.outputs["gather_rows"] = RIGHT * 1.1
    assert machine.measure().path == "fused"
    machine.outputs["fused"] = RIGHT * 1.3
    assert "differ by 0.3 of their norm" in machine.measure().fault
    machine.exact = RIGHT * math.nan
    assert "expected numbers to compare with" in machine.measure().undecided


def test_a_long_message_of_a_compiler_is_cut(machine):
    machine.outputs["fused"] = fails("x" * 10**6)
    assert len(machine.measure().fault) < 3000


@pytest.mark.own_process
def test_inputs_that_cannot_be_evaluated_decide_nothing(machine, cache_folder, tmp_path):
    broken = fails_when_evaluated(tmp_path)
    trial = machine.trial()
    finding = measure(RIVALS, Trial(trial.attend, trial.exact, [broken]))
    assert finding.path is None
    assert finding.undecided.startswith("RuntimeError: [read]")
    assert machine.order == []


def test_inside_of_compile_nothing_is_decided(machine):
    found = []

    def step(x):
        trial = machine.trial()
        found.append(measure(RIVALS, Trial(trial.attend, trial.exact, [x])))
        return x + 1

    mx.eval(mx.compile(step)(mx.zeros(2)))
    assert "during function transformations" in found[0].undecided


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (RIGHT * 0, "ValueError: expected numbers to compare with, got only zeros"),
        (RIGHT * math.nan, "ValueError: expected numbers to compare with"),
        (fails("no memory"), "RuntimeError: no memory"),
    ],
    ids=["zero", "NaN", "raises"],
)
def test_a_gather_that_says_nothing_decides_nothing(machine, cache_folder, output, message):
    machine.outputs["gather_rows"] = output
    finding = machine.find()
    assert (finding.path, finding.ms, finding.fault) == (None, {}, "")
    assert finding.because.startswith(f"the package's choice, not measured here: {message}")
    assert "fused" not in machine.order
    machine.find()
    assert machine.trials == 2  # another time there may be something
    new_process()
    machine.find()
    assert machine.trials == 3
    assert not cache_folder.exists()


def test_sequences_that_say_nothing_are_left_out():
    expected = np.array([[1.0, 2.0], [0.0, 0.0], [math.nan, 1.0]])
    assert error_between(np.array([[1.0, 2.0], [5.0, 5.0], [5.0, 5.0]]), expected) == 0
    assert error_between(expected[[0, 1, 1]] * 2, expected) == 1
    assert error_between(expected[::-1], expected) == math.inf


def test_random_numbers_go_on_as_if_nothing_happened(machine):
    mx.random.seed(7)
    before = mx.array(mx.random.state[0])
    machine.measure()
    assert mx.array_equal(mx.random.state[0], before).item()


def test_a_wrong_kernel_is_said_once_and_remembered(machine, cache_folder):
    machine.outputs["fused"] = RIGHT * 1.1
    with pytest.warns(RuntimeWarning, match="does not use a kernel that failed here") as said:
        machine.find()
    text = str(said[0].message)
    for part in (
        "fused's results differ by 0.1 of their norm",
        "Such calls take gather_rows instead. Please report this message",
        f"Device: {DEVICE}, MLX {mx.__version__}, pagedkv {pagedkv.__version__}, sources ",
        f"Call: {KIND}.",
        f"kept in {cache_folder}/measured.json",
    ):
        assert part in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.find()
        new_process()
        finding = machine.find()
    assert finding.path == "gather_rows"
    assert re.match(r"measured here on .*: fused's results differ by 0.1", finding.because)
    assert machine.trials == 1


def test_a_warning_that_is_an_error_is_raised_once(machine):
    machine.outputs["fused"] = fails("no such instruction")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="no such instruction"):
            machine.find()
        assert machine.find().path == "gather_rows"
