"""Files of prompt caches: which model they belong to, and whether they are intact."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache

SAMPLES = 8  # numbers of each parameter, from the first to the last
_SEAL = "pagedkv_model={} pagedkv_crc32={}"
_SEALED = re.compile(rb'"pagedkv_model=([0-9a-f]*) pagedkv_crc32=([0-9a-f]{8})"')
_UNKNOWN = "0" * 8  # a checksum that was not written yet
_CHUNK = 2**20  # bytes


def fingerprint(model: Any) -> str:
    """Return a fingerprint of a model's weights: 16 hexadecimal digits.

    It covers each parameter's name, shape, dtype and `SAMPLES` of its numbers. Weights that differ
    only in other numbers have the same fingerprint.

    Parameters
    ----------
    model : nn.Module
        The model.
    """
    flat_tree: Any = tree_flatten(model.parameters())
    parameters: list[tuple[str, mx.array]] = sorted(flat_tree, key=itemgetter(0))
    samples = []
    for _, parameter in parameters:
        last = max(parameter.size - 1, 0)
        places = [last * place // (SAMPLES - 1) for place in range(SAMPLES)]
        flat = parameter.reshape(-1)
        samples.append((flat[mx.array(places)] if parameter.size else flat).view(mx.uint8))
    mx.eval(samples)
    found = hashlib.blake2b(digest_size=8)
    for (name, parameter), sample in zip(parameters, samples, strict=True):
        found.update(repr((name, parameter.shape, str(parameter.dtype))).encode())
        found.update(bytes(np.array(sample)))
    return found.hexdigest()


def save_caches(
    own: Callable[..., None],
    file_name: str,
    caches: list[Any],
    metadata: dict[str, str] | None,
    model: str | None,
) -> None:
    """Save caches as mlx-lm does, with what `read_caches` compares.

    Parameters
    ----------
    own : callable
        mlx-lm's `save_prompt_cache`.
    file_name : str
        Where to; ``.safetensors`` is added if it lacks that.
    caches : list
        mlx-lm's own.
    metadata : dict of str to str or None
        The caller's.
    model : str or None
        The model's `fingerprint`, if it is known.
    """
    # mlx-lm writes the name of each cache's class, and reads as many as have a state: one more is
    # ours, and the caller's metadata are the caller's alone.
    seal = type(_SEAL.format(model or "", _UNKNOWN), (), {"state": []})()
    own(file_name, [*caches, seal], metadata)
    path = file_name if file_name.endswith(".safetensors") else f"{file_name}.safetensors"
    sealed = _sealed(path)
    assert sealed is not None
    with open(path, "r+b") as file:
        file.seek(sealed.place)
        file.write(sealed.found.encode())


def read_caches(file_name: str) -> tuple[list[Any], str | None]:
    """Return the caches in a file, mlx-lm's own, and their model's `fingerprint` if it is known.

    Raises
    ------
    ValueError
        If it cannot be read, or does not hold what was saved.
    """
    try:
        sealed = _sealed(file_name)
        if sealed is None or sealed.written == sealed.found:
            caches: list[Any] = load_prompt_cache(file_name)
            mx.eval([cache.state for cache in caches])
            return caches, sealed.model or None if sealed else None
    except Exception as error:
        raise ValueError(
            f"expected a prompt cache in {file_name}, got {type(error).__name__}: {error}"
        ) from error
    raise ValueError(
        f"expected a prompt cache with checksum {sealed.written} in {file_name}, got "
        f"{sealed.found}: the file was damaged, or never written to its end"
    )


class _Seal(NamedTuple):
    """The model and checksum that a file claims, and the checksum that it has.

    Attributes
    ----------
    model : str
        The fingerprint of its model, or nothing.
    place : int
        Where the checksum is, in bytes.
    written, found : str
        The checksum there, and that of all bytes with zeros in its place.
    """

    model: str
    place: int
    written: str
    found: str


def _sealed(path: str) -> _Seal | None:
    """Return a file's seal; None if it has none, ValueError if it is cut off."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        file.seek(0)
        head = file.read(8 + min(size, _CHUNK))
        match = _SEALED.search(head)
        if match is None:
            if b"pagedkv_" in head:
                raise ValueError("a checksum that was damaged")
            return None
        place, stop = match.span(2)
        found = zlib.crc32(head[:place] + _UNKNOWN.encode() + head[stop:])
        while more := file.read(_CHUNK):
            found = zlib.crc32(more, found)
    return _Seal(match[1].decode(), place, match[2].decode(), f"{found:08x}")
