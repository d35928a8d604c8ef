"""A commit like HEAD, but slower, for `prove.py` to find."""

import tempfile
from pathlib import Path

from tracking.repository import commit_of, git

PACKAGE = "pagedkv/__init__.py"
SLOWER = """

def _slower(call):
    import time

    import mlx.core as mx

    def called(*args, **kwargs):
        start = time.perf_counter()
        out = call(*args, **kwargs)
        mx.eval(out)
        until = time.perf_counter() + {percent} / 100 * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return out

    return called


decode_attention = _slower(decode_attention)
"""


def slowed(percent):
    """Return the hash of a commit, on no branch, whose decode_attention takes `percent` longer."""
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        source = git("show", f"HEAD:{PACKAGE}") + SLOWER.format(percent=percent)
        blob = git("hash-object", "-w", "--stdin", text=source)
        git("read-tree", "HEAD", env=index)
        git("update-index", "--cacheinfo", f"100644,{blob},{PACKAGE}", env=index)
        tree = git("write-tree", env=index)
    return commit_of(tree, f"HEAD, decode_attention slower by {percent}%")
