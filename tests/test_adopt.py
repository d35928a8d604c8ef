"""Results measured without asv's environments."""

import json

import pytest
from asv.util import UserError

from tools import adopt


def existing(tmp_path, env_name="existing-py_opt_venv_bin_python3"):
    result = {
        "commit_hash": "0123456789abcdef",
        "date": 0,
        "env_name": env_name,
        "params": {"machine": "gpu", "python": "/opt/venv/bin/python3"},
        "python": "/opt/venv/bin/python3",
        "requirements": {},
        "result_columns": ["result", "params", "version"],
        "results": {"a.B.time_c": [[1.0], [], "1"]},
        "version": 2,
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source/machine.json").write_text('{"machine": "gpu", "os": "Linux", "version": 1}')
    source = tmp_path / "source/01234567-existing.json"
    source.write_text(json.dumps(result))
    return source, result


LABEL = {"backend": "cuda13", "python": "3.12", "mlx": "0.32.4"}


def test_adopt_relabels_and_keeps_the_measurements(tmp_path):
    source, before = existing(tmp_path)
    target = adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert target == tmp_path / "results/gpu/01234567-cuda13-py3.12-mlx0.32.4.json"
    after = json.loads(target.read_text())
    assert "/opt" not in target.read_text()
    assert after["results"] == before["results"]
    assert after["commit_hash"] == before["commit_hash"]
    assert after["params"] == {"machine": "gpu", "python": "3.12", "mlx": "0.32.4"}
    assert json.loads((target.parent / "machine.json").read_text())["os"] == "Linux"


def test_adopt_refuses_results_that_have_a_name(tmp_path):
    source, _ = existing(tmp_path, "virtualenv-py3.11-mlx0.32.4")
    with pytest.raises(UserError, match="expected an existing environment, got virtualenv"):
        adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("01234567-existing.json", "{}", "is a required property"),
        ("01234567-existing.json", None, "No such file"),
        ("machine.json", '{"machine": "gpu"', "Expecting"),
        ("machine.json", '{"machine": "other", "version": 1}', "of machine 'gpu', got 'other'"),
        ("machine.json", '{"machine": "gpu", "cpu": "<b>", "version": 1}', "not of type 'text'"),
    ],
)
def test_adopt_refuses_what_is_broken(name, text, reason, tmp_path):
    source, _ = existing(tmp_path)
    broken = source.with_name(name)
    broken.unlink() if text is None else broken.write_text(text)
    with pytest.raises(UserError, match=rf"{name} (is|would be) broken: .*{reason}"):
        adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_adopt_refuses_labels_that_a_page_would_obey(tmp_path):
    source, _ = existing(tmp_path)
    with pytest.raises(UserError, match="is not of type 'text'"):
        adopt.adopt(source, **LABEL | {"mlx": "<b>"}, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()
