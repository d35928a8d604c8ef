"""How much memory the default device has, and how much of it is left for pools."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# A container's limit, what it holds, and the part of that which is the system's cache of files.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_cache",
    ),
)


class DeviceMemory(NamedTuple):
    """Memory of a device, in bytes.

    Attributes
    ----------
    total : int
        On a Mac's GPU the working set that Metal recommends, on another GPU its memory; on a CPU
        the machine's memory, or a container's limit if that is less.
    left : int
        Memory that is not in use. Memory that MLX holds in this process counts as in use, including
        weights of models, but not what MLX caches for reuse. So does memory of other processes
        where the system reports it: on CUDA and on Linux.
    """

    total: int
    left: int


def device_memory() -> DeviceMemory:
    """Return the memory of the default device now."""
    is_gpu = mx.default_device().type == mx.gpu
    total, free = _of_gpu() if is_gpu else _of_machine()
    left = total - mx.get_active_memory()
    if free is not None:
        left = min(left, free + mx.get_cache_memory())
    return DeviceMemory(total, max(left, 0))


def check_room(num_bytes: int) -> None:
    """Raise ValueError if the default device has less than `num_bytes` left."""
    memory = device_memory()
    if num_bytes > memory.left:
        raise ValueError(
            f"expected pools of {memory.left} bytes at most, which is what the "
            f"{mx.default_device().type.name} has left of {memory.total}, got {num_bytes} bytes"
        )


def _of_gpu() -> tuple[int, int | None]:
    info = mx.device_info()
    names = "max_recommended_working_set_size", "memory_size", "total_memory"  # Metal's, CUDA's
    total = next((int(info[name]) for name in names if info.get(name)), None)
    free = int(info["free_memory"]) if "free_memory" in info else None
    return (_of_machine()[0] if total is None else total), free


def _of_machine() -> tuple[int, int | None]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = None
    with suppress(OSError, KeyError, ValueError):
        free = _numbers(MEMINFO)["MemAvailable:"] * 1024
    for limit_of, held_by, parts, files in _LIMITS:
        with suppress(OSError, KeyError, ValueError):
            limit = int((CGROUP / limit_of).read_text())
            held = int((CGROUP / held_by).read_text()) - _numbers(CGROUP / parts)[files]
            if limit < total:
                total, free = limit, min(limit - held, limit if free is None else free)
    return total, free


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}
