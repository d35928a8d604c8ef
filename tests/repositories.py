"""Git in the repositories that tests make."""

import subprocess


def git(root, *args):
    """Return what a git command prints, run in a folder by an author of its own."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
