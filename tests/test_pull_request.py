"""What a pull request's code can do to the comment about it, against a GitHub of our own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


class GitHub(BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/repos/o/p/pulls/7":
            return self.answer({"head": {"sha": self.server.head}})
        assert path == "/repos/o/p/issues/7/comments"
        page = int(re.search(r"page=(\d+)$", query)[1])
        return self.answer(self.server.comments[100 * (page - 1) : 100 * page])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.wrote.append((self.command, self.path, json.loads(body)["body"]))
        self.answer({})

    def do_PATCH(self):
        self.do_POST()

    def answer(self, value):
        self.server.tokens.add(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def github(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), GitHub)
    server.head, server.comments, server.wrote, server.tokens = LABELLED, [], [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "GITHUB_API_URL": f"http://127.0.0.1:{server.server_port}",
        "GITHUB_REPOSITORY": "o/p",
        "GH_TOKEN": "secret",
        "NUMBER": "7",
        "HEAD_SHA": LABELLED,
        "RUN_URL": "https://example.org/run",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def run(*args):
    command = [sys.executable, "-I", "-S", str(SCRIPT), *args]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True)


def test_a_push_since_the_label_is_refused_and_gets_no_comment(github, tmp_path):
    assert run("still").returncode == 0
    github.head = PUSHED
    for command in (["still"], ["comment", "--table", str(tmp_path / "table.md")]):
        done = run(*command)
        assert done.returncode == 1
        assert done.stderr.startswith(f"::error::pushed to since it was labelled: {LABELLED}")
    assert github.wrote == []
    assert github.tokens == {"Bearer secret"}


def test_the_comment(github, tmp_path):
    table = tmp_path / "table.md"
    table.write_text("**1 worsened** by @them")
    assert run("comment", "--table", str(table)).returncode == 0
    [(method, path, body)] = github.wrote
    assert (method, path) == ("POST", "/repos/o/p/issues/7/comments")
    said = "`1 worsened by @them`\n[The run](https://example.org/run)"
    assert body == f"{pull_request.MARK}\n{said}, at {LABELLED}\n"


def test_it_is_written_over_the_bots_own(github, tmp_path):
    """Another's that begins alike stays, there may be hundreds, and a link is no table."""
    other = {"id": 1, "user": {"login": "somebody"}, "body": pull_request.MARK}
    ours = {"id": 9, "user": {"login": pull_request.BOT}, "body": pull_request.MARK + " old"}
    github.comments = [other] * 150 + [ours]
    (tmp_path / "table.md").symlink_to("/etc/passwd")
    assert run("comment", "--table", str(tmp_path / "table.md")).returncode == 0
    [(method, path, body)] = github.wrote
    assert (method, path) == ("PATCH", "/repos/o/p/issues/comments/9")
    assert "did not run to its end" in body


def test_no_answer_is_one_sentence(github, monkeypatch):
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
    done = run("still")
    assert done.returncode == 1
    assert done.stderr.startswith("::error::GitHub did not answer pulls/7")
    assert "Traceback" not in done.stderr
