"""Pools that the device has no room for are refused before anything is allocated."""

import mlx.core as mx
import pytest

from pagedkv import PagedKVCache
from pagedkv.cache import device_memory as module
from pagedkv.cache.device_memory import check_room, device_memory

GIB = 2**30


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A machine of 64 GiB with 48 GiB free, and a folder for the limits of its containers."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\nHuge: 0\n")
    monkeypatch.setattr(module, "MEMINFO", meminfo)
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(module.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5 * GIB)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1 * GIB)
    return tmp_path


def gpu(monkeypatch, **info):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)


def test_a_cpu_has_what_the_system_says_is_available(linux):
    assert device_memory() == (64 * GIB, 49 * GIB)


def test_a_mac_that_tells_nothing_has_what_mlx_does_not_hold(linux, monkeypatch):
    monkeypatch.setattr(module, "MEMINFO", linux / "none")
    assert device_memory() == (64 * GIB, 59 * GIB)


def test_a_container_has_its_limit(linux):
    for name, text in (
        ("memory.max", 16 * GIB),
        ("memory.current", 10 * GIB),
        ("memory.stat", f"anon {7 * GIB}\nfile {3 * GIB}"),
    ):
        (linux / name).write_text(f"{text}\n")
    assert device_memory() == (16 * GIB, 10 * GIB)
    (linux / "memory.max").write_text("max\n")
    assert device_memory() == (64 * GIB, 49 * GIB)


def test_so_has_one_of_the_first_version(linux):
    (linux / "memory").mkdir()
    for name, text in (
        ("limit_in_bytes", 16 * GIB),
        ("usage_in_bytes", 10 * GIB),
        ("stat", f"cache 0\ntotal_cache {3 * GIB}"),
    ):
        (linux / f"memory/memory.{name}").write_text(f"{text}\n")
    assert device_memory() == (16 * GIB, 10 * GIB)
    (linux / "memory/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert device_memory() == (64 * GIB, 49 * GIB)


def test_a_gpu_has_what_its_backend_says(linux, monkeypatch):
    gpu(monkeypatch, memory_size=96 * GIB, max_recommended_working_set_size=72 * GIB)
    assert device_memory() == (72 * GIB, 67 * GIB)
    gpu(monkeypatch, total_memory=139 * GIB)
    assert device_memory() == (139 * GIB, 134 * GIB)
    gpu(monkeypatch, total_memory=139 * GIB, free_memory=100 * GIB)
    assert device_memory() == (139 * GIB, 101 * GIB)
    gpu(monkeypatch, total_memory=139 * GIB, free_memory=0)
    assert device_memory() == (139 * GIB, 1 * GIB)
    gpu(monkeypatch)
    assert device_memory() == (64 * GIB, 59 * GIB)


def test_nothing_is_left_where_more_is_held(linux, monkeypatch):
    gpu(monkeypatch, total_memory=4 * GIB)
    assert device_memory() == (4 * GIB, 0)


def test_more_than_is_left_is_refused_with_both_numbers(linux):
    check_room(49 * GIB)
    message = f"of {49 * GIB} bytes at most, .* left of {64 * GIB}, got {49 * GIB + 1} bytes"
    with pytest.raises(ValueError, match=message):
        check_room(49 * GIB + 1)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("windows", [None, [4, None, 4]])
def test_pools_are_refused_before_they_are_allocated(monkeypatch, bits, windows):
    sizes = {
        "num_layers": 3,
        "num_blocks": 32,
        "block_size": 16,
        "kv_heads": 2,
        "head_dim": 16,
        "windows": windows,
        "bits": bits,
    }
    need = PagedKVCache(**sizes).memory_usage().allocated_bytes
    made = []
    zeros = mx.zeros
    monkeypatch.setattr(mx, "zeros", lambda *arguments: made.append(arguments) or zeros(*arguments))
    for left in (need - 1, need):
        found = module.DeviceMemory(10 * need, left)
        monkeypatch.setattr(module, "device_memory", lambda found=found: found)
        if left < need:
            with pytest.raises(ValueError, match=f"of {left} bytes .* got {need} bytes"):
                PagedKVCache(**sizes)
            assert not made
        else:
            PagedKVCache(**sizes)
