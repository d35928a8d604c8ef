"""Regressions that were accepted: what is taken for an entry, what it covers, what is stale."""

import json

import pytest
from asv.util import UserError

from tracking import triage
from tracking.repository import ROOT

ENTRY = {
    "commit": "0b9e8013",
    "series": "step.*.ratio_*(1, *)",
    "reason": "correct masks",
    "link": "https://github.com/x/y/pull/1",
}


def read(tmp_path, *entries):
    file = tmp_path / "accepted.json"
    file.write_text(f"// a comment\n{json.dumps(entries)}")
    return triage.read(file)


def test_the_projects_own_lead_to_documents():
    entries = triage.read()
    assert entries
    assert all((ROOT / entry.link).is_file() for entry in entries)


def test_entries(tmp_path):
    entries = [ENTRY, ENTRY | {"machine": "mac"}]
    assert read(tmp_path, *entries) == [triage.Accepted(**entry) for entry in entries]
    with pytest.raises(UserError, match="expected a link, got 'javascript:"):
        read(tmp_path, ENTRY, ENTRY | {"link": "javascript:alert(1)"})
    with pytest.raises(TypeError, match="who"):
        read(tmp_path, ENTRY | {"who": "me"})


@pytest.mark.parametrize(
    ("series", "machine", "commits", "covered"),
    [
        ("step.Auto.ratio_step(1, 1024, 32)", "mac", ["f" * 40, "0b9e8013" + "0" * 32], True),
        ("step.Auto.ratio_step(4, 1024, 32)", "mac", ["0b9e8013" + "0" * 32], False),
        ("step.Auto.ratio_step(1, 1024, 32)", "box", ["0b9e8013" + "0" * 32], False),
        ("step.Auto.ratio_step(1, 1024, 32)", "mac", ["f" * 40], False),
    ],
)
def test_an_entry_covers_its_series_machine_and_commit(series, machine, commits, covered):
    entries = [triage.Accepted(**ENTRY, machine="mac")]
    found = triage.acceptance(entries, series, machine, commits)
    assert found == (entries[0] if covered else None)
    assert len(triage.stale(entries, {found})) == (not covered)
