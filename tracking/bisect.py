"""Find the commit that made a series worse: `make bisect SERIES=… GOOD=… BAD=…`.

By comparisons with the good commit, as `make compare` has them. `asv find` searches, too, but
measures each commit by itself, and names one whether or not anything changed.
"""

import argparse
import math
import sys
from dataclasses import dataclass

from asv.util import UserError

from tracking.changes import Change, NothingMeasuredError, measure
from tracking.noise import recorded_noise
from tracking.project import begin, machine_options
from tracking.repository import ROOT, git, resolve


@dataclass(frozen=True)
class Found:
    """Where a series got worse.

    Attributes
    ----------
    last_good, first_bad : str
        Commits; those in `unknown`, between the two, have no number.
    unknown : list of str
    before, at, whole : Change
        The good commit against the last good one (None if that is it), that against the first bad
        one, and the good commit against the bad one.
    """

    last_good: str
    first_bad: str
    unknown: list
    before: Change | None
    at: Change
    whole: Change


def candidates(good, bad, root=ROOT):
    """Return the good commit and what changed the package since, up to the bad one, oldest first.

    Raises
    ------
    UserError
        If the good one is not before the bad one, or nothing changed between.
    """
    if git("merge-base", good, bad, root=root) != good:
        raise UserError(f"expected GOOD to be before BAD, got {good[:8]} and {bad[:8]}")
    options = ["--reverse", "--first-parent"]
    since = git("rev-list", *options, f"{good}..{bad}", "--", "pagedkv", root=root).split()
    if not since:
        raise UserError(f"nothing changed pagedkv/ between {good[:8]} and {bad[:8]}")
    return [good, *since]


def bisect(commits, compare, noise):
    """Return what was `Found` among commits, the first good and the last bad.

    Parameters
    ----------
    commits : list of str
        Oldest first.
    compare : callable
        Returns the `Change` of the series from one commit to another, None if one has nothing.
    noise : tracking.noise.Noise

    Raises
    ------
    UserError
        If the last commit is not worse than the first.
    """
    good, bad = 0, len(commits) - 1
    whole = compare(commits[good], commits[bad])
    if whole is None:
        raise UserError("asv measured nothing at GOOD or BAD, see above")
    if (said := whole.verdict(noise)) != "worsened":
        raise UserError(f"{whole.name} is {said} from GOOD to BAD: {_shown(whole)}")
    half, unknown, before = math.sqrt(whole.worse), set(), None
    while between := [n for n in range(good + 1, bad) if n not in unknown]:
        middle = min(between, key=lambda n: abs(2 * n - good - bad))
        change = compare(commits[0], commits[middle])
        if change is None or not change.after.known:
            unknown.add(middle)
        elif change.worse > half:
            bad = middle
        else:
            good, before = middle, change
    at = whole if (good, bad) == (0, len(commits) - 1) else compare(commits[good], commits[bad])
    skipped = [commits[n] for n in range(good + 1, bad)]
    return Found(commits[good], commits[bad], skipped, before, at, whole)


def _shown(change):
    known = change.before.known and change.after.known
    return change.ratio.show(digits=3, interval=True) if known else "no number"


def report(found, noise):
    """Return in words what was found."""

    def about(commit):
        return f"{commit[:8]} {git('log', '-1', '--format=%s', commit)}"

    lines = [f"first worse: {about(found.first_bad)}", f"last good:   {about(found.last_good)}"]
    if found.unknown:
        lines.append(
            f"no number:   {', '.join(commit[:8] for commit in found.unknown)}, between them"
        )
    lines += [
        f"GOOD to the last good one: {_shown(found.before) if found.before else 'the same'}",
        f"from there to the first worse one: {_shown(found.at)}",
        f"GOOD to BAD: {_shown(found.whole)}",
    ]
    if found.at.verdict(noise) != "worsened":
        lines.append("That step alone is within the noise: several commits made it worse.")
    return "\n".join(lines)


def main():
    """Parse the command line; exit 1 if the series did not get worse."""
    parser = argparse.ArgumentParser(prog="python -m tracking.bisect", description=__doc__)
    parser.add_argument("series", help="such as 'overhead.Auto.ratio_vs_contiguous(1, 1024, 32)'")
    parser.add_argument("good", help="commit")
    parser.add_argument("bad", help="commit")
    parser.add_argument("--rounds", type=int, help="processes a cell (default: as noise has it)")
    machine_options(parser)
    args = parser.parse_args()
    try:
        where = begin(args, records=False)
        noise = recorded_noise(where["machine"])
        commits = candidates(resolve(args.good), resolve(args.bad))

        def compare(before, after):
            rounds = args.rounds or noise.rounds
            try:
                found = measure(before, after, series=args.series, rounds=rounds, **where)
            except NothingMeasuredError as error:
                print(error)
                return None
            if len(found) != 1:
                raise UserError(f"expected one series, got {args.series!r}: {len(found)} cells")
            return found[0]

        found = bisect(commits, compare, noise)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n" + report(found, noise))
    return 0


if __name__ == "__main__":
    sys.exit(main())
