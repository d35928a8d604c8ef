"""A pull request's code cannot forge the comment about it. GitHub is not called."""

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tracking.repository import ROOT

SCRIPT = ROOT / ".github/scripts/pull_request.py"
spec = importlib.util.spec_from_file_location("pull_request", SCRIPT)
pull_request = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pull_request)
harmless = pull_request.harmless
LABELLED, PUSHED = "a" * 40, "b" * 40


def assert_only_code(text):
    """GitHub looks for links and names everywhere but in code."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    assert "html_block" not in {token.type for token in tokens}
    assert {token.type for token in inline} <= {"text", "code_inline", "softbreak", "hardbreak"}
    for token in inline:
        if token.type == "text":
            assert re.fullmatch(r"[|:\- ]*", token.content)


def test_a_table_stays_one():
    table = "**worsened: 1**\n\n| ratio | benchmark |\n| --: | --: |\n| 1.25 | `a.b(1)` |\n"
    code = "`worsened: 1`\n\n| `ratio` | `benchmark` |\n| --: | --: |\n| `1.25` | `a.b(1)` |\n"
    assert harmless(table) == code


NAMES = ("@somebody", "&#64;somebody", "#12", "owner/name#3", "deadbee", "https://a.b", "a@b.c")
MARKUP = ("<img src=x>", "<!-- x", "[x](y)", "[x]\n\n[x]:\n  y", "``` \n@x\n```", "    @x", "# @x")
ENDS = ("`` @x `", "a` @x `b", "\\`@x`", "| ` | @x | ` |", "| a |\n| - |\n| @x \\| `y |", "*`*@x")


@pytest.mark.parametrize("text", [*NAMES, *MARKUP, *ENDS])
def test_it_is_only_code(text):
    assert_only_code(harmless(text))
    assert_only_code(harmless(f"| a |\n| --: |\n| {text} |"))


@given(st.text("`|\\*_~[]()<>!&;:@#=-+.>$^ \n\t\r1ax/é", max_size=60))
def test_whatever_it_is_it_is_only_code(text):
    assert_only_code(harmless(text))


def test_nothing_that_a_terminal_obeys_stays():
    assert harmless("a\x1b[31m\u202eb\r\n") == "`a[31mb`\n"


@pytest.mark.parametrize("char", ["@", "é", "\U0001f600"])
def test_it_fits_after_all_was_replaced(char):
    line = f"| {char * 50} |\n"
    text = harmless(line * (2 * pull_request.MOST // len(line.encode())))
    assert len(text.encode()) <= pull_request.MOST + len(pull_request.CUT)
    assert text.endswith(pull_request.CUT)
    rows = text.removesuffix(pull_request.CUT).splitlines()
    assert set(rows) == {harmless(line).strip()}  # none is cut in the middle


@pytest.fixture
def github(monkeypatch):
    """GitHub as the script asks it; `run` returns the sentence with which a step fails, or None."""
    said = SimpleNamespace(head=LABELLED, comments=[], wrote=[])

    def ask(path, body=None, method=None):
        if body:
            said.wrote.append((method or "POST", path, body["body"]))
            return {}
        if path == "pulls/7":
            return {"head": {"sha": said.head}}
        page = int(re.fullmatch(r"issues/7/comments\?per_page=100&page=(\d+)", path)[1])
        return said.comments[100 * (page - 1) : 100 * page]

    def run(*args):
        monkeypatch.setattr("sys.argv", ["pull_request.py", *args])
        try:
            return pull_request.main()
        except SystemExit as stopped:
            return stopped.code

    said.run = run
    monkeypatch.setattr(pull_request, "ask", ask)
    for name, value in {
        "NUMBER": "7",
        "HEAD_SHA": LABELLED,
        "RUN_URL": "https://x.org/run",
    }.items():
        monkeypatch.setenv(name, value)
    return said


def test_a_push_since_the_label_is_refused_and_gets_no_comment(github, tmp_path):
    assert github.run("still") is None
    github.head = PUSHED
    for command in (["still"], ["comment", "--table", str(tmp_path / "table.md")]):
        error = f"::error::pushed to since it was labelled: {LABELLED}"
        assert github.run(*command).startswith(error)
    assert github.wrote == []


def test_the_comment(github, tmp_path):
    table = tmp_path / "table.md"
    table.write_text("**1 worsened** by @them")
    assert github.run("comment", "--table", str(table)) is None
    said = "`1 worsened by @them`\n[The run](https://x.org/run)"
    body = f"{pull_request.MARK}\n{said}, at {LABELLED}\n"
    assert github.wrote == [("POST", "issues/7/comments", body)]


def test_it_is_written_over_the_bots_own(github, tmp_path):
    """Another's that begins alike stays, there may be hundreds, and a link is no table."""
    other = {"id": 1, "user": {"login": "somebody"}, "body": pull_request.MARK}
    ours = {"id": 9, "user": {"login": pull_request.BOT}, "body": pull_request.MARK + " old"}
    github.comments = [other] * 150 + [ours]
    (tmp_path / "table.md").symlink_to("/etc/passwd")
    assert github.run("comment", "--table", str(tmp_path / "table.md")) is None
    [(method, path, body)] = github.wrote
    assert (method, path) == ("PATCH", "issues/comments/9")
    assert "did not run to its end" in body


def test_it_runs_by_the_systems_python_alone_and_no_answer_is_one_sentence():
    env = {"GITHUB_API_URL": "http://127.0.0.1:9", "GITHUB_REPOSITORY": "o/p", "NUMBER": "7"}
    env |= {"GH_TOKEN": "secret", "HEAD_SHA": LABELLED}
    command = [sys.executable, "-I", "-S", str(SCRIPT), "still"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("::error::GitHub did not answer pulls/7")
    assert "Traceback" not in done.stderr
