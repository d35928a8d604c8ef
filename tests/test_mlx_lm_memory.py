"""Budgets in bytes and as shares of what the device has left."""

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from small_models import small_model

from pagedkv.cache import device_memory
from pagedkv.mlx_lm import PagedStore, ScheduledModel, store
from pagedkv.mlx_lm.server import main
from pagedkv.mlx_lm.store import AUTO, parse_bytes

LEFT = 2**20
KINDS = {"store": PagedStore, "scheduled": ScheduledModel}


@pytest.fixture
def left(monkeypatch):
    """Let the device have a MiB left of ten."""
    found = device_memory.DeviceMemory(10 * LEFT, LEFT)
    for module in (device_memory, store):
        monkeypatch.setattr(module, "device_memory", lambda: found)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("80%", 0.8 * LEFT),
        (" 12.5 % ", LEFT / 8),
        ("100%", LEFT),
        ("auto", AUTO * LEFT),
        ("Auto", AUTO * LEFT),
        ("1KiB", 1024),
    ],
)
def test_shares_are_of_what_is_left(left, memory, expected):
    assert parse_bytes(memory) == int(expected)


@pytest.mark.parametrize("memory", ["0%", "101%", "-5%", "%", "80 percent", "automatic", "nan%"])
def test_other_shares_are_refused(memory):
    with pytest.raises(ValueError, match="expected memory in bytes or such as '8GB', got"):
        parse_bytes(memory)


@pytest.mark.parametrize("kind", KINDS)
def test_pools_take_a_share(left, kind):
    model = small_model("llama")
    for memory, share in (("50%", 0.5), ("auto", AUTO)):
        with KINDS[kind](model, memory=memory, block_size=4) as opened:
            kv = opened.memory.kv if kind == "store" else opened.cache
            usage = kv.memory_usage()
            wanted = share * LEFT
            assert wanted - usage.block_bytes < usage.allocated_bytes <= wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [{"memory": LEFT + 1}, {"memory": "9GB"}, {"num_blocks": 2**16}])
def test_more_than_is_left_is_refused_and_mlx_lm_is_as_it_was(left, kind, budget):
    model = small_model("llama")
    message = rf"of {LEFT} bytes at most, .* left of {10 * LEFT}, got \d+ bytes"
    with pytest.raises(ValueError, match=message):
        KINDS[kind](model, **budget)
    assert "make_cache" not in vars(model)
    with PagedStore(model, num_blocks=4):
        pass


def test_weights_that_were_not_loaded_yet_are_counted(monkeypatch):
    model = small_model("llama")
    model.lm_weight = mx.ones((256, 256)) * 2  # not computed yet
    seen = []
    found = device_memory.DeviceMemory(10 * LEFT, LEFT)
    monkeypatch.setattr(
        store, "device_memory", lambda: seen.append(mx.get_active_memory()) or found
    )
    before = mx.get_active_memory()
    with PagedStore(model, memory="50%"):
        assert seen[0] > before + model.lm_weight.nbytes // 2


@pytest.mark.parametrize("memory", ["120%", "0%"])
def test_the_server_refuses_malformed_ones(memory, capsys):
    with pytest.raises(SystemExit):
        main(["--memory", memory])
    assert "expected memory in bytes or such as '8GB', got" in capsys.readouterr().err


def test_the_servers_help_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "80% of the memory that is left" in " ".join(capsys.readouterr().out.split())
