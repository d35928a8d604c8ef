"""git as a program calls it: in the repository that is meant, and by nobody's habits."""

import os
import re

# Of git's variables, where its settings lie and how it reaches a remote. Any other is of a hook, a
# shell alias or `rebase -x`, and of the repository that runs it, not of the one that is meant.
KEPT = re.compile(
    "GIT_(CONFIG_(GLOBAL|SYSTEM|NOSYSTEM)|EXEC_PATH|ALLOW_PROTOCOL|(SSH|SSL|HTTP|PROXY)(_.*)?)"
)

# No editor, no pager, no question: the output is not shown, so nobody would see what git waits for.
# Credentials come from a credential helper, an SSH agent or .netrc.
SILENT = {
    "GIT_EDITOR": "false",
    "GIT_SEQUENCE_EDITOR": "false",
    "GIT_PAGER": "cat",
    "GIT_ASKPASS": "",
    "GIT_TERMINAL_PROMPT": "0",
    "SSH_ASKPASS": "false",
    "SSH_ASKPASS_REQUIRE": "force",
}

# These settings replace the user's, the system's and the repository's. All others stay, for they
# have what a fetch or push needs: credential helpers, safe.directory, proxies, addresses.
SETTINGS = {
    # Signing, and with it annotated tags
    "commit.gpgSign": "false",
    "push.gpgSign": "false",
    "tag.gpgSign": "false",
    "tag.forceSignAnnotated": "false",
    "log.showSignature": "false",
    # Programs that git would run
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "credential.interactive": "false",
    # What is pushed besides
    "push.followTags": "false",
    "push.pushOption": "",
    "push.recurseSubmodules": "no",
    # How output reads
    "color.ui": "false",
    "color.branch": "false",
    "column.ui": "never",
    "core.quotePath": "false",
    "i18n.logOutputEncoding": "utf-8",
    "log.follow": "false",
    "status.showUntrackedFiles": "normal",
    # Files as they are
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.safecrlf": "false",
}


def unattended(environ):
    """Return an environment that git finds the repository in by where it runs, and by nothing else.

    A program that a hook calls works in its own repository, as if it had been called from a shell.
    Whatever the user has set, git neither asks nor signs, and prints what programs read. That needs
    git 2.31.
    """
    settings = {"GIT_CONFIG_COUNT": str(len(SETTINGS))}
    for number, (name, value) in enumerate(SETTINGS.items()):
        settings |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("GIT_") or KEPT.fullmatch(name)
    }
    return {**kept, **SILENT, **settings}
