"""What identical code does between runs, and what follows for each series."""

import contextlib
import itertools
import math

import numpy as np
import pytest
from asv.util import UserError
from repositories import git
from result_files import write_result

from tracking import noise, repository
from tracking.noise import Noise

RATIO = "overhead.Auto.ratio_vs_contiguous({}, 1024, 32)"
ONE = RATIO.format(1)


def runs(values, series=ONE, code="code"):
    return [(series, code, value) for value in values]


def test_a_threshold_is_the_third_quartile_and_three_interquartile_ranges():
    values = [1.0, 1.01, 1.02, 1.04, 1.0, 1.03, 1.05, 1.0, 0.98, 1.1]
    changes = [abs(math.log(a / b)) for a, b in itertools.combinations(values, 2)]
    first, third = np.percentile(changes, [25, 75])
    threshold = Noise(runs(values)).threshold(ONE)
    assert threshold.factor == pytest.approx(math.exp(third + 3 * (third - first)))
    assert threshold.source == "series"
    assert threshold.recorded
    assert threshold.largest == pytest.approx(max(threshold.factor, 1.1 / 0.98))
    assert threshold.show().endswith("from 45 changes of its own")


def test_what_is_not_recorded_is_a_guess():
    for values in ([], [1.0], [1.0, 1.0], [1.0, 1.3, 1.1]):
        threshold = Noise(runs(values)).threshold(ONE)
        assert (threshold.source, threshold.recorded) == ("guess", False)
        assert threshold.factor == noise.GUESSED["ratio"]


def test_few_runs_are_held_to_those_of_the_benchmarks_other_cells_and_to_their_own():
    loud, quiet = [1.0, 1.2, 0.9, 1.3, 1.05], [1.0, 1.001, 1.0, 1.001, 1.0]
    both = Noise(runs(loud) + runs(quiet, RATIO.format(4)))
    for cell in (1, 4):
        threshold = both.threshold(RATIO.format(cell))
        assert threshold.source == "benchmark"
        assert threshold.factor > 1.2
    never_run = both.threshold(RATIO.format(16))
    assert (never_run.source, never_run.recorded) == ("benchmark", True)
    other = both.threshold("step.Auto.ratio_step_vs_contiguous(1, 1024, 32)")
    assert (other.source, other.recorded) == ("machine", False)
    assert other.factor > 1.2
    enough = Noise(runs(loud) + runs(2 * quiet, RATIO.format(4)))
    assert enough.threshold(RATIO.format(4)).source == "series"
    assert enough.threshold(RATIO.format(4)).factor == noise.LEAST["ratio"]


def test_one_leap_of_another_cell_hides_no_change_of_a_series_that_never_leapt():
    quiet = runs([1.0, 1.01, 1.0, 1.005, 1.0])
    noise_of = Noise(quiet + runs([1.0, 1.35], RATIO.format(4)) + runs([1.0], RATIO.format(16)))
    own = noise_of.threshold(ONE)
    assert own.source == "benchmark"
    assert own.largest == own.factor < 1.1
    for seldom in (4, 16):
        assert noise_of.threshold(RATIO.format(seldom)).largest == pytest.approx(1.35)


def test_only_identical_code_is_compared():
    values = [1.0, 1.001] * 5
    mixed = runs(values, code="old") + runs([2 * x for x in values], code="new")
    assert Noise(mixed).threshold(ONE).factor == noise.LEAST["ratio"]


@pytest.mark.parametrize(
    ("series", "factor", "source"),
    [
        ("scheduler.X.track_instructions(16, 0)", 1.01, "exact"),
        ("scheduler.X.track_allocated(16, 0)", 1.01, "exact"),
        ("scheduler.Retired.track_retired(16, 0)", 1.05, "guess"),  # nearly the same each time
        ("step.Host.track_host(1)", 1.5, "guess"),
    ],
)
def test_what_is_counted_has_no_noise(series, factor, source):
    threshold = Noise().threshold(series)
    assert (threshold.factor, threshold.source) == (factor, source)


def test_an_old_outlier_is_forgotten():
    values = [9.0] + [1.0, 1.001] * noise.LATEST
    assert Noise(runs(values)).threshold(ONE).largest == noise.LEAST["ratio"]
    old = runs([1.0, 2.0] * 5, code="old")
    new = [run for code in range(5) for run in runs([1.0, 1.001] * 5, code=code)]
    assert Noise(old + new).threshold(ONE).largest == noise.LEAST["ratio"]
    assert Noise(new + old).threshold(ONE).largest == pytest.approx(2)


