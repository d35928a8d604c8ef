"""What `benchmarks/generate.py` measures is mlx-lm's generation, the same on both sides."""

import builtins

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from mlx_lm.generate import generation_stream
from small_models import small_model

from benchmarks import common, generate
from pagedkv.mlx_lm.layer import PagedLayer


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generate, "llama", lambda: small_model("llama"))


def tokens(decoding, steps=6):
    """What a generation says in some steps, by sequence."""
    found = [decoding.next() for _ in range(steps)]
    return [[step[row].token for step in found] for row in range(len(found[0]))]


@pytest.mark.parametrize(
    ("kind", "cell", "lengths"),
    [
        (generate.Decode, (4, 40), [40] * 4),
        (generate.Skewed, (96,), [96, *[6] * 7]),
    ],
)
def test_both_sides_say_the_same_at_the_same_length(kind, cell, lengths, monkeypatch):
    measured = kind()
    measured.setup(*cell)
    assert tokens(measured.plain) == tokens(measured.paged)
    [sequences] = {
        layer.sequences
        for layer in measured.paged.generator._generation_batch.prompt_cache
        if isinstance(layer, PagedLayer)
    }
    grown = {table.num_tokens - n for table, n in zip(sequences.tables, lengths, strict=True)}
    assert len(grown) == 1
    plain, paged = measured.ratio_tokens_per_second(*cell)
    passes = []
    for side, call in ((measured.plain, plain), (measured.paged, paged)):
        step = side.next
        monkeypatch.setattr(side, "next", lambda step=step: passes.append(step()))
        call()
    assert len(passes) == 2 * generate.STEPS
    assert all(len(responses) == len(lengths) for responses in passes)
    assert measured.ours() == paged
    # As many steps as asv may ask for, both sides in turns, fit the store.
    most = (kind.repeat[1] + 2) * generate.STEPS + 16
    assert most <= generate.MOST
    measured.store.close()


def test_the_null_arm_has_mlx_lms_caches_on_both_sides():
    null = generate.Null()
    null.setup(4, 40)
    assert tokens(null.plain) == tokens(null.paged)
    for side in (null.plain, null.paged):
        caches = side.generator._generation_batch.prompt_cache
        assert not any(isinstance(layer, PagedLayer) for layer in caches)
    null.teardown()


@pytest.fixture
def in_flight(monkeypatch):
    """The streams that nothing has waited for since something was started."""
    found, start, wait = set(), mx.async_eval, mx.synchronize

    def async_eval(*arrays):
        found.update(("default", "mlx-lm's"))
        start(*arrays)

    def synchronize(*streams):
        wait(*streams)
        found.difference_update(
            "mlx-lm's" if stream is generation_stream else "default" for stream in streams or [None]
        )

    monkeypatch.setattr(mx, "async_eval", async_eval)
    monkeypatch.setattr(mx, "synchronize", synchronize)
    return found


@pytest.mark.parametrize(("kind", "cell"), [(generate.Decode, (2, 8)), (generate.Skewed, (32,))])
def test_nothing_of_a_side_is_in_flight_while_the_other_is_timed(kind, cell, in_flight):
    measured = kind()
    measured.setup(*cell)
    measured.plain.next()
    assert in_flight
    for call in measured.ratio_tokens_per_second(*cell):
        call()
        assert not in_flight
    measured.store.close()


def test_nothing_of_a_first_token_is_in_flight_while_the_next_is_timed(in_flight):
    measured = generate.FirstToken()
    measured.setup(32)
    for call in measured.ratio_first_token(32):
        assert not in_flight
        call()
        assert in_flight  # the second token, which is not timed
        measured.between()
    assert not in_flight
    measured.store.close()


def test_a_hit_is_shorter_than_a_miss():
    measured = generate.FirstToken()
    measured.setup(64)
    hit, miss = measured.ratio_first_token(64)
    for _ in range(2 * (measured.repeat[1] + 2)):
        hit()
        miss()  # each in a namespace of its own: old ones make room
    measured.store.close()


@pytest.mark.parametrize(("grown", "ratio"), [(0, 1.0), (1, 1 + 8 / 16)])
def test_forks_share_all_blocks_but_their_last(grown, ratio):
    measured = generate.Forks()
    measured.setup(512, grown)
    assert measured.track_memory(512, grown) == ratio


def test_what_is_not_there_is_not_applicable(monkeypatch):
    own = builtins.__import__

    def without(name, *arguments):
        if name == "pagedkv.mlx_lm":
            raise ImportError("no mlx-lm")
        return own(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotImplementedError, match="no mlx-lm over the package"):
        generate.Decode().setup(1, 512)


@pytest.mark.skipif(common.on_gpu(), reason="a GPU computes them in seconds")
def test_long_prompts_are_not_applicable_on_a_cpu():
    with pytest.raises(NotImplementedError, match="prompts of 4096 tokens take a CPU minutes"):
        generate.Decode().setup(1, 4096)
