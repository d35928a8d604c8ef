"""What is undone after an interrupt is in a `try` that sees each interrupt."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pagedkv"
UNDOES = "except BaseException"
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp


def unseen(source):
    """Lines of comprehensions whose interrupts Python 3.12 hides from the `try` around them."""
    tries = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Try)]
    return [
        part.lineno
        for node in tries
        if any(ast.unparse(handler).startswith(UNDOES) for handler in node.handlers)
        for statement in node.body
        for part in ast.walk(statement)
        if isinstance(part, COMPREHENSIONS)
    ]


def test_no_comprehension_stands_in_a_try_that_undoes():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := unseen(path.read_text()))
    }
    assert not found


def test_a_comprehension_in_a_try_that_undoes_is_seen():
    source = "try:\n    a = [b for b in c]\nexcept BaseException:\n    undo()\n"
    assert unseen(source) == [2]
    assert not unseen(source.replace("BaseException", "ValueError"))
