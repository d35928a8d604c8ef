"""Regressions that were accepted, in accepted.json: the site lists them apart, with the reason."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from asv.util import UserError, load_json

from tracking.repository import ROOT, git

FILE = ROOT / "accepted.json"
LINK = re.compile(r"https?://\S+|docs/[\w/-]+\.md")


@dataclass(frozen=True)
class Accepted:
    """A regression by a commit, of series by a pattern, on one machine or on any."""

    commit: str  # the beginning of its hash
    series: str  # `*` stands for anything
    reason: str
    link: str  # where that was discussed: an address, or a document of this repository
    machine: str | None = None

    def covers(self, series, machine, commits):
        """Whether it is about a series that got worse on a machine by one of some commits."""
        by_it = any(commit.startswith(self.commit) for commit in commits)
        return by_it and self.machine in (None, machine) and fnmatchcase(series, self.series)


def read(file=FILE):
    """Return what was accepted."""
    found = [Accepted(**entry) for entry in load_json(str(file), js_comments=True)]
    for entry in found:
        if not LINK.fullmatch(entry.link):
            raise UserError(f"{file.name}: expected a link, got {entry.link!r}")
    return found


def between(before, after):
    """Return the hashes of the commits that `after` has and `before` lacks."""
    return git("rev-list", f"{before}..{after}").split()


def acceptance(entries, series, machine, commits):
    """Return the entry that covers a regression, None if none does."""
    return next((entry for entry in entries if entry.covers(series, machine, commits)), None)


def stale(entries, used):
    """Return a sentence for each entry that covered nothing of what is published."""
    return [
        f"{FILE.name}: {entry.series} at {entry.commit} is stale: no such regression is published"
        for entry in entries
        if entry not in used
    ]
