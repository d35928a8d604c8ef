"""Regressions that somebody accepted, in accepted.json: what raises no alarm, and why."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from asv.util import UserError, load_json

from tracking.repository import ROOT, git

FILE = ROOT / "accepted.json"
KEYS = {
    "commit": r"[0-9a-f]{7,40}",
    "series": r".+",
    "machine": r".+",
    "reason": r".*\S.*",
    "link": r"https?://\S+|docs/(?:[\w-]+/)*[\w-]+\.md",
}
OPTIONAL = {"machine"}


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
        return (
            fnmatchcase(series, self.series)
            and self.machine in (None, machine)
            and any(commit.startswith(self.commit) for commit in commits)
        )


def read(file=FILE):
    """Return what was accepted.

    Raises
    ------
    UserError
        If the file is broken or an entry is not complete, with its number.
    """
    if not file.exists():
        return []
    try:
        entries = load_json(str(file), js_comments=True)
    except (UserError, ValueError) as error:
        raise UserError(f"{file.name}: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f"{file.name}: expected a list of regressions")
    found = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not KEYS.keys() - OPTIONAL <= entry.keys() <= KEYS.keys():
            raise UserError(
                f"{file.name}: expected {', '.join(KEYS)} in entry {number} (or no machine)"
            )
        for key, value in entry.items():
            if not isinstance(value, str) or not re.fullmatch(KEYS[key], value):
                raise UserError(
                    f"{file.name}: expected {key} like {KEYS[key]} in entry {number}, got {value!r}"
                )
        link = entry["link"]
        if link.startswith("docs/") and not (ROOT / link).is_file():
            raise UserError(
                f"{file.name}: expected link in entry {number} to be a document, got {link!r}"
            )
        found.append(Accepted(**entry))
    return found


def between(before, after):
    """Return the hashes of the commits that `after` has and `before` lacks."""
    return git("rev-list", f"{before}..{after}").split()


def acceptance(entries, series, machine, commits):
    """Return the entry that covers a regression, None if nobody accepted it."""
    return next((entry for entry in entries if entry.covers(series, machine, commits)), None)


def stale(entries, used):
    """Return a sentence for each entry that covered nothing of what is published."""
    said = []
    for entry in entries:
        if entry not in used:
            try:
                git("cat-file", "-e", f"{entry.commit}^{{commit}}")
                why = "no such regression is published (any more)"
            except UserError:
                why = "this clone has no such commit"
            said.append(f"{FILE.name}: {entry.series} at {entry.commit} is stale: {why}")
    return said
