"""What jobs for a pull request ask GitHub, and the one comment they write.

`still` fails if anything was pushed since the label. `comment` writes a table as the pull request's
comment, anew each time. The table was made by the pull request's code: here it is only ever text.
"""

import argparse
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

MARK = "<!-- benchmark-pr -->"
BOT = "github-actions[bot]"
MOST = 60_000  # bytes of a table; GitHub takes 65,536 characters of a comment
CUT = "\n\nThe table is longer: the run has all of it.\n"


class RefusedError(Exception):
    """The pull request is not what was labelled, or GitHub did not answer."""


def ask(path, body=None, method=None):
    """Return what GitHub's API answers about the repository."""
    url = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/{path}"
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {os.environ['GH_TOKEN']}",
    }
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ValueError) as error:
        raise RefusedError(f"GitHub did not answer {path}: {error}") from None


def check_still(number, labelled):
    """Refuse a pull request whose newest commit is not the one that was labelled."""
    now = ask(f"pulls/{number}")["head"]["sha"]
    if now != labelled:
        raise RefusedError(
            f"pushed to since it was labelled: {labelled} is now {now}; label it again"
        )


def harmless(text):
    """Return a table as text that calls nobody, links nowhere and has no HTML, cut to fit.

    GitHub looks for links, names, issues and commits in what Markdown made of a comment, entities
    and escapes resolved, but not in code. So every cell of the table, and every line besides, is
    code as it stands. First replaced, which makes it longer, then cut, at the end of a line.
    """
    text = "".join(char for char in text if char.isprintable() or char == "\n")
    text = "\n".join(map(_as_code, text.split("\n")))
    if len(text.encode()) > MOST:
        text = text.encode()[:MOST].decode(errors="ignore")
        text = text[: text.rfind("\n") + 1] + CUT
    return text


def _as_code(line):
    """Return a line whose parts between bars are code; the one below a table's header stays."""
    if re.fullmatch(r"[|:\- ]*", line):
        return line
    cells = (re.sub(r"`|\*\*", "", cell).strip() for cell in line.split("|"))
    return "|".join(f" `{cell}` " if cell else "" for cell in cells).strip()


def write_comment(number, labelled, run, table):
    """Write the comment, over the one that is there."""
    text = ""
    if table.is_file() and not table.is_symlink():
        with table.open("rb") as file:
            text = file.read(16 * MOST).decode(errors="replace")
    said = harmless(text) if text.strip() else "The comparison did not run to its end."
    body = {"body": f"{MARK}\n{said}\n[The run]({run}), at {labelled}\n"}
    check_still(number, labelled)
    page = 1
    while comments := ask(f"issues/{number}/comments?per_page=100&page={page}"):
        for comment in comments:
            if comment["user"]["login"] == BOT and comment["body"].startswith(MARK):
                ask(f"issues/comments/{comment['id']}", body, "PATCH")
                return
        page += 1
    ask(f"issues/{number}/comments", body)


def main():
    """Parse the command line; which pull request it is stands in the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["still", "comment"])
    parser.add_argument("--table", type=Path, help="a file of Markdown, which may be missing")
    args = parser.parse_args()
    number, labelled = int(os.environ["NUMBER"]), os.environ["HEAD_SHA"]
    try:
        if args.step == "still":
            check_still(number, labelled)
        else:
            write_comment(number, labelled, os.environ["RUN_URL"], args.table)
    except RefusedError as error:
        sys.exit(f"::error::{error}")


if __name__ == "__main__":
    main()
