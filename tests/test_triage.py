"""Regressions that somebody accepted: what is taken for an entry, what it covers, what is stale."""

import json

import pytest
from asv.util import UserError

from tracking import triage
from tracking.repository import git

ENTRY = {
    "commit": "0b9e8013",
    "series": "step.*.ratio_*(1, *)",
    "reason": "correct masks",
    "link": "https://github.com/x/y/pull/1",
}


def read(tmp_path, content):
    file = tmp_path / "accepted.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return triage.read(file)


def test_the_projects_own_can_be_read():
    assert triage.FILE.exists()
    triage.read()


def test_entries(tmp_path):
    assert triage.read(tmp_path / "none.json") == []
    assert read(tmp_path, "// nothing yet\n[]") == []
    [anywhere, here] = read(tmp_path, [ENTRY, ENTRY | {"machine": "mac"}])
    assert anywhere == triage.Accepted(**ENTRY)
    assert here.machine == "mac"


def test_a_link_may_lead_to_a_document(tmp_path):
    [entry] = read(tmp_path, [ENTRY | {"link": "docs/adr/0005-fused-kernels.md"}])
    assert entry.link == "docs/adr/0005-fused-kernels.md"


@pytest.mark.parametrize(
    ("series", "machine", "commits", "covered"),
    [
        ("step.Auto.ratio_step(1, 1024, 32)", "mac", ["f" * 40, "0b9e8013" + "0" * 32], True),
        ("step.Auto.ratio_step(4, 1024, 32)", "mac", ["0b9e8013" + "0" * 32], False),
        ("step.Auto.ratio_step(1, 1024, 32)", "box", ["0b9e8013" + "0" * 32], False),
        ("step.Auto.ratio_step(1, 1024, 32)", "mac", ["f" * 40], False),
        ("step.Auto.ratio_step(1, 1024, 32)", "mac", [], False),
    ],
)
def test_an_entry_covers_its_series_machine_and_commit(series, machine, commits, covered):
    entries = [triage.Accepted(**ENTRY, machine="mac")]
    found = triage.acceptance(entries, series, machine, commits)
    assert found == (entries[0] if covered else None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "accepted.json: "),
        (ENTRY, "expected a list"),
        ([ENTRY, "x"], "in entry 2"),
        (
            [{k: v for k, v in ENTRY.items() if k != "reason"}],
            "expected commit, series, .* entry 1",
        ),
        ([ENTRY | {"who": "me"}], "expected commit, series"),
        ([ENTRY | {"commit": "main"}], "expected commit like .* in entry 1, got 'main'"),
        ([ENTRY | {"reason": " "}], "expected reason"),
        ([ENTRY | {"link": "javascript:alert(1)"}], "expected link"),
        ([ENTRY | {"link": "docs/../website/overhead.md"}], "expected link"),
        ([ENTRY | {"link": "docs/adr/none.md"}], "expected link in entry 1 to be a document, got"),
        ([ENTRY | {"series": 3}], "expected series"),
    ],
)
def test_what_is_no_entry_is_said(content, said, tmp_path):
    with pytest.raises(UserError, match=f"accepted.json: .*{said}|{said}"):
        read(tmp_path, content)


def test_what_covers_nothing_is_stale():
    head = git("rev-parse", "HEAD")
    entries = [
        triage.Accepted(**ENTRY | {"commit": commit}) for commit in (head, "f" * 40, head[:9])
    ]
    said = triage.stale(entries, used={entries[2]})
    assert len(said) == 2
    assert said[0].endswith("is stale: no such regression is published (any more)")
    assert said[1].endswith("is stale: this clone has no such commit")
    assert triage.stale([], set()) == []


def test_commits_between():
    head, parent, older = git("rev-list", "--first-parent", "--max-count=3", "HEAD").split()
    assert triage.between(parent, head) == [head]
    assert triage.between(older, head) == [head, parent]
    assert triage.between(head, head) == []
