"""What `benchmarks/server.py` measures are two servers that answer the same."""

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
from small_models import small_model

from benchmarks import generate, server


@pytest.fixture(scope="module")
def measured():
    found = server.Requests()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "llama", lambda: small_model("llama"))
        try:
            found.setup(3)
            yield found
        finally:
            found.teardown(3)


def texts(answers):
    return [answer["choices"][0]["message"]["content"] for answer in answers]


def test_both_servers_answer_the_same_as_often(measured, monkeypatch):
    monkeypatch.setattr(measured, "requests", 2)
    found, answers = [], measured.answers
    monkeypatch.setattr(measured, "answers", lambda *asked: found.append(answers(*asked)))
    for call in measured.ratio_requests_per_second(3):
        monkeypatch.setattr(measured, "rng", np.random.default_rng(1))
        call()
    own, paged = found
    assert len(own) == 3 * 2
    assert sorted(texts(own)) == sorted(texts(paged))
    assert all(answer["usage"]["completion_tokens"] == measured.answer for answer in own + paged)
    # The second requests of each find what all share.
    for answer in own[1::2] + paged[1::2]:
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > measured.shared


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)did not start: .*arguments: --nosuch"):
        server.Server("mlx_lm.server", tmp_path, "--nosuch")


def test_a_refused_request_is_an_error(measured, monkeypatch):
    monkeypatch.setattr(measured, "answer", 10**6)
    with pytest.raises(server.RefusedError, match="400"):
        measured.answers(measured.paged, 1)
