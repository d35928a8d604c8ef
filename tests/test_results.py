"""Reading results."""

import dataclasses
import math
from pathlib import Path

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
    found = results.measured("h200")
    local = [
        dataclasses.replace(one, file="local.json", environment="local", mlx="99.0")
        for one in found
        if one.commit in commits
    ]
    monkeypatch.setattr(results, "measured", lambda *args: found + local)
    monkeypatch.setattr(results, "asv_settings", lambda: {"matrix": {"req": {"mlx": ["99.0"]}}})
    assert results.usual_environment("h200") == "local"
    assert results.recorded_environment("h200") == environment
    assert results.recorded_commits("h200") == commits
    assert results.recorded("h200", commits[-1]) == cells


def test_a_file_is_parsed_once_and_again_when_it_has_changed(versions, monkeypatch):
    folder, machine, commit, (pinned, newest) = versions
    parsed, parse = [], results.Results.load
    monkeypatch.setattr(
        results.Results, "load", lambda path: parsed.append(Path(path).name) or parse(path)
    )
    for environment in (pinned, newest, pinned):
        results.load(machine, commit, folder, environment)
        results.measured_commits(machine, folder, environment)
    names = [f"{commit[:8]}-{environment}.json" for environment in (pinned, newest)]
    assert sorted(parsed) == names
    changed = folder / machine / names[0]
    changed.write_text(changed.read_text() + " ")
    results.load(machine, commit, folder, pinned)
    assert sorted(parsed) == [names[0], *names]
