"""What `benchmarks/trace.py` replays is one trace on both sides, and what it counts of it."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from small_models import small_model

from benchmarks import generate, trace

TINY = trace.Shape(16, 64, (20, 0.7, 4, 60), (5, 0.5, 2, 8), 8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generate, "llama", lambda: small_model("llama"))
    monkeypatch.setattr(trace, "shape", lambda: TINY)


@pytest.mark.parametrize("shape", [trace.LARGE, trace.SMALL, TINY])
def test_a_trace_is_seeded_and_within_its_bounds(shape):
    requests = trace.requests_of(shape, 1000)
    assert requests == trace.requests_of(shape, 1000)
    assert len(requests) == shape.requests
    for lengths, (median, _, least, most) in (
        ([len(one.own) for one in requests], shape.prompt),
        ([one.answer for one in requests], shape.answer),
    ):
        assert least <= min(lengths) <= max(lengths) <= most
        assert len(set(lengths)) > 3
        if shape is trace.LARGE:
            assert np.median(lengths) == pytest.approx(median, rel=0.35)
    assert all(0 <= token < 1000 for one in requests for token in one.prompt)
    prefixes = [one.prefix for one in requests if one.prefix]
    assert len(prefixes) == shape.requests // 2
    assert len(prefixes[0]) == shape.prefix
    assert all(prefix == prefixes[0] for prefix in prefixes)
    assert len({tuple(one.own[:4]) for one in requests}) == shape.requests


def test_another_run_has_other_tokens_of_the_same_lengths():
    first, second = (trace.requests_of(TINY, 1000, run) for run in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert (len(one.prefix), len(one.own), one.answer) == (
            len(other.prefix),
            len(other.own),
            other.answer,
        )
        assert one.own != other.own
        assert not one.prefix or one.prefix != other.prefix


def test_clipped_log_normal_lengths():
    rng = np.random.default_rng(0)
    drawn = trace.log_normal(rng, 10_000, 100, 1.0, 50, 1000)
    assert (drawn.min(), drawn.max()) == (50, 1000)
    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    # A deviation of 1: two thirds lie between the median over e and the median times e.
    assert np.mean(drawn < 100 * np.e) == pytest.approx(0.84, abs=0.02)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 95, 3.0),
        ([1, 2, 3], 50, 2.0),
        ([4, 1, 3, 2], 50, 2.5),
        (list(range(101)), 95, 95.0),
        ([0, 10], 95, 9.5),
    ],
)
def test_percentiles(values, share, expected):
    assert trace.percentile(values, share) == pytest.approx(expected)


def test_numbers_of_a_run():
    waits = [[1.0, 2.0, 3.0], [5.0, 5.5], [9.0]]
    assert trace.numbers_of(waits, 12, 4.0) == {
        "tokens_per_second": 3.0,
        "first_token_p50": 5.0,
        "first_token_p95": pytest.approx(8.6),
        "between_tokens_p95": pytest.approx(1.0),
    }


def test_both_sides_answer_the_same_and_the_store_finds_the_prefix():
    model = small_model("llama")
    requests = trace.requests_of(TINY, model.args.vocab_size)
    plain = trace.answer_all(model, requests)
    with trace.store_of(model, requests) as store:
        paged = trace.answer_all(model, requests, store)
        stats = store.stats()
    assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in paged]
    assert [len(tokens) for tokens, _ in plain] == [one.answer for one in requests]
    for found in (plain, paged):
        assert all(times == sorted(times) and times[0] > 0 for _, times in found)
    assert stats.asked_tokens == sum(len(one.prompt) for one in requests)
    # A prefix is whole blocks; those find it that begin when another with it has ended.
    late = sum(bool(one.prefix) for one in requests[TINY.slots :])
    assert stats.cached_tokens in [count * TINY.prefix for count in range(1, late + 1)]


def test_no_more_sequences_than_slots_are_there(monkeypatch):
    from mlx_lm.generate import BatchGenerator

    model, most = small_model("llama"), []
    own = BatchGenerator.next

    def counted(self):
        waiting = len(self._unprocessed_sequences) + len(self._prompt_batch)
        most.append(waiting + len(self._generation_batch))
        return own(self)

    monkeypatch.setattr(BatchGenerator, "next", counted)
    trace.answer_all(model, trace.requests_of(TINY, model.args.vocab_size))
    assert max(most) == TINY.slots


def test_numbers_are_of_the_second_run_of_each_side(monkeypatch):
    runs = []

    def replay(model, requests, side):
        runs.append(side)
        return dict.fromkeys(names, len(runs) * (10.0 if side == "store" else 1.0))

    names = "tokens_per_second", "first_token_p50", "first_token_p95", "between_tokens_p95"
    names += ("peak_memory",)
    monkeypatch.setattr(trace, "replay", replay)
    measured = trace.Batched()
    found = measured.setup_cache()
    assert sorted(runs[:2]) == sorted(runs[2:]) == sorted(trace.SIDES)
    assert min(found["store"].values()) >= 30
    measured.setup(found)
    series = [getattr(measured, f"track_{name}")(found) for name in names]
    assert series == [found["store"]["peak_memory"] / found["mlx-lm"]["peak_memory"]] * 5


def test_a_run_has_all_numbers_and_peak_memory_of_its_own():
    model = small_model("llama")
    requests = trace.requests_of(TINY, model.args.vocab_size)
    for side in trace.SIDES:
        numbers = trace.replay(model, requests, side)
        assert min(numbers.values()) > 0
        assert numbers["first_token_p50"] <= numbers["first_token_p95"]


def test_where_there_is_no_store_nothing_is_measured(monkeypatch):
    def lacking():
        raise NotImplementedError("no mlx-lm over the package")

    monkeypatch.setattr(trace, "import_mlx_lm", lacking)
    for kind, cell in ((trace.Batched, ()), (trace.Served, ("at capacity",))):
        found = kind().setup_cache()
        assert found == {}  # of None asv would hand on nothing
        with pytest.raises(NotImplementedError, match="no mlx-lm"):
            kind().setup(found, *cell)


def test_arrivals_are_seeded_and_as_many_a_second_as_asked_for():
    assert trace.arrivals_of(3, None) == [0.0] * 3
    arrivals = trace.arrivals_of(2000, 4.0)
    assert arrivals == trace.arrivals_of(2000, 4.0)
    assert arrivals == sorted(arrivals)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.1)


def test_a_server_is_warm_and_arrivals_are_shares_of_a_capacity(monkeypatch):
    asked, clock = [], iter([100.0, 3.0, 6.0, 4.0, 100.0, 2.0, 6.0, 4.0])

    def ask_all(server, requests, arrivals):
        asked.append((server, requests, arrivals))
        return [("", [1.0, 2.0], {}) for _ in requests], next(clock)

    monkeypatch.setattr(trace, "ask_all", ask_all)
    own, capacity = trace.serve_all("own", TINY, 90)
    assert capacity == TINY.requests / 3.0
    paged, same = trace.serve_all("paged", TINY, 90, capacity)
    assert same == capacity
    rates = None, None, capacity / 2, capacity
    expected = [trace.arrivals_of(TINY.requests, rate) for rate in rates]
    assert [arrivals for _, _, arrivals in asked] == expected * 2
    for (_, first, _), (_, second, _) in zip(asked[:4], asked[4:], strict=True):
        assert first == second
    assert len({tuple(requests[0].own) for _, requests, _ in asked}) == 4
    assert list(own) == trace.Served.params[0]
    answers = sum(one.answer for one in asked[0][1])
    for found, seconds in ((own, 3.0), (paged, 2.0)):
        assert found["all at once"]["tokens_per_second"] == answers / seconds


def test_both_servers_answer_a_trace_alike(monkeypatch):
    answered, ask_all = [], trace.ask_all

    def kept(server, requests, arrivals):
        found = ask_all(server, requests, arrivals)
        answered.append([text for text, _, _ in found[0]])
        return found

    monkeypatch.setattr(trace, "ask_all", kept)
    monkeypatch.setattr(trace, "shape", lambda: replace(TINY, requests=6))
    measured = trace.Served()
    found = measured.setup_cache()
    assert answered[:4] == answered[4:]
    assert len({text for texts in answered for text in texts}) > 3
    for arrivals in measured.params[0]:
        measured.setup(found, arrivals)
        for name in ("tokens_per_second", "first_token_p95", "between_tokens_p95"):
            assert getattr(measured, f"track_{name}")(found, arrivals) > 0


def test_waiting_begins_when_a_request_arrives(monkeypatch):
    slept = []

    class Clock:
        sleep = staticmethod(slept.append)
        perf_counter = staticmethod(lambda: 50.0)

    class Server:
        @staticmethod
        def ask_again(path, body, ask):
            assert [one["role"] for one in body["messages"]] == ["user"]
            text = {"choices": [{"delta": {"content": body["messages"][0]["content"]}}]}
            usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
            return [(60.0, text), (62.0, text), (63.0, usage)]

        stream = None

    monkeypatch.setattr(trace, "time", Clock)
    requests = [trace.Request([], [token], 2) for token in (1, 2)]
    found, seconds = trace.ask_all(Server, requests, [1.0, 4.0])
    assert sorted(slept) == [1.0, 4.0]
    assert [(text, times) for text, times, _ in found] == [
        ("w1w1", [9.0, 11.0]),
        ("w2w2", [6.0, 8.0]),
    ]
    assert seconds == 11.0  # from the first arrival on


def test_an_answer_of_another_length_is_an_error():
    class Server:
        @staticmethod
        def ask_again(path, body, ask):
            return [(0.0, {"choices": [], "usage": {"completion_tokens": 3}})]

        stream = None

    with pytest.raises(AssertionError, match="expected an answer of 4 tokens"):
        trace.ask_all(Server, [trace.Request([], [1], 4)], [0.0])
