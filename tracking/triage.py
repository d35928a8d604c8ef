"""Regressions that were accepted, in accepted.json: the site lists them apart, with the reason."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from asv.util import UserError, load_json

from tracking.repository import ROOT, git

FILE = ROOT / "accepted.json"
REQUIRED = {"commit", "series", "reason", "link"}
LINK = re.compile(r"https?://\S+|docs/[\w/-]+\.md")


@dataclass(frozen=True)
class Accepted:
    """A regression that was accepted.

    Attributes
    ----------
    commit : str
        What caused it, the beginning of its hash.
    series : str
        Names of series, `*` standing for anything.
    reason, link : str
        Why, and where that was discussed: an address, or a document of this repository.
    machine : str or None
        The only one that it is about.
    """

    commit: str
    series: str
    reason: str
    link: str
    machine: str | None = None

    def covers(self, series, machine, commits):
        """Whether it is about a series that got worse on a machine by one of some commits."""
        by_it = any(commit.startswith(self.commit) for commit in commits)
        return by_it and self.machine in (None, machine) and fnmatchcase(series, self.series)


def read(file=FILE):
    """Return what was accepted; an entry that is not complete is a UserError with its number."""
    found = []
    for number, entry in enumerate(load_json(str(file), js_comments=True), start=1):
        complete = REQUIRED <= entry.keys() <= {*REQUIRED, "machine"}
        if not complete or not LINK.fullmatch(entry["link"]):
            expected = f"{', '.join(sorted(REQUIRED))} (a document or an address), or also machine"
            raise UserError(f"{file.name}: expected {expected} in entry {number}, got {entry}")
        found.append(Accepted(**entry))
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
