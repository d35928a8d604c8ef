"""The environment of git as a program calls it: in the repository that is meant, asking nothing."""

import os
import re

# Of git's variables, where its settings lie and how it reaches a remote. Any other is of a hook, a
# shell alias or `rebase -x`, and of the repository that runs it, not of the one that is meant.
KEPT = re.compile(
    "GIT_(CONFIG_(GLOBAL|SYSTEM|NOSYSTEM)|EXEC_PATH|ALLOW_PROTOCOL|(SSH|SSL|HTTP|PROXY)(_.*)?)"
)
# These replace the settings of the user and the repository; all others have what a fetch or a push
# needs, like credential helpers, safe.directory and proxies.
SETTINGS = {
    "color.ui": "false",
    "column.ui": "never",
    "core.hooksPath": os.devnull,
    "core.quotePath": "false",
    "log.showSignature": "false",
    "push.followTags": "false",
    "tag.gpgSign": "false",
}


def unattended(environ):
    """Return an environment in which git neither asks nor signs, and prints what programs read.

    It finds the repository by where it runs alone. That needs git 2.31.
    """
    settings = {"GIT_CONFIG_COUNT": str(len(SETTINGS))}
    for number, (name, value) in enumerate(SETTINGS.items()):
        settings |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("GIT_") or KEPT.fullmatch(name)
    }
    return {**kept, **settings, "GIT_ASKPASS": "", "GIT_TERMINAL_PROMPT": "0"}
