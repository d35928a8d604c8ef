"""git as a program calls it: in the repository that is meant, whoever called the program."""

import re

# Of git's variables, where its settings lie and how it reaches a remote. Any other is of a hook, a
# shell alias or `rebase -x`, and of the repository that runs it, not of the one that is meant.
KEPT = re.compile(
    "GIT_(CONFIG_(GLOBAL|SYSTEM|NOSYSTEM)|EXEC_PATH|ALLOW_PROTOCOL|(SSH|SSL|HTTP|PROXY)(_.*)?)"
)


def unattended(environ):
    """Return an environment that git finds the repository in by where it runs, and by nothing else.

    A program that a hook calls works in its own repository, as if it had been called from a shell.
    """
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("GIT_") or KEPT.fullmatch(name)
    }
