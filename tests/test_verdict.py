"""The one verdict of a comparison: what, by how much, in how many cells, how sure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.changes import Change, verdict
from tracking.noise import Noise
from tracking.results import Value

GUESSED = Noise()


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
            st.floats(0.1, 10),
            st.floats(0.1, 10),
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


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), max_size=6))
def test_turned_around_it_says_the_opposite(pairs):
    there, back = ([cell(*pair[::step]) for pair in pairs] for step in (1, -1))
    opposite = {"worsened": "improved", "improved": "worsened"}
    word = verdict(there, GUESSED).word
    assert verdict(back, GUESSED).word == opposite.get(word, word)
