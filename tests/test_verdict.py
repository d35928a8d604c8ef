"""The one verdict of a comparison: what, by how much, in how many cells, how sure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.changes import Change, verdict
from tracking.compare import markdown
from tracking.noise import Noise
from tracking.results import Value

GUESSED = Noise()
VALUES = st.floats(0.1, 10) | st.just(0.0)


def cell(before, after, *, name="overhead.Auto.ratio_x(1)", better="smaller", significant=True):
    return Change(name, Value(before), Value(after), significant, 20, better)


SAME, WORSE, BETTER = cell(1.0, 1.0), cell(1.0, 1.25), cell(1.0, 0.8)


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        ([SAME, SAME], "unchanged: 2 cells; thresholds of 2 cells are a guess"),
        ([WORSE, SAME], "worsened: 1 cell by 25.0% of 2"),
        ([BETTER, SAME], "improved: 1 cell by 25.0% of 2"),
        ([WORSE, cell(1.0, 1.11), SAME], "worsened: 2 cells by 17.8% (11.0% to 25.0%) of 3"),
        ([WORSE, BETTER], "mixed: worsened 1 cell by 25.0%, improved 1 cell by 25.0% of 2"),
        ([cell(1.0, 1.25, better="larger")], "improved: 1 cell by 25.0% of 1"),
        ([cell(1.0, 0.8, better="larger")], "worsened: 1 cell by 25.0% of 1"),
        ([cell(1.0, None), SAME], "1 failed; unchanged: 1 cells"),
        ([cell(1.0, math.nan)], "1 failed; unchanged: 0 cells; nothing was compared"),
        ([cell(None, 1.0)], "unchanged: 0 cells; nothing was compared"),
        ([], "unchanged: 0 cells; nothing was compared"),
    ],
)
def test_one_line_says_what_changed(compared, said):
    assert str(verdict(compared, GUESSED)).startswith(said)


COUNTED = "scheduler.Allocated.track_allocated(1)"


@pytest.mark.parametrize(
    ("before", "after", "better", "word", "ratio", "said"),
    [
        (0.0, 0.0, "smaller", "unchanged", 1.0, "unchanged: 1 cells"),
        (0, 5, "smaller", "worsened", math.inf, "worsened: 1 cell by ∞ of 1"),
        (5, 0, "smaller", "improved", 0.0, "improved: 1 cell by ∞ of 1"),
        (0, 5, "larger", "improved", math.inf, "improved: 1 cell by ∞ of 1"),
        (5, 0, "larger", "worsened", 0.0, "worsened: 1 cell by ∞ of 1"),
        (-0.0, 0.0, "larger", "unchanged", 1.0, "unchanged: 1 cells"),
        (-1.0, 2.0, "smaller", "worsened", math.inf, "worsened: 1 cell by ∞ of 1"),
        (-1.0, -2.0, "smaller", "unchanged", 1.0, "unchanged: 1 cells"),
        (1e-300, 1e100, "smaller", "worsened", math.inf, "worsened: 1 cell by ∞ of 1"),
    ],
)
def test_from_nothing_to_something_is_without_end(before, after, better, word, ratio, said):
    for name in (COUNTED, "overhead.Auto.ratio_x(1)"):
        change = cell(before, after, name=name, better=better)
        assert change.verdict(GUESSED) == word
        assert change.ratio.value == ratio
        assert str(verdict([change], GUESSED)).startswith(said)
    assert "worsened" in markdown([change], GUESSED, before="a", after="b", about="")


def test_an_end_of_an_interval_may_be_nothing():
    from_, to = Value(1.0, 0.0, 2.0), Value(2.0, 1.0, 3.0)
    change = Change("overhead.Auto.ratio_x(1)", from_, to, True, 20)
    assert (change.ratio.low, change.ratio.high) == (0.5, math.inf)
    assert change.ratio.show(interval=True) == "2.00"


def test_without_end_beside_others():
    compared = [cell(0.0, 1.0), WORSE, SAME]
    assert str(verdict(compared, GUESSED)).startswith("worsened: 2 cells by ∞ (25.0% to ∞) of 3")


def test_how_sure_it_is():
    values = [1.0, 1.01] * 5 + [1.15]
    quiet = Noise(("overhead.Auto.ratio_x(1)", "code", value) for value in values)
    assert quiet.threshold("overhead.Auto.ratio_x(1)").factor < 1.05
    sure = [verdict([cell(1.0, after)], quiet).sure for after in (1.25, 1.1, 1.0)]
    assert sure == [
        "0 of 55 changes of identical code were as large",
        "10 of 55 changes of identical code were as large",
        "changes of up to 4.1% are within the noise",
    ]
    assert verdict([WORSE], GUESSED).sure == "how sure is not known, the noise is not recorded"
    counted = cell(100, 103, name="scheduler.Instructions.track_instructions(1)", significant=False)
    assert verdict([counted, SAME], GUESSED).sure == "certain, what is counted has no noise"


@given(
    st.lists(
        st.builds(
            cell,
            VALUES,
            VALUES,
            better=st.sampled_from(["smaller", "larger"]),
            significant=st.booleans(),
        ),
        max_size=12,
    )
)
def test_a_verdict_agrees_with_its_cells(compared):
    said = verdict(compared, GUESSED)
    words = {change.verdict(GUESSED) for change in compared} - {"unchanged"}
    assert said.word == ("mixed" if len(words) == 2 else next(iter(words), "unchanged"))
    assert said.compared == len(compared)
    for side in (said.worsened, said.improved):
        if side:
            assert 1 < side.least <= side.mean * (1 + 1e-9)
            assert side.mean <= side.most * (1 + 1e-9)
    assert "\n" not in str(said)


@given(st.lists(st.tuples(VALUES, VALUES), max_size=6))
def test_turned_around_it_says_the_opposite(pairs):
    there, back = ([cell(*pair[::step]) for pair in pairs] for step in (1, -1))
    opposite = {"worsened": "improved", "improved": "worsened"}
    word = verdict(there, GUESSED).word
    assert verdict(back, GUESSED).word == opposite.get(word, word)
