"""Results of measurements on this machine, stored in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

import pagedkv
from pagedkv import kernels
from pagedkv.attention.inputs import Call
from pagedkv.kernels.files import write_whole


@dataclass(frozen=True)
class Finding:
    """The result of a measurement for calls of one kind.

    Attributes
    ----------
    path : str or None
        What to use; None if nothing could be found out.
    ms : mapping of str to float
        Median time of a call by path, in milliseconds; empty if not timed.
    fault : str
        Why the kernel is not to be used; empty if it is right.
    undecided : str
        Why nothing could be found out; empty if something was.
    day : str
        When, as 2026-01-31; empty if by this process.
    """

    path: str | None
    ms: Mapping[str, float]
    fault: str = ""
    undecided: str = ""
    day: str = ""

    @property
    def because(self) -> str:
        """Where the choice comes from, for `explain`."""
        if self.undecided:
            return f"the package's choice, not measured here: {self.undecided}"
        when = f"on {self.day}" if self.day else "by this process"
        times = ", ".join(f"{path} {ms:.3g} ms" for path, ms in self.ms.items())
        return f"measured here {when}: {self.fault or times}"


def kind_of(call: Call, tokens: int) -> str:
    """Return what calls have in common that one measurement is for.

    Parameters
    ----------
    call : Call
        With pools of layout [N, S, Hkv, D].
    tokens : int
        Sequences times the longest context.

    Returns
    -------
    str
        Dtype, heads, head dim, block size, query tokens, score options without their values, bits;
        sequences and tokens rounded up to powers of two.
    """
    sequences, heads, query_len, head_dim = call.queries
    _, block_size, kv_heads, _ = call.keys
    most, most_tokens = (1 << (number - 1).bit_length() for number in (sequences, tokens))
    options = "".join(f" {name}" for name, _ in call.options)
    if any(call.bits):
        options += f" bits={call.bits}"
    return (
        f"{str(call.dtype).rpartition('.')[2]} D={head_dim} Hkv={kv_heads} G={heads // kv_heads} "
        f"S={block_size} Q={query_len}{options} B<={most} tokens<={most_tokens}"
    )


@cache
def environment(device: str) -> str:
    """Return what findings hold for: a device, and the versions and sources that ran on it."""
    digest = hashlib.sha256()
    for folder in (kernels.FOLDER, Path(__file__).parent):
        for file in sorted([*folder.glob("*.py"), *folder.glob("*.h")]):
            digest.update(file.read_bytes())
    mlx = vars(mx)["__version__"]  # which MLX's type stubs lack
    sources = digest.hexdigest()[:12]
    return f"{device}, MLX {mlx}, pagedkv {pagedkv.__version__}, sources {sources}"


@cache
def findings(where: str) -> dict[str, Finding]:
    """Return an environment's findings by kind: those of `cache_file`, once, and this process's."""
    entries = {kind: _from_json(entry) for kind, entry in _load().get(where, {}).items()}
    return {kind: finding for kind, finding in entries.items() if finding is not None}


def cache_file() -> Path:
    """Return where findings are kept.

    Returns
    -------
    Path
        ``measured.json`` in the folder ``pagedkv`` of $XDG_CACHE_HOME, or else of
        ``~/Library/Caches`` on macOS and of ``~/.cache`` elsewhere.

    Raises
    ------
    RuntimeError
        If the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "pagedkv/measured.json"
    usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / usual / "pagedkv/measured.json"


def store(where: str, kind: str, finding: Finding) -> Path | None:
    """Add a finding to `cache_file`.

    Other processes may do so at the same time: none reads half a file, and of two that write at the
    same moment one may be forgotten, which is then measured again.

    Returns
    -------
    Path or None
        The file; None if it cannot be written.
    """
    with suppress(OSError, RuntimeError):
        file = cache_file()
        held = _load()
        entry = {"path": finding.path, "ms": dict(finding.ms), "fault": finding.fault}
        held.setdefault(where, {})[kind] = {**entry, "day": date.today().isoformat()}
        write_whole(file, json.dumps(held, indent=1).encode())
        return file
    return None


def _load() -> dict[str, dict[str, Any]]:
    """Return what `cache_file` holds, entries by kind by environment; nothing if it is damaged."""
    with suppress(OSError, ValueError, RuntimeError):
        held = json.loads(cache_file().read_text(encoding="utf-8"))
        if isinstance(held, dict):
            return {where: kinds for where, kinds in held.items() if isinstance(kinds, dict)}
    return {}


def _from_json(entry: Any) -> Finding | None:
    """Return a finding that was kept, or None if it is none."""
    try:
        ms = {str(name): float(time) for name, time in entry["ms"].items()}
        return Finding(str(entry["path"]), ms, str(entry["fault"]), day=str(entry["day"]))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
