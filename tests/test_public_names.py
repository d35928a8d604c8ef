"""What `import pagedkv` offers is what users need."""

import re
from pathlib import Path

import pagedkv

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_used_or_an_error():
    texts = [ROOT / "docs/package.md", *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    words = set(re.findall(r"\w+", " ".join(path.read_text() for path in texts)))
    errors = {name for name in vars(pagedkv.errors) if name.endswith("Error")}
    assert set(pagedkv.__all__) - words - errors - {"__version__"} == set()


def test_what_old_benchmarks_need_stays():
    """Today's benchmarks run against every commit, old and new."""
    names = set()
    for path in ROOT.glob("benchmarks/*.py"):
        names |= set(re.findall(r'feature\("(\w+)"\)', path.read_text()))
    assert {"DecodeBatch", "decode_attention", "PagedKVCache", "SlotMapping"} <= names
    before = {"FramePool"}  # of phases 9 to 11
    assert names - before <= set(pagedkv.__all__)
