"""Finding the commit that made a series worse: in a repository, and with simulated noise."""

import contextlib
import math
import subprocess

import numpy as np
import pytest
from asv.util import UserError
from hypothesis import given
from hypothesis import strategies as st

from tracking import bisect, changes
from tracking.changes import Change
from tracking.noise import Noise
from tracking.results import Value

SERIES = "overhead.Auto.ratio_vs_contiguous(1, 1024, 32)"
NOISE = Noise()  # 5% for a ratio


def comparer(times, better="smaller"):
    """Compare commits by how long each takes; None is one without a number."""
    asked = []

    def compare(before, after):
        asked.append((before, after))
        values = [Value(math.nan if times[c] is None else times[c]) for c in (before, after)]
        return Change(SERIES, *values, True, 20, better)

    compare.asked = asked
    return compare


@given(st.data())
def test_the_first_worse_commit_is_found_in_few_comparisons(data):
    number = data.draw(st.integers(2, 70))
    first_bad = data.draw(st.integers(1, number - 1))
    noise = data.draw(st.lists(st.floats(0.99, 1.01), min_size=number, max_size=number))
    better = data.draw(st.sampled_from(["smaller", "larger"]))
    times = [n * (1.2 if i >= first_bad else 1.0) for i, n in enumerate(noise)]
    if better == "larger":
        times = [1 / time for time in times]
    compare = comparer(dict(enumerate(times)), better)
    found = bisect.bisect(list(range(number)), compare, NOISE)
    assert (found.last_good, found.first_bad, found.unknown) == (first_bad - 1, first_bad, [])
    assert found.at.verdict(NOISE) == "worsened"
    assert (found.before is None) == (first_bad == 1)
    assert not found.before or found.before.verdict(NOISE) == "unchanged"
    assert len(compare.asked) <= 2 + math.ceil(math.log2(number))


@given(st.data())
def test_commits_without_a_number_are_between(data):
    number = data.draw(st.integers(2, 30))
    first_bad = data.draw(st.integers(1, number - 1))
    lacking = data.draw(st.sets(st.integers(1, max(1, number - 2)))) - {number - 1}
    times = {i: 1.2 if i >= first_bad else 1.0 for i in range(number)}
    times |= dict.fromkeys(lacking)
    found = bisect.bisect(list(range(number)), comparer(times), NOISE)
    measured = [i for i in range(number) if i not in lacking]
    assert found.last_good == max(i for i in measured if i < first_bad)
    assert found.first_bad == min(i for i in measured if i >= first_bad)
    assert found.unknown == list(range(found.last_good + 1, found.first_bad))


def test_under_noise_a_wrong_commit_is_not_named_without_a_warning():
    """A slowdown of 10%, normal noise of 2% in each comparison, 300 times."""
    rng, said = np.random.default_rng(0), []
    for _ in range(300):
        first_bad = int(rng.integers(1, 30))

        def compare(before, after, first_bad=first_bad):
            times = [1.1 if commit >= first_bad else 1.0 for commit in (before, after)]
            values = [Value(time * rng.normal(1, 0.02 / math.sqrt(2))) for time in times]
            return Change(SERIES, *values, True, 20)

        with contextlib.suppress(UserError):  # the two ends were not called different
            found = bisect.bisect(list(range(30)), compare, NOISE)
            said.append((found.first_bad == first_bad, found.at.verdict(NOISE) == "worsened"))
    assert sum(right for right, _ in said) >= 265
    assert said.count((False, True)) <= 5


