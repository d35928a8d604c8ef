"""Reading results."""

import copy
import math

import pytest

from tracking import results


def test_values_tell_failed_from_not_applicable():
    assert results.Value(None).show() == "failed"
    assert results.MISSING.show() == "n/a"
    assert results.Value(0.0123, 0.012, 0.013).show(1000, interval=True) == "12.30 [12.00, 13.00]"
    assert results.Value(1.5, -math.inf, math.inf).show(interval=True) == "1.50"


def test_tables_are_about_one_version_of_mlx(versions, monkeypatch):
    folder, machine, commit, (pinned, newest) = versions
    cell = "1", "1024", "32"

    def ratio(**which):
        return results.load(machine, commit, folder, **which)[results.HEADLINE][cell].value

    assert results.usual_environment(machine, folder) == pinned
    assert ratio() == ratio(environment=pinned) == pytest.approx(ratio(environment=newest) / 10)
    monkeypatch.setattr(results, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert results.usual_environment(machine, folder) == newest
    (folder / machine / f"{commit[:8]}-{newest}.json").unlink()
    assert ratio() == ratio(environment=pinned)
    with pytest.raises(ValueError, match="expected results of one commit, got 0"):
        ratio(environment=newest)


def test_documents_are_about_what_is_recorded(monkeypatch):
    """Results that git does not have, of a newer MLX, are not for documents."""
    commits, environment = results.recorded_commits("h200"), results.recorded_environment("h200")
    cells = results.recorded("h200", commits[-1])
    found = list(results.iter_results_for_machine(str(results.RESULTS), "h200"))
    for result in [r for r in found if r.commit_hash in commits]:
        local = copy.copy(result)
        local._env_name, local._params = "local", {**result.params, "mlx": "99.0"}
        found.append(local)
    monkeypatch.setattr(results, "iter_results_for_machine", lambda *args: iter(found))
    monkeypatch.setattr(results, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert results.usual_environment("h200") == "local"
    assert results.recorded_environment("h200") == environment
    assert results.recorded_commits("h200") == commits
    assert results.recorded("h200", commits[-1]) == cells