def test_identical_runs_are_seldom_called_changed():
    """With normal noise of 3%; of a threshold of 3 runs (from which none is made) 5% are."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(2000):
        values = np.exp(rng.normal(0, 0.03, noise.OWN + 2))
        threshold = Noise(runs(values[:-2])).threshold(ONE)
        called += abs(math.log(values[-1] / values[-2])) > math.log(threshold.factor)
    assert called <= 30


def test_runs_are_kept_and_read_again(versions):
    results, machine, _, (environment, _) = versions
    [one] = [x for x in noise.measured(machine, results) if x.environment == environment]
    [row] = [row for row in noise.rows_of(one, "code", 2) if row["series"] == ONE]
    factors = [1 + number / 100 for number in range(1, noise.OWN + 1)]
    for number, factor in enumerate(factors):
        again = {**row, "time": f"2026-12-{number + 10}T00:00:00+00:00"}
        noise.record(machine, [{**again, "value": row["value"] * factor}] * 2, results)
    rows = noise.read(results / machine / "noise.csv")
    assert [float(x["value"]) / row["value"] for x in rows] == pytest.approx(factors)
    threshold = noise.recorded_noise(machine, results).threshold(ONE)
    assert threshold.source == "series"
    assert max(threshold.changes) == pytest.approx(factors[-1] / factors[0])


def test_recorded_results_of_identical_code_are_runs(versions, monkeypatch):
    results, machine, commit, environments = versions
    for environment, other in itertools.product(environments, "ab"):
        file = results / machine / f"0b9e8013-{environment}.json"
        text = file.read_text().replace(commit, other * 40)
        file.with_name(f"{other * 8}-{environment}.json").write_text(text)
    for same, changes in ((True, 2 * 3), (False, 0)):  # of three commits, in two environments
        monkeypatch.setattr(noise, "codes", lambda found, same=same: {c: same or c for c in found})
        threshold = noise.recorded_noise(machine, results).threshold(ONE)
        assert len(threshold.own) == changes


def test_codes_tell_commits_of_the_same_package_and_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    commits = []
    for file in ("pagedkv/a", "benchmarks/a", "README.md", "pagedkv/b", "benchmarks/b"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--quiet", "-m", file)
        commits.append(git(tmp_path, "rev-parse", "HEAD"))
    _, whole, readme, package, suite = commits
    codes = noise.codes([*commits, "f" * 40])
    assert set(codes) == {whole, readme, package, suite}  # the first has no suite
    assert codes[whole] == codes[readme]
    assert len({codes[commit] for commit in (readme, package, suite)}) == 3
    assert noise.codes([]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "benchmarks,rounds\nratio,4\n",
        "{header}\n1,2\n",
        "{header}\n2026-12-01,a,b,c,2,10,s(1),fast\n",
        "{header}\nyesterday,a,b,c,2,10,s(1),1.0\n",
        "\udcff",
    ],
)
def test_a_broken_record_is_named_and_stays(text, tmp_path):
    file = tmp_path / "box/noise.csv"
    file.parent.mkdir()
    content = text.format(header=",".join(noise.HEADER)).encode(errors="surrogateescape")
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"noise\.csv: .*make noise"):
        noise.record("box", [], tmp_path)
    assert file.read_bytes() == content


@pytest.mark.parametrize(("samples", "rounds"), [(50, 1), (20, 2), (14, 3), (2, 4)])
def test_rounds_give_every_ratio_enough_samples(samples, rounds):
    some = {RATIO: 50, ONE: samples, "decode.Auto.time_decode(1)": 2}
    rows = [{"series": series, "rounds": 2, "samples": n} for series, n in some.items()]
    assert noise.rounds_needed(rows) == rounds
    assert noise.rounds_needed(rows[2:]) == noise.NIGHT


def test_make_noise_measures_head_and_adds_each_run(monkeypatch, tmp_path):
    name, head = "overhead.Auto.ratio_vs_contiguous", "c" * 40
    listed = {
        n: {"name": n, "params": [], "param_names": []} for n in (name, "host.Plan.time_plan")
    }
    slept, asked = [], []

    @contextlib.contextmanager
    def scratch(what, backend):
        yield tmp_path / f"run-{len(asked)}", "config"

    def asv(*args, config):
        folder = tmp_path / f"run-{len(asked)}/box"
        asked.append(args)
        write_result(folder, head, {name: [[1.5], [], "1", 1000 * len(asked)]})
        return 2 if len(asked) < 4 else 1  # what failed is not recorded, the rest is

    monkeypatch.setattr(noise.record, "__defaults__", (tmp_path,))
    monkeypatch.setattr(noise, "resolve", lambda name: head)
    monkeypatch.setattr(noise, "codes", lambda commits: dict.fromkeys(commits, "code"))
    monkeypatch.setattr(noise.time, "sleep", slept.append)
    monkeypatch.setattr(noise, "scratch", scratch)
    monkeypatch.setattr(noise, "discover", lambda *args: listed)
    monkeypatch.setattr(noise, "asv", asv)
    where = {"machine": "box", "backend": "cpu"}
    assert noise.noise(3, 60, ("overhead.",), **where) == 0
    assert slept == [60, 60]
    rows = noise.read(tmp_path / "box/noise.csv")
    assert [row["time"][17:19] for row in rows] == ["01", "02", "03"]
    assert {(row["series"], row["value"], row["rounds"]) for row in rows} == {(name, 1.5, 2)}
    assert (asked[0][-1], "rounds=2" in asked[0]) == (f"{head}^!", True)
    patterns = [after for option, after in itertools.pairwise(asked[0]) if option == "--bench"]
    assert patterns == [r"^overhead\.Auto\.ratio_vs_contiguous(\(|$)"]
    with pytest.raises(UserError, match=r"asv measured nothing \(exit status 1\)"):
        noise.noise(1, 0, ("",), **where)
    assert noise.read(tmp_path / "box/noise.csv") == rows