def test_what_did_not_get_worse_is_not_searched():
    compare = comparer({"a": 1.0, "b": 1.0, "c": 1.01})
    with pytest.raises(UserError, match=r"is unchanged from GOOD to BAD: 1\.010"):
        bisect.bisect(["a", "b", "c"], compare, NOISE)
    assert compare.asked == [("a", "c")]
    with pytest.raises(UserError, match="is improved"):
        bisect.bisect(["a", "b", "c"], comparer({"a": 1.0, "b": 1.0, "c": 0.8}), NOISE)
    with pytest.raises(UserError, match="is failed from GOOD to BAD: no number"):
        bisect.bisect(["a", "c"], comparer({"a": 1.0, "c": None}), NOISE)
    with pytest.raises(UserError, match="measured nothing"):
        bisect.bisect(["a", "c"], lambda *commits: None, NOISE)


def test_several_small_steps_are_not_blamed_on_one(monkeypatch):
    monkeypatch.setattr(bisect, "git", lambda *args: "a title")
    times = {str(i) * 8: 1.04**i for i in range(5)}
    found = bisect.bisect(list(times), comparer(times), NOISE)
    assert "several commits made it worse" in bisect.report(found, NOISE)


@pytest.fixture
def repository(tmp_path):
    """A package that takes 1.0, and 1.3 from its seventh commit on; `time` is its cost."""

    def git(*args):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    commits = []
    (tmp_path / "pagedkv").mkdir()
    for number in range(12):
        file = "README.md" if number % 3 == 1 else "pagedkv/__init__.py"
        time = 1.3 if number >= 6 else 1.0
        (tmp_path / file).write_text(f"# commit {number}\ntime = {time}\n")
        git("add", ".")
        git("commit", "--quiet", "-m", f"Commit {number}")
        commits.append(git("rev-parse", "HEAD"))

    def compare(before, after):
        values = []
        for commit in (before, after):
            space = {}
            exec(git("show", f"{commit}:pagedkv/__init__.py"), space)
            values.append(Value(space["time"]))
        return Change(SERIES, *values, True, 20)

    return tmp_path, commits, compare


def test_an_injected_slowdown_is_found_in_a_repository(repository):
    root, commits, compare = repository
    tried = bisect.candidates(commits[0], commits[11], root)
    assert tried == [commits[n] for n in (0, 2, 3, 5, 6, 8, 9, 11)]  # the others changed no package
    found = bisect.bisect(tried, compare, NOISE)
    assert (found.last_good, found.first_bad) == (commits[5], commits[6])
    with pytest.raises(UserError, match="expected GOOD to be before BAD"):
        bisect.candidates(commits[11], commits[0], root)
    with pytest.raises(UserError, match="nothing changed pagedkv/"):
        bisect.candidates(commits[0], commits[1], root)


def test_one_series_is_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    monkeypatch.setattr(changes, "derive_config", lambda *args, **kw: "config")
    (tmp_path / "config").touch()
    monkeypatch.setattr(changes, "environment_name", lambda config: "env")
    monkeypatch.setattr(changes, "discover", lambda *args: {"overhead.Auto.x": {}})
    monkeypatch.setattr(changes, "asv", lambda *args, **kw: asked.append(args) or 0)
    monkeypatch.setattr(changes, "_cells", lambda *args: {})
    with pytest.raises(changes.NothingMeasuredError, match="measured nothing at a"):
        changes.measure("a", "b", machine="box", backend="cpu", rounds=2, series=SERIES)
    [options] = asked
    assert options[options.index("--bench") + 1] == (
        r"^overhead\.Auto\.ratio_vs_contiguous\(1,\ 1024,\ 32\)$"
    )
    assert options.count("--bench") == 1


def test_the_report_has_the_ratio_on_both_sides(repository, monkeypatch):
    root, commits, compare = repository
    found = bisect.bisect(bisect.candidates(commits[0], commits[11], root), compare, NOISE)
    monkeypatch.setattr(bisect, "git", lambda *args: "a title")
    assert bisect.report(found, NOISE).splitlines() == [
        f"first worse: {commits[6][:8]} a title",
        f"last good:   {commits[5][:8]} a title",
        "GOOD to the last good one: 1.000",
        "from there to the first worse one: 1.300",
        "GOOD to BAD: 1.300",
    ]
